"""Tables in terminals of any width: nothing that a table says is cropped."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from ntc.cli.output import table

KINDS = ("projection", "attention (queries, keys, values)", "norm")
NUMBERS = ("1,234.567", "12.345", "12.3 x as much", "12,345.678", "10/11", "-3.4 %")


def kinds() -> Table:
    rows = table("kind", ">network", ">spiking", ">saved", ">memory: network", ">T", ">saved with memory")
    for kind in KINDS:
        rows.add_row(kind, *NUMBERS)
    return rows


def shown(rows: Table, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(rows)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def letters(lines: list[str]) -> list[str]:
    return sorted("".join(lines).replace(" ", ""))


@pytest.mark.parametrize("width", [120, 100, 80, 60, 40, 30])
def test_nothing_is_cropped(width: int) -> None:
    lines = shown(kinds(), width)
    assert all(len(line) <= width for line in lines)
    assert letters(lines) == letters(shown(kinds(), 200))


def test_where_there_is_room_a_row_is_a_line() -> None:
    lines = shown(kinds(), 120)
    assert len(lines) == 1 + len(KINDS)
    assert lines[0].split("  ")[0] == "kind" and lines[0].rstrip().endswith("saved with memory")


def test_headers_break_before_names_and_names_before_numbers() -> None:
    lines = [" ".join(line.split()) for line in shown(kinds(), 90)]
    assert lines.index("projection " + " ".join(NUMBERS)) > 1, "headers take several lines"
    assert sum(" ".join(NUMBERS) in line for line in lines) == len(KINDS), "numbers stay whole, on one line"
    lines = [" ".join(line.split()) for line in shown(kinds(), 76)]
    assert sum(" ".join(NUMBERS) in line for line in lines) == len(KINDS)
    assert "keys, values)" in lines, "the name is broken at a space"


def test_long_names_without_spaces_are_folded_last() -> None:
    def rows() -> Table:
        made = table("node", "what", ">T")
        made.add_row("h_0_attn_attention_softmax_exp_spikes", "a population of neurons", "10/11")
        return made

    lines = shown(rows(), 60)
    assert lines[1].startswith("h_0_attn_attention_softmax_exp_spikes ") and lines[1].rstrip().endswith("10/11")
    lines = shown(rows(), 34)
    assert any(line.rstrip().endswith("10/11") for line in lines) and letters(lines) == letters(shown(rows(), 200))
