"""How errors look."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import run_ntc
from tests.cli.refusals import refused


def test_errors_under_json(tmp_path: Path) -> None:
    for arguments in (["compile", tmp_path / "none", "-o", tmp_path / "out"], ["compile", "--nothing"], ["energy", tmp_path / "none"]):
        ran = run_ntc(*arguments, "--json")
        assert ran.code == 2
        assert list(ran.json) == ["error"]
        assert ran.err.startswith("error: ")


def test_verbose_shows_the_traceback(tmp_path: Path) -> None:
    ran = run_ntc("energy", tmp_path / "none", "-v")
    assert ran.code == 2
    assert "Traceback" in ran.err
    assert "error: there is no folder" in ran.err


def test_our_own_mistakes_are_owned(monkeypatch: pytest.MonkeyPatch) -> None:
    from ntc import registry

    def broken(kind: str) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(registry, "listed", broken)
    refused("passes", says="this is a mistake in ntc: ZeroDivisionError: division by zero; please report it", code=3)
