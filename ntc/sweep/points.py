"""``points.jsonl``: the plan in the first line, then a point per line as it was measured."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ntc.errors import ArtifactError, ConfigError
from ntc.sweep.plan import Setting

__all__ = ["POINTS", "line_of", "points_in"]

POINTS = "points.jsonl"


def line_of(setting: Setting, figures: Mapping[str, Any]) -> str:
    """A point as a line of the file."""
    return json.dumps({"setting": asdict(setting), **figures}) + "\n"


def points_in(folder: Path, identity: Mapping[str, Any], overwrite: bool) -> dict[str, dict[str, Any]]:
    """Points that are there already, by the key of their setting; makes the folder ready for more.

    A last line that was cut off by a kill is forgotten. Points that failed are tried again.
    """
    path, identity = folder / POINTS, json.loads(json.dumps(identity))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not path.is_file():
            raise ArtifactError(f"the folder {folder} holds something else than a sweep: choose another one")
        lines = [] if overwrite or not path.is_file() else path.read_text(encoding="utf-8").splitlines()
        rows = list(_rows(lines))
        if rows and rows[0].get("plan") != identity:
            before = rows[0].get("plan") or {}
            other = ", ".join(name for name in identity if before.get(name) != identity[name])
            raise ConfigError(f"{folder} has points of a sweep with other {other}: choose another folder, or give --overwrite")
        kept = [row for row in rows[1:] if "error" not in row]
        beside = path.with_name(path.name + ".part")
        beside.write_text("".join(json.dumps(row) + "\n" for row in ({"plan": identity}, *kept)), encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error.strerror or error}") from error
    return {Setting(**row["setting"]).key: {k: v for k, v in row.items() if k != "setting"} for row in kept}


def _rows(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return
