"""What the commands show: one JSON object, or tables; progress and warnings on standard error."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import typer
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.logging import RichHandler
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.style import StyleType
from rich.table import Table
from rich.text import Text

__all__ = [
    "JsonFlag", "Output", "VerboseFlag", "count", "data_size", "duration", "energy", "files_in", "names", "percent", "session", "table",
]  # fmt: skip

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object (keys: docs/json.md) and nothing else.")]
VerboseFlag = Annotated[
    int, typer.Option("--verbose", "-v", count=True, help="Say more on standard error: each pass, and where an error came from.")
]

Report = Callable[[str, int, int], None]


@dataclass
class Output:
    """Where a command puts its result and its news.

    Attributes:
        as_json: Whether ``--json`` was given.
        verbose: How often ``-v`` was given.
        console: Standard output.
        errors: Standard error.
        stdout: The stream of ``console``.
    """

    as_json: bool
    verbose: int
    console: Console
    errors: Console
    stdout: TextIO

    def result(self, data: Mapping[str, Any], show: Callable[[Console], None]) -> None:
        """Print the result: the data as JSON, or what ``show`` makes of it."""
        if self.as_json:
            self.stdout.write(json.dumps(data, indent=1, allow_nan=False) + "\n")
            self.stdout.flush()
        else:
            show(self.console)

    def warn(self, message: str) -> None:
        """One sentence on standard error."""
        self.errors.print(Text("warning: ", "yellow").append(message, "default"), soft_wrap=True)

    @contextmanager
    def progress(self) -> Iterator[Report]:
        """A bar on standard error, if that is a terminal: call what it gives with (label, done, total)."""
        if not self.errors.is_terminal or self.verbose:
            yield lambda label, done, total: None
            return
        columns = (
            SpinnerColumn(style="cyan"), TextColumn("{task.description}"), BarColumn(32), TextColumn("{task.fields[number]}"),
            TimeElapsedColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.errors, transient=True) as bar:
            at, task = "", bar.add_task("starting".ljust(20), total=None, number="")

            def report(label: str, done: int, total: int) -> None:
                nonlocal at, task
                if label == at:
                    bar.update(task, completed=done, total=total, number=f"{done}/{total}")
                elif label != "done":  # a new stage; how far it is shows with its second call
                    bar.remove_task(task)
                    at, task = label, bar.add_task(label.ljust(20), total=None, number="")

            yield report


@contextmanager
def session(as_json: bool, verbose: int) -> Iterator[Output]:
    """Set up the streams and the log for one command; with ``--json`` nothing but the result reaches standard output."""
    stdout = sys.stdout
    errors = Console(stderr=True, highlight=False)
    console = Console(file=stdout, highlight=False)
    handler = RichHandler(console=errors, show_time=False, show_path=False, show_level=False, markup=False)
    log = logging.getLogger("ntc")
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel({0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG))
    log.propagate = False
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr) if as_json else _nothing():
            if not verbose:
                warnings.simplefilter("ignore")
            yield Output(as_json, verbose, console, errors, stdout)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def names(values: Sequence[str] | None) -> list[str]:
    """The names in options such as ``--emit onnx,netlist --emit energy``, each once."""
    return list(dict.fromkeys(part.strip() for value in values or () for part in value.split(",") if part.strip()))


_SHORTEST = 8
"""Characters that a column of text keeps in a terminal that is too narrow for its words."""


class _Table(Table):
    """A table whose texts are shown as they are: a shape such as [4, B, L] is no markup.

    Where it is wider than the terminal, headers of numbers are broken at their spaces first, then texts at theirs; nothing is cropped.
    """

    def add_row(self, *cells: RenderableType | None, style: StyleType | None = None, end_section: bool = False) -> None:
        super().add_row(*(Text(c) if isinstance(c, str) else c for c in cells), style=style, end_section=end_section)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self._fit(console, options)
        yield from super().__rich_console__(console, options)

    def _fit(self, console: Console, options: ConsoleOptions) -> None:
        """Give each column a width, if they do not all have the one that they want."""
        def measured(texts: Iterable[RenderableType]) -> tuple[int, int]:
            """The longest word, and the longest text."""
            found = [Measurement.get(console, options.update_width(1 << 12), text) for text in texts]
            return max((m.minimum for m in found), default=0), max((m.maximum for m in found), default=0)

        numbers = [c.justify == "right" for c in self.columns]
        headers = [measured([c.header]) for c in self.columns]
        cells = [measured(c.cells) for c in self.columns]
        wanted = [max(h[1], c[1]) for h, c in zip(headers, cells, strict=True)]
        gaps = len(wanted) - 1
        if sum(wanted) + 2 * gaps <= options.max_width:
            return
        self.padding = (0, 1, 0, 0)
        room = options.max_width - gaps
        words = [max(h[0], c[0]) for h, c in zip(headers, cells, strict=True)]
        least = [max(h[0], c[1]) if n else w for n, h, c, w in zip(numbers, headers, cells, words, strict=True)]
        folded = [width if n else min(width, _SHORTEST) for n, width in zip(numbers, least, strict=True)]
        for kinds, floor in ((True, least), (False, least), (False, folded), (True, [1] * len(least))):
            chosen = [i for i, n in enumerate(numbers) if n is kinds]
            while sum(wanted) > room and (wide := [i for i in chosen if wanted[i] > floor[i]]):
                wanted[max(wide, key=lambda i: wanted[i])] -= 1
        for column, width in zip(self.columns, wanted, strict=True):
            column.width, column.no_wrap = width, False


def table(*columns: str) -> Table:
    """A table without lines; columns whose name starts with ``>`` are numbers, aligned to the right."""
    result = _Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for number, column in enumerate(columns):
        side: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        result.add_column(Text(column.removeprefix(">")), justify=side, no_wrap=side == "right" or number == 0, overflow="fold")
    return result


def files_in(folder: Path) -> list[dict[str, Any]]:
    """Every file below a folder with its size."""
    return [{"name": str(p.relative_to(folder)), "bytes": p.stat().st_size} for p in sorted(folder.rglob("*")) if p.is_file()]


def count(value: float) -> str:
    """A whole number with commas."""
    return f"{value:,.0f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as text; ``-`` if there is none."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def duration(seconds: float) -> str:
    """A time as text."""
    return f"{seconds:.1f} s" if seconds < 100 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def energy(picojoules: float | None) -> str:
    """An energy as text with a fitting unit."""
    if picojoules is None:
        return "-"
    for unit, size in (("mJ", 1e9), ("µJ", 1e6), ("nJ", 1e3)):
        if picojoules >= size:
            return f"{picojoules / size:,.2f} {unit}"
    return f"{picojoules:,.2f} pJ"


def data_size(number: float) -> str:
    """A number of bytes as text."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f} B"
