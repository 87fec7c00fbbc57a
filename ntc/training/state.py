"""Where a run is, what it says on the way, and what comes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ntc.program import Program
from ntc.training.losses import PARTS

__all__ = ["News", "Outcome", "RunState"]


@dataclass(frozen=True)
class News:
    """What a run is doing, for a progress bar.

    Attributes:
        stage: ``load``, ``read``, ``compile``, ``validate``, ``train``, with ``baseline: `` before it for that run; ``resume`` and
            ``warning`` come with a message.
        done: Steps or windows done.
        total: Of how many; 0 while unknown.
        figures: Latest values of the log's columns, and ``seconds_left``.
        message: A sentence to show: that a run goes on where it was, or a warning.
    """

    stage: str
    done: int = 0
    total: int = 0
    figures: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""


@dataclass
class RunState:
    """Where a run is; plain data, all of it in the checkpoint."""

    steps: int | None = None
    step: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    validation_seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    sums: list[float] = field(default_factory=lambda: [0.0] * (1 + len(PARTS)))
    rate_sums: list[float] = field(default_factory=list)
    summed: int = 0
    summed_seconds: float = 0.0
    logged: int = 0
    validated: int = -1
    best_step: int = 0
    best_key: float = math.inf
    worse: int = 0
    warnings: list[str] = field(default_factory=list)
    ended: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        program: The program that the run gives, the best or the last.
        rows: The log.
        steps: Steps taken.
        planned: Steps that the learning rate was planned for.
        tokens: Tokens trained on.
        seconds: Time of the whole run, all sessions, validations included.
        tokens_per_second: Speed of the steps alone.
        ended: Why it ended: ``steps`` (all done), ``time``, or ``patience``.
        best_step: Its step; 0 = as it was.
        before: The row of the first validation.
        after: The row of its validation.
        warnings: One sentence each.
        blockwise_steps: How many of the steps were those that fit every layer by itself.
    """

    program: Program
    rows: tuple[Mapping[str, Any], ...]
    steps: int
    planned: int
    tokens: int
    seconds: float
    tokens_per_second: float
    ended: str
    best_step: int
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    warnings: tuple[str, ...]
    blockwise_steps: int = 0

    def followed_by(self, next_one: Outcome) -> Outcome:
        """This run, layer by layer, and the one end to end that went on from it, as one."""
        shift, tokens = self.steps, self.tokens
        rows = [{**row, "stage": "blockwise"} for row in self.rows]
        rows += [{**row, "step": row["step"] + shift, "tokens": row["tokens"] + tokens} for row in next_one.rows if row["step"]]
        return replace(
            next_one, rows=tuple(rows), steps=shift + next_one.steps, planned=shift + next_one.planned, tokens=tokens + next_one.tokens,
            best_step=shift + next_one.best_step if next_one.best_step else self.best_step, before=self.before,
            warnings=(*self.warnings, *next_one.warnings), blockwise_steps=shift,
        )  # fmt: skip
