"""Fixtures of every test: seeds, one thread, no network, golden texts."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may wait for a network

import numpy as np
import pytest
import torch
from golden_texts import GOLDEN, compare_golden
from hypothesis import settings

# Elsewhere every run tries new cases; CI tries the same ones each time, so that a red run is the change's own doing.
# No deadline: these machines are shared, and a slow case is not a wrong one.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/*.txt anew instead of comparing")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # tiny models: more threads only make timings noisy


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)`` compares with ``tests/golden/<name>.txt``."""

    def check(name: str, text: str) -> None:
        compare_golden(GOLDEN / f"{name}.txt", text, update=request.config.getoption("--update-golden"))

    return check


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """For plans: miniatures are compiled once, and what they cost is given, a second each, and as much for a block and for 1000 parameters."""
    from ntc import plan as planning

    def given(config: Any, recipe: Any, settings: Any, on_disk: bool, progress: Any) -> Any:
        few = planning._miniature(config, planning._BLOCKS[1], planning._NARROW)
        run = planning._compiled(few, recipe, settings, on_disk, keep=True)
        return run, tuple(planning.Rates(s.name, 1.0, 1.0, 0.001, 100.0, 2.0, on_disk) for s in run.stages)

    monkeypatch.setattr(planning, "measure", given)
    monkeypatch.setattr(planning, "_BLOCKS", (1, 2))
