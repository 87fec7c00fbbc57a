r"""Quality of a spiking program against the network that it came from, on the same tokens in the same run.

Perplexity depends on stride and tokenization more than on conversion, so both networks always see the same
non-overlapping windows. Per predicted token, with logits z (network) and z' (program):

- perplexity = exp(mean cross entropy of the next token)
- cosine = mean of cos(z_i, z'_i); likewise of the hidden states that enter the last linear layer
- top1_agreement = share of positions with argmax z_i = argmax z'_i
- kl = mean of KL(softmax z_i || softmax z'_i) in nats
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from ntc.errors import DataError
from ntc.observe import Activity, PopulationActivity
from ntc.ops import aten
from ntc.program import Program, check_ids, interpret
from ntc.text import Tokens

__all__ = ["Quality", "evaluate", "perplexity"]


@dataclass(frozen=True)
class Quality:
    """Result of ``evaluate``; ``to_json`` has the documented keys.

    Attributes:
        perplexity: Of the program.
        perplexity_ann: Of the network it came from, same tokens.
        cosine: Mean cosine similarity of the logits.
        cosine_hidden: Mean cosine similarity of the final hidden states; NaN if the graphs end differently.
        top1_agreement: Share of positions with the same most likely next token.
        kl: Mean KL divergence from the network to the program [nats].
        tokens: Tokens read.
        window: Tokens per window.
        steps: T.
        events_per_value: Mean number of spikes per coded value, over all populations.
        firing_rate: Mean number of spikes per neuron and step.
        neurons: Neurons per token.
        dead: Neurons that never fired on these tokens.
        saturated: Neurons that fired at every step.
        populations: The populations one by one.
        data: Description of the tokens.
        data_sha256: Hash of the token ids.
    """

    perplexity: float
    perplexity_ann: float
    cosine: float
    cosine_hidden: float
    top1_agreement: float
    kl: float
    tokens: int
    window: int
    steps: int
    events_per_value: float
    firing_rate: float
    neurons: int
    dead: int
    saturated: int
    populations: tuple[PopulationActivity, ...]
    data: str
    data_sha256: str

    @property
    def perplexity_change(self) -> float:
        """Relative increase of perplexity over the network: 0.02 is 2 % worse."""
        return self.perplexity / self.perplexity_ann - 1

    def to_json(self) -> dict[str, Any]:
        """Plain data with stable keys (documented in docs/json.md)."""
        keys = (
            "perplexity", "perplexity_ann", "perplexity_change", "cosine", "cosine_hidden", "top1_agreement", "kl", "tokens",
            "window", "steps", "events_per_value", "firing_rate", "neurons", "dead", "saturated", "data", "data_sha256",
        )  # fmt: skip
        result = {k: _finite(getattr(self, k)) for k in keys}
        result["populations"] = [
            {
                "name": p.name, "module": p.module, "role": p.role, "neurons": p.neurons, "steps": p.steps,
                "events_per_value": p.events_per_value, "firing_rate": p.firing_rate, "dead": p.dead, "saturated": p.saturated,
            }
            for p in self.populations
        ]  # fmt: skip
        return result


def _finite(value: Any) -> Any:
    """JSON has no NaN: what could not be measured is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _nothing(done: int, total: int) -> None:
    return None


def evaluate(
    program: Program, analog: Program, tokens: Tokens, *, batch: int = 4, progress: Callable[[int, int], None] = _nothing
) -> Quality:
    """Compare a program with the network that it came from.

    Args:
        program: The spiking program.
        analog: The network, captured.
        tokens: Windows of token ids.
        batch: Windows per run; T times as much memory is needed as for the network alone.
        progress: Called with (windows done, windows).

    Raises:
        DataError: If the two have different vocabularies, or the windows do not fit.
    """
    if program.info.vocab_size != analog.info.vocab_size:
        raise DataError(
            f"the program has {program.info.vocab_size} tokens in its vocabulary and {analog.info.source} has "
            f"{analog.info.vocab_size}: they are not the same network"
        )
    _check_windows(tokens, program, analog)
    activity = Activity(operations=False)
    sums = dict.fromkeys(("ce", "ce_ann", "cosine", "hidden", "top1", "kl"), 0.0)
    predictions = positions = done = 0
    with torch.no_grad():
        for rows in tokens.batches(batch):
            activity.start(rows)
            ours, our_hidden = _run(program, rows, activity)
            theirs, their_hidden = _run(analog, rows, None)
            _accumulate(sums, ours, theirs, rows)
            if our_hidden is not None and their_hidden is not None and our_hidden.shape == their_hidden.shape:
                sums["hidden"] += float(functional.cosine_similarity(our_hidden, their_hidden, dim=-1).double().sum())
            else:
                sums["hidden"] = math.nan
            predictions += rows[:, 1:].numel()
            positions += rows.numel()
            done += len(rows)
            progress(done, len(tokens.windows))
    populations = tuple(activity.populations.values())
    values = sum(p.neurons * p.tokens for p in populations)
    slots = sum(p.neurons * p.tokens * p.steps for p in populations)
    events = sum(float(p.spikes.sum()) for p in populations)
    return Quality(
        perplexity=math.exp(min(sums["ce"] / predictions, 700.0)),
        perplexity_ann=math.exp(min(sums["ce_ann"] / predictions, 700.0)),
        cosine=sums["cosine"] / positions,
        cosine_hidden=sums["hidden"] / positions,
        top1_agreement=sums["top1"] / positions,
        kl=sums["kl"] / positions,
        tokens=tokens.count,
        window=tokens.windows.shape[1],
        steps=program.steps,
        events_per_value=events / max(1, values),
        firing_rate=events / max(1, slots),
        neurons=sum(p.neurons for p in populations),
        dead=sum(p.dead for p in populations),
        saturated=sum(p.saturated for p in populations),
        populations=populations,
        data=tokens.description,
        data_sha256=tokens.sha256,
    )


def _check_windows(tokens: Tokens, *programs: Program) -> None:
    for program in programs:
        check_ids(tokens.windows, program.info)
    if tokens.windows.shape[1] < 2:
        raise DataError("a window of one token has no next token to predict: windows need at least 2 tokens")


def _run(program: Program, rows: Tensor, activity: Activity | None) -> tuple[Tensor, Tensor | None]:
    """Logits, and the hidden states that enter the last linear layer."""
    output = next(n for n in program.graph.nodes if n.op == "output").args[0]
    last = output if isinstance(output, Node) and output.target is aten.linear.default else None
    hidden: list[Tensor] = []

    def visit(node: Node, args: tuple[Any, ...], value: Any) -> None:
        if node is last:
            hidden.append(args[0])
        if activity is not None:
            activity.visit(node, args, value)

    logits = interpret(program, rows, visit)
    return logits, hidden[0] if hidden else None


def _accumulate(sums: dict[str, float], ours: Tensor, theirs: Tensor, rows: Tensor) -> None:
    vocabulary, targets = ours.shape[-1], rows[:, 1:].reshape(-1)
    log_p, log_q = theirs.float().log_softmax(-1), ours.float().log_softmax(-1)
    for key, value in (("ce", log_q), ("ce_ann", log_p)):
        sums[key] += float(functional.nll_loss(value[:, :-1].reshape(-1, vocabulary), targets, reduction="sum").double())
    sums["cosine"] += float(functional.cosine_similarity(ours, theirs, dim=-1).double().sum())
    sums["top1"] += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
    sums["kl"] += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())


def perplexity(program: Program, tokens: Tokens, batch: int = 4) -> float:
    """Perplexity of one program alone: ``exp(mean next-token cross entropy)`` over the windows."""
    _check_windows(tokens, program)
    total = count = 0.0
    with torch.no_grad():
        for rows in tokens.batches(batch):
            logits = program(rows)[:, :-1]
            targets = rows[:, 1:].reshape(-1)
            total += float(functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, reduction="sum").double())
            count += targets.numel()
    return math.exp(min(total / count, 700.0))
