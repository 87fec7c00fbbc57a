"""Golden texts in ``tests/golden``: compared with a diff, written anew with ``--update-golden``.

A module of its own, not part of ``conftest``: a test that needs it could not tell which conftest it would import.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


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
