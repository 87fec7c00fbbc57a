"""Read JSON that a stranger wrote: no duplicated key, no NaN, no depth and no size that could hurt, one sentence per error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ntc.errors import ArtifactError

__all__ = ["one_line", "parse", "read_text"]

MOST_BYTES = 1 << 28
"""Of a JSON file. GPT-2 small has 1 MB, its XL sibling 4."""
MOST_DEPTH = 32


def one_line(text: object, most: int = 200) -> str:
    """What a file says, fit for a message: one line, no half characters, not longer than ``most``."""
    said = " ".join(str(text).encode("utf-8", "backslashreplace").decode().split())
    said = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in said)
    return said if len(said) <= most else said[: most - 3] + "..."


def read_text(file: Path) -> bytes:
    """The bytes of a JSON file.

    Raises:
        ArtifactError: If it is not there, is no ordinary file, or is too large.
    """
    try:
        if not file.is_file():
            reason = "it is no file" if file.exists() else "No such file or directory"
            raise ArtifactError(f"there is no netlist at {file}: {reason}")
        if (size := file.stat().st_size) > MOST_BYTES:
            raise ArtifactError(f"{file.name} has {size:,} bytes, and no netlist has more than {MOST_BYTES:,}")
        return file.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise ArtifactError(f"there is no netlist at {one_line(file)}: {getattr(error, 'strerror', None) or error}") from error


def parse(text: bytes, name: str) -> Any:
    """The value of a JSON text.

    Args:
        text: UTF-8.
        name: Of the file, for messages.

    Raises:
        ArtifactError: One sentence with the first thing that is wrong.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refuse)
    except RecursionError as error:
        raise ArtifactError(f"{name} is nested deeper than {MOST_DEPTH} levels") from error
    except ValueError as error:
        raise ArtifactError(f"{name} is no JSON: {one_line(error)}") from error
    _check_depth(value, name)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"an object has the key {double!r} twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _check_depth(value: Any, name: str) -> None:
    level, depth = [value], 0
    while level:
        if depth > MOST_DEPTH:
            raise ArtifactError(f"{name} is nested deeper than {MOST_DEPTH} levels")
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        depth += 1
