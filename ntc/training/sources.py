"""Where training text comes from: files, folders, globs and hub data sets, read piece by piece with Hugging Face ``datasets``.

Everything is read in streaming mode: nothing is copied or decompressed to disk, and no more than a few megabytes of a file
are in memory. A position in a source is a small dict (``datasets`` keeps it), from which reading goes on exactly.
"""

from __future__ import annotations

import glob
import logging
import lzma
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ntc.errors import DataError
from ntc.loading import hub_answers

__all__ = ["Part", "find_parts", "names_of"]

_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet"}
_COMPRESSIONS = (".xz", ".gz")
# Rows per read: lines of a text, documents of the others. A position can be left only between two reads.
_ROWS = {"text": 1000}
_ROWS_OF_DOCUMENTS = 32


@dataclass(frozen=True)
class Part:
    """One file, or one split of a hub data set.

    Attributes:
        kind: ``text`` (rows are lines), ``json``, ``parquet`` or ``hub`` (rows are documents).
        name: What a person calls it.
        place: Path, or name on the hub.
        config: Configuration of a hub data set.
        split: Split of a hub data set.
        size: Bytes of a file, 0 of a hub data set.
        version: When the file was changed [ns], or the commit of a hub data set.
    """

    kind: str
    name: str
    place: str
    config: str | None
    split: str
    size: int
    version: str

    @property
    def content(self) -> tuple[str, ...]:
        """What it is, wherever it is: a run can go on on another machine."""
        return (self.kind, self.name, self.config or "", self.split, self.version if self.kind == "hub" else str(self.size))

    @property
    def identity(self) -> tuple[str, ...]:
        """As ``content``, with the place and the time of change: what was made of it before is still true."""
        return (*self.content, self.place, self.version)

    def pieces(self, field: str, position: Mapping[str, Any] | None = None) -> Iterator[tuple[list[str], dict[str, Any]]]:
        """The text, as (pieces, position behind them): a piece is a line with its line break, or a document.

        Args:
            field: Column of the text; plain text has none.
            position: Go on there.

        Raises:
            DataError: If the source cannot be read, or has no such field, or one that holds no text.
        """
        import datasets

        column = "text" if self.kind == "text" else field
        with _readable(self.name, self.kind), _quiet(datasets):
            rows = self._open(datasets, column)
            if position is not None:
                rows.load_state_dict(dict(position))
            reads = rows.iter(batch_size=_ROWS.get(self.kind, _ROWS_OF_DOCUMENTS))
        while True:
            with _readable(self.name, self.kind), _quiet(datasets):
                batch = next(reads, None)
                if batch is None:
                    return
                behind = rows.state_dict()
            yield self._texts(batch, column), behind

    def _open(self, datasets: Any, column: str) -> Any:
        if self.kind == "hub":
            builder = _hub_builder(datasets, self.place, self.config)
            return _with_column(builder.as_streaming_dataset(split=self.split), column, self.name)
        # Without the escape, brackets in a file name would be read as a pattern.
        options: dict[str, Any] = {"data_files": [glob.escape(self.place)], "split": "train", "streaming": True}
        if self.kind == "text":
            return datasets.load_dataset("text", keep_linebreaks=True, **options)
        rows = _with_column(datasets.load_dataset(self.kind, **options), column, self.name)
        # The other columns of a parquet file need not be read at all.
        return datasets.load_dataset("parquet", columns=[column], **options) if self.kind == "parquet" else rows

    def _texts(self, batch: Mapping[str, list[Any]], column: str) -> list[str]:
        if column not in batch:
            raise _no_field(self.name, column, batch)
        for value in batch[column]:
            if value is not None and not isinstance(value, str):
                raise DataError(f"the field {column!r} of {self.name} holds {type(value).__name__}, not text; name another text_field")
        return [value for value in batch[column] if value is not None]


def find_parts(sources: str | Path | Sequence[str | Path], split: str = "train") -> tuple[Part, ...]:
    """The files and data sets that sources mean, in the order given; those of a folder or glob by name.

    A source is a file (``.txt``, ``.jsonl``, ``.json``, ``.parquet``, these with ``.xz`` or ``.gz``; any other name is plain
    text), a folder (such files in it and below), a glob, or ``name``, ``owner/name``, ``owner/name:config`` on the
    Hugging Face hub. With ``HF_HUB_OFFLINE`` set, a hub data set comes from the cache of ``datasets`` or not at all.

    Raises:
        DataError: If something is missing, a folder or glob has no such file, or the hub cannot be reached.
    """
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    if not given:
        raise DataError("no training text: name at least one file, folder or data set")
    parts = [part for source in given for part in _parts_of(str(source), split)]
    return tuple(dict.fromkeys(parts))  # a file that two globs find is read once


def names_of(parts: Sequence[Part]) -> str:
    """The sources in a few words."""
    return parts[0].name if len(parts) == 1 else f"{parts[0].name} and {len(parts) - 1} more"


def _parts_of(source: str, split: str) -> list[Part]:
    path = Path(source).expanduser()
    if path.is_file():
        return [_file_part(path)]
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and _format_of(p) and not _hidden(p.relative_to(path))]
        if not files:
            raise DataError(f"the folder {source} holds no training text: no .txt, .jsonl, .json or .parquet file, plain, .xz or .gz")
        return [_file_part(p) for p in files]
    if glob.has_magic(source):
        found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        if not any(p.is_file() for p in found):
            raise DataError(f"no file matches {source}")
        return [_file_part(p) for p in found if p.is_file()]
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or _format_of(path) or path.suffix in _COMPRESSIONS:
        raise DataError(f"there is no file or folder {source}")
    return [_hub_part(source, split)]


def _format_of(path: Path) -> str | None:
    name = path.with_suffix("") if path.suffix in _COMPRESSIONS else path
    return _FORMATS.get(name.suffix)


def _hidden(path: Path) -> bool:
    return any(name.startswith(".") for name in path.parts)


def _file_part(path: Path) -> Part:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    # Characters that mean something else in the addresses by which ``datasets`` names compressed files, or any.
    for character in ("::", *("[]\\" if path.suffix in _COMPRESSIONS else "")):
        if character in path.name:
            raise DataError(f"{path.name} holds '{character}' in its name, by which it cannot be read: rename the file")
    return Part(_format_of(path) or "text", path.name, str(path.absolute()), None, "", status.st_size, str(status.st_mtime_ns))


def _hub_part(source: str, split: str) -> Part:
    import datasets

    name, _, config = source.partition(":")
    with _quiet(datasets):
        builder = _hub_builder(datasets, name, config or None)
    splits = list(builder.info.splits or ())
    if splits and split not in splits:
        raise DataError(f"the data set {source} has no split {split!r}; it has {', '.join(map(repr, splits))}")
    return Part("hub", source, name, config or None, split, 0, str(builder.hash))


def _hub_builder(datasets: Any, name: str, config: str | None) -> Any:
    from huggingface_hub import constants

    offline = not hub_answers(name, "dataset")
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline  # else the client retries for half a minute, to say that there is no network
    try:
        return datasets.load_dataset_builder(name, config)
    except Exception as error:
        if isinstance(error, OSError) and offline:
            raise DataError(
                f"there is no file or folder {name}, and no data set of that name in the cache; the hub cannot be reached: "
                "connect to a network (without HF_HUB_OFFLINE), or give a local file"
            ) from error
        raise DataError(f"cannot find the data set {name} on disk or on the hub: {_first_line(error)}") from error
    finally:
        constants.HF_HUB_OFFLINE = before


def _with_column(rows: Any, column: str, name: str) -> Any:
    if rows.features is not None and column not in rows.features:
        raise _no_field(name, column, rows.features)
    return rows


def _no_field(name: str, column: str, columns: Mapping[str, Any]) -> DataError:
    there = ", ".join(map(repr, columns)) or "none"
    return DataError(f"{name} has no field {column!r} (it has {there}); name the one that holds the text as text_field")


@contextmanager
def _readable(name: str, kind: str) -> Iterator[None]:
    """Say in one sentence what the reading libraries raise for files that are not what their name says."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is no UTF-8 text: {error}") from error
    except (OSError, ValueError, EOFError, lzma.LZMAError, zlib.error) as error:  # those of Arrow are ValueErrors
        what = {"text": "text", "hub": "a data set"}.get(kind, kind)
        raise DataError(f"{name} cannot be read as {what}: {_first_line(error)}") from error


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Keep the warnings of ``datasets`` out of our output; what goes wrong is raised as well."""
    log = datasets.logging
    level = log.get_verbosity()
    log.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        log.set_verbosity(level)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
