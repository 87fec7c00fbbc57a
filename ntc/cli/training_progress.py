"""The bar of a fine-tuning run: loss, perplexity, firing rate, speed and time left, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from ntc.cli.output import Output, count, duration

if TYPE_CHECKING:
    from ntc.training.state import News

__all__ = ["training_progress"]


@contextmanager
def training_progress(output: Output, *, silent: bool = False) -> Iterator[Callable[[News], None]]:
    """What shows the news of a run: messages always, the bar on a terminal.

    Args:
        output: Of the command.
        silent: Show nothing: this process is not the first one.
    """

    def say(news: News) -> None:
        if news.stage == "warning":
            output.warn(news.message)
        elif news.stage == "resume":
            output.errors.print(Text(news.message), soft_wrap=True)

    if silent:
        yield lambda news: None
        return
    if not output.errors.is_terminal or output.verbose:
        yield say
        return
    columns = (
        SpinnerColumn(style="cyan"), TextColumn("{task.description}"), BarColumn(10), TextColumn("{task.fields[number]}"),
        TextColumn("{task.fields[figures]}", style="dim"),
    )  # fmt: skip
    with Progress(*columns, console=output.errors, transient=True) as bar:
        task = bar.add_task("starting", total=None, number="", figures="")

        def show(news: News) -> None:
            if news.stage in ("warning", "resume"):
                say(news)
                return
            number = f"{news.done}/{news.total}" if news.total else count(news.done) if news.done else ""
            label = f"{news.stage} {news.message}".strip()
            bar.update(
                task, description=label, completed=news.done, total=news.total or None, number=number,
                figures=_figures(dict(news.figures)) if news.stage.endswith("train") else "",
            )  # fmt: skip

        yield show


def _figures(figures: dict[str, Any]) -> str:
    """The latest values in one line."""
    rates = (figures.get("rates") or {}).values()
    shown = (
        ("loss {:.3f}", figures.get("loss")), ("perplexity {:.1f}", figures.get("valid_perplexity")),
        ("rate {:.3f}", sum(rates) / len(rates) if rates else None), ("{} left", _time(figures.get("seconds_left"))),
        ("{:,.0f} tokens/s", figures.get("tokens_per_second")),
    )  # fmt: skip
    return "  ".join(form.format(value) for form, value in shown if value is not None)  # on a narrow terminal the end is cut off


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else duration(seconds)
