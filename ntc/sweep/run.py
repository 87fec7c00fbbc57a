"""Runs a sweep: what is there already, what is left, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ntc.errors import ArtifactError, ConfigError
from ntc.folders import is_artifact
from ntc.registry import find_pass, recipe
from ntc.sweep.bench import measure_all
from ntc.sweep.front import result_of, write_result
from ntc.sweep.plan import COSTS, Plan, Setting
from ntc.sweep.points import POINTS, line_of, points_in
from ntc.text import read_text

__all__ = ["sweep"]

Progress = Callable[[str, int, int], None]


def sweep(
    plan: Plan,
    settings: Sequence[Setting],
    folder: Path | str,
    *,
    cost: str = "total",
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress = lambda label, done, total: None,
) -> dict[str, Any]:
    """Measure every setting and write ``points.jsonl``, ``sweep.json``, ``front.png`` and ``front.svg``.

    Args:
        plan: What they share.
        settings: At least one (see ``grid``).
        folder: Where to; with the points of an earlier sweep of the same plan, which then are not measured again.
        cost: ``total`` or ``attention``: the energy that decides.
        workers: Processes [default: as many as processors, settings and memory allow].
        overwrite: Forget the points of an earlier sweep.
        progress: Called with (label, done, total).

    Returns:
        What ``sweep.json`` holds (keys: docs/json.md).

    Raises:
        ConfigError: For a wrong setting, before any work; or if the folder has points of another plan.
        ArtifactError: If the folder holds something else, cannot be written, or a folder to measure is no compiled one.
        DataError: If the text cannot be read.
        NtcError: If no setting at all could be measured; the reason of the first.
    """
    folder = Path(folder)
    if cost not in COSTS:
        raise ConfigError(f"the cost of a sweep is {' or '.join(COSTS)}, got {cost!r}")
    if not settings:
        raise ConfigError("there is no setting to measure")
    if workers is not None and workers < 1:
        raise ConfigError(f"a sweep needs at least one process, got {workers}")
    for setting in settings:
        _check(plan, setting)
    for text in filter(None, (plan.data, plan.calibration)):
        read_text(text)
    found = points_in(folder, plan.identity(), overwrite)
    left = [s for s in settings if s.key not in found]
    progress("settings", len(settings) - len(left), len(settings))
    try:
        with (folder / POINTS).open("a", encoding="utf-8") as file:
            for setting, figures in measure_all(plan, left, workers):
                found[setting.key] = figures
                file.write(line_of(setting, figures))
                file.flush()
                progress("settings", sum(s.key in found for s in settings), len(settings))
        result = result_of(plan, settings, found, cost)
        files = write_result(folder, result)
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error.strerror or error}") from error
    return {**result, "folder": str(folder), "files": files}


def _check(plan: Plan, setting: Setting) -> None:
    """Refuse a wrong setting before any work."""
    if not setting.folder:
        recipe(setting.recipe).build(plan.of(setting), find_pass)
    elif not is_artifact(Path(setting.folder)):
        raise ArtifactError(f"{setting.folder} is no compiled folder: give one that ntc compile has written")
