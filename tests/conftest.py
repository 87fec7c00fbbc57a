"""Fixtures of every test: seeds, one thread, no network, golden texts."""

from __future__ import annotations

import difflib
import os
import random
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may wait for a network

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/*.txt anew instead of comparing")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # tiny models: more threads only make timings noisy


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def compare_golden(path: Path, text: str, update: bool = False) -> None:
    """Fail with a diff if ``text`` is not what the file holds."""
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    if not path.is_file():
        pytest.fail(f"there is no {path}; run pytest --update-golden and read what it wrote", pytrace=False)
    expected = path.read_text(encoding="utf-8")
    if text != expected:
        diff = difflib.unified_diff(expected.splitlines(), text.splitlines(), str(path.name), "now", lineterm="", n=1)
        pytest.fail("\n".join(["the text differs from the golden one (pytest --update-golden accepts it):", *diff]), pytrace=False)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)`` compares with ``tests/golden/<name>.txt``."""

    def check(name: str, text: str) -> None:
        compare_golden(GOLDEN / f"{name}.txt", text, update=request.config.getoption("--update-golden"))

    return check
