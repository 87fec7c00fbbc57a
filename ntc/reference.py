"""Whether a fine-tuned network is the fair reference of a fine-tuned program: whether both have seen the same text.

The histories say it: each fine-tuning leaves a record with the hash of its training text, the options that decide which windows it saw
in which order, and how many tokens these were. Learning rates and losses may differ; those are each one's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ntc.program import PassRecord, Program

__all__ = ["Reference", "compare_training"]

_RECORD = "finetune"

# Which windows of the text a run sees, in which order, and which tensors they move.
_DECISIVE = ("group", "window", "rows", "seed")


@dataclass(frozen=True)
class Reference:
    """What the histories of a program and of a network say of their training.

    Attributes:
        same: Whether both were trained on the same windows of the same text; None if the history of the network has no training.
        contradictions: Why the network is no reference at all: another text, order or group.
        remarks: Where there was more training on one side than on the other, or nothing is known.
    """

    same: bool | None
    contradictions: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"same": self.same, "differences": [*self.contradictions, *self.remarks]}


def compare_training(program: Program, network: Program) -> Reference:
    """Compare how a program and the network that it is held against were fine-tuned.

    Runs are compared from the last one backwards, as far as both go; the tokens of all of them are added up.
    """
    ours, theirs = _runs(program), _runs(network)
    if not theirs:
        return Reference(None, remarks=("its history has no fine-tuning, so what it was trained on is not known",))
    contradictions: list[str] = []
    for mine, its in zip(reversed(ours), reversed(theirs), strict=False):
        if mine.notes["data"]["sha256"] != its.notes["data"]["sha256"]:
            contradictions.append(f"{_text(its)} (the program: {_text(mine)})")
        for name in _DECISIVE:
            here, there = mine.options.get(name), its.options.get(name)
            if None not in (here, there) and here != there:
                contradictions.append(f"{name} = {there} (the program: {here})")
    read = [sum(run.notes["tokens"] for run in runs) for runs in (theirs, ours)]
    remarks = (f"{read[0]:,} tokens (the program: {read[1]:,})",) if read[0] != read[1] else ()
    return Reference(not contradictions and not remarks, tuple(dict.fromkeys(contradictions)), remarks)


def _runs(program: Program) -> list[PassRecord]:
    return [record for record in program.history if record.name == _RECORD]


def _text(run: PassRecord) -> str:
    data = run.notes["data"]
    return f"the text {data['description'].split(',')[0]}, hash {data['sha256'][:8]}"
