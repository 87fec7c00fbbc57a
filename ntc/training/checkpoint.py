"""The work folder of a run: checkpoints and log, so that the same command goes on where a kill stopped it.

=====================  ==========================================================================================
file                   what
=====================  ==========================================================================================
``NAME.last.pt``       everything that the next step depends on: parameters, optimizer, random state, position, log
``NAME.best.pt``       the parameters with the best validation so far
``NAME.jsonl``         the log, one row per line
``lock``               held while a run works in the folder
=====================  ==========================================================================================

NAME is ``training``, and ``baseline`` for the original network trained alongside. A checkpoint is written beside its place, brought
to the disk and renamed: whenever the kill comes, a whole one is there. It holds tensors and plain data and is read as such; no
code of the file's choice runs. Rows are appended to the log as they come; those behind the last checkpoint are dropped when a run
goes on from it, since it will write them again.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ntc.errors import ArtifactError, ConfigError

__all__ = ["WorkFolder", "check_same_run", "locked", "plain_row", "remove"]

# Options that say when a checkpoint is written; the steps are the same with any.
_FREE = frozenset({"save_every", "save_minutes"})


class WorkFolder:
    """Checkpoints and log of one run.

    Args:
        folder: Made if it is not there.
        name: First part of the names of its files.
        writes: False in all processes but the main one: they write nothing.
    """

    def __init__(self, folder: Path, name: str = "training", *, writes: bool = True) -> None:
        self.folder, self.name, self.writes = folder, name, writes
        self.last, self.best, self.log = (folder / f"{name}.{suffix}" for suffix in ("last.pt", "best.pt", "jsonl"))
        if writes:
            with _writing(folder):
                folder.mkdir(parents=True, exist_ok=True)

    def save(self, path: Path, state: Mapping[str, Any]) -> None:
        """Write a checkpoint of tensors and plain data in the place of the one before.

        Raises:
            ArtifactError: If the disk is full or the folder cannot be written.
        """
        if not self.writes:
            return
        beside = path.with_name(path.name + ".part")
        with _writing(path):
            try:
                with beside.open("wb") as file:
                    torch.save(dict(state), file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(beside, path)
            except RuntimeError as error:  # torch's word for a write that failed
                raise ArtifactError(f"cannot write {path}: {error}") from error
            finally:
                beside.unlink(missing_ok=True)

    def load(self, path: Path) -> dict[str, Any] | None:
        """Read a checkpoint; None if there is none.

        Raises:
            ArtifactError: If it is damaged.
        """
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise ArtifactError(f"the checkpoint {path} is damaged; delete {self.folder} to begin anew") from error
        if not isinstance(state, dict):
            raise ArtifactError(f"{path} is no checkpoint of ours; delete {self.folder} to begin anew")
        return state

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row to the log."""
        if self.writes:
            with _writing(self.log), self.log.open("a", encoding="utf-8") as file:
                file.write(_line(row))

    def rewrite(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Make the log these rows."""
        if self.writes:
            beside = self.log.with_name(self.log.name + ".part")
            with _writing(self.log):
                beside.write_text("".join(map(_line, rows)), encoding="utf-8")
                os.replace(beside, self.log)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a work folder; a process that is killed lets go of it.

    Raises:
        ConfigError: If another run works there.
        ArtifactError: If the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(f"another run works in {folder}: wait for it, or choose another output folder") from error
    try:
        yield
    finally:
        lock.release()
        if not any(folder.glob("*.pt")):  # the run has not begun: what was refused leaves nothing behind
            remove(folder)


def remove(folder: Path) -> None:
    """Delete a work folder, and leave what is not ours."""
    for pattern in ("*.last.pt", "*.best.pt", "*.part", "*.jsonl", "lock"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with a run that was begun otherwise.

    Args:
        saved: ``{"config": {...}, "program": hash, ...}`` of the checkpoint.
        now: Likewise of this run.
        folder: The work folder, for the message.

    Raises:
        ConfigError: Names what differs.
    """
    before, after = dict(saved.get("config", {})), dict(now.get("config", {}))
    differing = [
        f"{name} = {_show(before.get(name))} (now {_show(after.get(name))})"
        for name in dict.fromkeys([*before, *after])
        if name not in _FREE and before.get(name) != after.get(name)
    ]
    differing += [f"another {name}" for name in now if name != "config" and saved.get(name) != now[name]]
    if differing:
        raise ConfigError(
            f"the run in {folder} was begun with {', '.join(differing)}: give the same again to go on with it, or delete that folder "
            "to begin anew"
        )


def _show(value: Any) -> str:
    return "default" if value is None else str(value)


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the log as JSON knows it: what is not finite is null."""
    return {k: plain_row(v) if isinstance(v, Mapping) else _plain(v) for k, v in row.items()}


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(plain_row(row), allow_nan=False) + "\n"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
