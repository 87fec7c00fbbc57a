"""What a command that fails has to look like: one clear sentence, an exit code, nothing half-written."""

from __future__ import annotations

import re
from pathlib import Path

from tests.cli.conftest import run_ntc


def refused(*arguments: object, says: str, code: int = 2) -> str:
    """Run a command that must fail well; returns its sentence."""
    ran = run_ntc(*arguments)
    assert ran.code == code, (ran.code, ran.out, ran.err)
    assert ran.out == ""
    return sentence(ran.err, says)


def sentence(err: str, says: str) -> str:
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err  # one sentence, no traceback, no log of a library
    assert lines[0].startswith("error: ")
    assert re.search(says, lines[0]), err
    return lines[0]


def nothing_left(folder: Path, *expected: str) -> None:
    """No temporary folder beside, and only what was there."""
    assert sorted(p.name for p in folder.iterdir()) == sorted(expected)
