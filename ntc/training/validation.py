"""What a program is worth while it is trained: perplexity, firing rates, dead and saturated neurons on a validation text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ntc.observe import Activity, PopulationActivity
from ntc.program import Program, check_ids, interpret
from ntc.text import Tokens
from ntc.training.losses import ATTENTION_ROLES

__all__ = ["Validation", "validate"]

_LARGEST_LOSS = 700.0  # exp of more than this is no float64


@dataclass(frozen=True)
class Validation:
    """Result of ``validate``.

    Attributes:
        perplexity: ``exp(mean cross entropy of the next token)``.
        populations: What each population did.
    """

    perplexity: float
    populations: tuple[PopulationActivity, ...]

    @property
    def firing_rate(self) -> float:
        """Spikes per neuron and step over all populations; 0 if nothing spikes."""
        slots = sum(p.neurons * p.steps * p.tokens for p in self.populations)
        return sum(float(p.spikes.sum()) for p in self.populations) / slots if slots else 0.0

    @property
    def attention_rate(self) -> float:
        """Mean firing rate of the populations of Q, K and V, as ``ntc.training.losses.attention_rate``."""
        chosen = [p for p in self.populations if p.role in ATTENTION_ROLES] or list(self.populations)
        return sum(p.firing_rate for p in chosen) / len(chosen) if chosen else 0.0

    def row(self, label_of: Mapping[str, str]) -> dict[str, Any]:
        """Columns of the log; populations by their short names, shares of dead and saturated neurons where there are any."""
        def shares(number: Callable[[PopulationActivity], int]) -> dict[str, float]:
            return {label_of[p.name]: number(p) / p.neurons for p in self.populations if number(p)}

        row: dict[str, Any] = {"valid_perplexity": self.perplexity}
        if self.populations:
            row |= {
                "firing_rate": self.firing_rate, "attention_rate": self.attention_rate,
                "rates": {label_of[p.name]: p.firing_rate for p in self.populations},
                "dead": shares(lambda p: p.dead), "saturated": shares(lambda p: p.saturated),
            }  # fmt: skip
        return row


def _nothing(done: int, total: int) -> None:
    return None


def validate(program: Program, tokens: Tokens, *, batch: int = 4, progress: Callable[[int, int], None] = _nothing) -> Validation:
    """Run a program on a text, with its exact kernels.

    Args:
        program: Spiking or analog.
        tokens: Windows of the text.
        batch: Windows per run.
        progress: Called with (windows done, windows).
    """
    check_ids(tokens.windows, program.info)
    activity = Activity(operations=False)
    total, count, done = 0.0, 0, 0
    with torch.no_grad():
        for rows in tokens.batches(batch):
            activity.start(rows)
            logits = interpret(program, rows, activity.visit)[:, :-1]
            targets = rows[:, 1:].reshape(-1)
            total += float(functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, reduction="sum").double())
            count += targets.numel()
            done += len(rows)
            progress(done, len(tokens.windows))
    mean = total / count
    return Validation(math.exp(min(mean, _LARGEST_LOSS)) if math.isfinite(mean) else math.inf, tuple(activity.populations.values()))
