"""A compiled folder and texts for tests of whole runs; packed tokens go where the tests' other files go."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import ntc
from tests.cli.conftest import TEXT
from tests.cli.conftest import model as model


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def compiled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model compiled; tests must not write here."""
    folder = tmp_path_factory.mktemp("compiled") / "tiny"
    ntc.write(ntc.compile(model), folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 9000 characters of the same eleven words."""
    words, pick = TEXT.replace(".", "").split(), random.Random(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(" ".join(pick.choices(words, k=9)) + "." for _ in range(200)), encoding="utf-8")
    return path
