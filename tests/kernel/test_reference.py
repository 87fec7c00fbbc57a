"""Whether two histories tell of the same training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ntc.program import PassRecord
from ntc.reference import Reference, compare_training


def run(text: str = "a", tokens: int = 1000, **options: Any) -> PassRecord:
    notes = {"data": {"description": f"{text}.txt, 5,000 tokens", "sha256": text * 64}, "tokens": tokens}
    return PassRecord("finetune", {"group": "all", "window": 24, "rows": 8, "seed": 0, "lr": 1e-3, **options}, sites=1, notes=notes)


def compared(ours: list[PassRecord], theirs: list[PassRecord]) -> Reference:
    compiled = [PassRecord("canonicalize", {}, sites=1), PassRecord("insert-neurons", {}, sites=2)]
    program = SimpleNamespace(history=(*compiled, *ours, PassRecord("quantize", {}, sites=1)))
    return compare_training(program, SimpleNamespace(history=(compiled[0], *theirs)))  # type: ignore[arg-type]


@pytest.mark.parametrize("runs", [1, 2])
def test_the_same_windows(runs: int) -> None:
    """Learning rate and losses are each one's own."""
    assert compared([run()] * runs, [run(lr=1e-4, kl=0.0)] * runs) == Reference(True)


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (run("b"), "the text b.txt, hash bbbbbbbb (the program: the text a.txt, hash aaaaaaaa)"), (run(group="ssa"), "group = ssa (the program: all)"),
        (run(window=12), "window = 12 (the program: 24)"), (run(rows=4), "rows = 4 (the program: 8)"), (run(seed=3), "seed = 3 (the program: 0)"),
    ],
)  # fmt: skip
def test_other_windows_contradict(theirs: PassRecord, said: str) -> None:
    found = compared([run()], [theirs])
    assert (found.same, found.contradictions, found.remarks) == (False, (said,), ())
    assert found.to_json() == {"same": False, "differences": [said]}


def test_more_of_the_same_is_a_remark() -> None:
    assert compared([run()], [run(tokens=900)]) == Reference(False, remarks=("900 tokens (the program: 1,000)",))
    assert compared([run("b", 500), run()], [run()]) == Reference(False, remarks=("1,000 tokens (the program: 1,500)",)), "of all runs"
    assert compared([], [run()]).remarks == ("1,000 tokens (the program: 0)",)


def test_runs_are_compared_from_the_last_one_on() -> None:
    assert compared([run("b"), run()], [run("c"), run()]).contradictions == (
        "the text c.txt, hash cccccccc (the program: the text b.txt, hash bbbbbbbb)",
    )


def test_what_is_not_known_is_said() -> None:
    for ours in ([], [run()]):
        found = compared(ours, [])
        assert (found.same, found.contradictions) == (None, ())
        assert "its history has no fine-tuning" in found.remarks[0]
    assert compared([run()], [run(group=None)]).same, "an older record says less"
