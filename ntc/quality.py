r"""Quality of a spiking program against the network that it came from, on the same tokens in the same run.

Perplexity depends on stride and tokenization more than on conversion, so all networks always see the same
non-overlapping windows. Per predicted token, with logits z (network) and z' (program):

- perplexity = exp(mean cross entropy of the next token)
- accuracy = share of predicted tokens with argmax z'_i = the next token
- cosine = mean of cos(z_i, z'_i); likewise of the hidden states that enter the last linear layer, and of every layer
- top1_agreement = share of positions with argmax z_i = argmax z'_i
- kl = mean of KL(softmax z_i || softmax z'_i) in nats

A program that was fine-tuned has seen text that its network has not, and what it gained there is no merit of the
conversion. The fair reference is then *the network fine-tuned on the same tokens* (``tuned``): the gap to it is what the
spikes cost. Figures against it carry the suffix ``_tuned``.

Confidence intervals are percentile bootstraps over the windows (``ntc.bootstrap``), paired: all networks are resampled
together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from ntc.bootstrap import FEWEST_WINDOWS, RESAMPLES, bootstrap_means, percentile_interval
from ntc.errors import ConfigError, DataError
from ntc.observe import Activity, PopulationActivity
from ntc.ops import aten
from ntc.program import Program, check_ids, interpret
from ntc.similarity import LayerComparison, LayerQuality, LogitSummary, compare_logits, next_token, same_channels
from ntc.text import Tokens

__all__ = ["Confidence", "Quality", "evaluate", "perplexity"]

# The last linear layer of an integer program, and what brings its sums to floating point; a cosine knows no scale.
_LINEAR = (aten.linear.default, torch.ops.ntc.integer_linear.default)
_SCALINGS = (torch.ops.ntc.requantize.default, torch.ops.ntc.from_integer.default)

_LARGEST_LOSS = 700.0  # exp of more than this is no float64

# What the program is measured by, alone and against each of the two networks; the rest describes text, spikes and layers.
_FIGURES = (
    "perplexity", "perplexity_ann", "perplexity_tuned", "perplexity_change", "perplexity_change_tuned", "accuracy", "accuracy_ann",
    "accuracy_tuned", "cosine", "cosine_tuned", "cosine_hidden", "top1_agreement", "top1_agreement_tuned", "kl", "kl_tuned",
)  # fmt: skip
_FACTS = (
    "tokens", "window", "steps", "events_per_value", "firing_rate", "neurons", "dead", "saturated", "data", "data_sha256",
)  # fmt: skip


@dataclass(frozen=True)
class Confidence:
    """Percentile bootstrap intervals over the windows.

    Attributes:
        level: Share of the draws inside, 0.95.
        resamples: Number of draws.
        seed: Of the draws.
        windows: Number of windows that were drawn from.
        intervals: (low, high) by the name of the figure, such as ``perplexity_change``.
    """

    level: float
    resamples: int
    seed: int
    windows: int
    intervals: Mapping[str, tuple[float, float]]

    def to_json(self) -> dict[str, Any]:
        """Plain data: the settings, then ``[low, high]`` by figure."""
        settings = {"level": self.level, "resamples": self.resamples, "seed": self.seed, "windows": self.windows}
        return settings | {name: [_finite(end) for end in interval] for name, interval in self.intervals.items()}


@dataclass(frozen=True)
class Quality:
    """Result of ``evaluate``; ``to_json`` has the documented keys. What could not be measured is NaN.

    Attributes:
        perplexity: Of the program.
        perplexity_ann: Of the network it came from, same tokens.
        perplexity_tuned: Of that network fine-tuned on the tokens that the program was fine-tuned on; NaN without one.
        perplexity_change: Relative increase of perplexity over the network: 0.02 is 2 % worse.
        perplexity_change_tuned: Likewise over the fine-tuned network.
        accuracy: Share of predictions of the program whose most likely token is the next one.
        accuracy_ann: Likewise of the network.
        accuracy_tuned: Likewise of the fine-tuned network.
        cosine: Mean cosine similarity of the logits.
        cosine_tuned: Likewise with the fine-tuned network.
        cosine_hidden: Mean cosine similarity of the final hidden states; NaN if the graphs end differently or one is rotated.
        top1_agreement: Share of positions with the same most likely next token.
        top1_agreement_tuned: Likewise with the fine-tuned network.
        kl: Mean KL divergence from the network to the program [nats].
        kl_tuned: Likewise from the fine-tuned network.
        tokens: Tokens read.
        window: Tokens per window.
        steps: T.
        events_per_value: Mean number of spikes per coded value, over all populations.
        firing_rate: Mean number of spikes per neuron and step.
        neurons: Neurons per token.
        dead: Neurons that never fired on these tokens.
        saturated: Neurons that fired at every step.
        data: Description of the tokens.
        data_sha256: Hash of the token ids.
        confidence: Intervals of the figures; None if the windows are too few to say.
        layers: Attention, FFN and block outputs against those of the network (not the fine-tuned one).
        populations: The populations one by one.
    """

    perplexity: float
    perplexity_ann: float
    perplexity_tuned: float
    perplexity_change: float
    perplexity_change_tuned: float
    accuracy: float
    accuracy_ann: float
    accuracy_tuned: float
    cosine: float
    cosine_tuned: float
    cosine_hidden: float
    top1_agreement: float
    top1_agreement_tuned: float
    kl: float
    kl_tuned: float
    tokens: int
    window: int
    steps: int
    events_per_value: float
    firing_rate: float
    neurons: int
    dead: int
    saturated: int
    data: str
    data_sha256: str
    confidence: Confidence | None
    layers: tuple[LayerQuality, ...]
    populations: tuple[PopulationActivity, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data with stable keys (documented in docs/json.md)."""
        result = {k: _finite(getattr(self, k)) for k in (*_FIGURES, *_FACTS)}
        result["confidence"] = self.confidence and self.confidence.to_json()
        result["layers"] = [{key: _finite(value) for key, value in asdict(layer).items()} for layer in self.layers]
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
    program: Program,
    analog: Program,
    tokens: Tokens,
    *,
    tuned: Program | None = None,
    batch: int = 2,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
    progress: Callable[[int, int], None] = _nothing,
) -> Quality:
    """Compare a program with the network that it came from.

    Args:
        program: The spiking program.
        analog: The network, captured.
        tokens: Windows of token ids.
        tuned: If the program was fine-tuned: the network, fine-tuned on the same tokens.
        batch: Windows per run; T times as much memory is needed as for the network alone.
        resamples: Draws of the bootstrap, at least 100.
        level: Share of the draws that a confidence interval holds.
        seed: Of the draws.
        progress: Called with (windows done, windows).

    Raises:
        DataError: If the networks have different vocabularies, the windows do not fit, or ``tuned`` spikes.
        ConfigError: If level or resamples make no interval.
    """
    if not 0 < level < 1 or resamples < 100:
        raise ConfigError(f"a confidence interval has a level in (0, 1) and at least 100 draws, got {level} and {resamples}")
    _check_networks(program, analog, tuned)
    _check_windows(tokens, *(p for p in (program, analog, tuned) if p is not None))
    activity, layers = Activity(operations=False), LayerComparison(program, analog)

    def keep(node: Node, args: tuple[Any, ...], value: Any) -> None:
        layers.keep(node, value)

    def watch(node: Node, args: tuple[Any, ...], value: Any) -> None:
        activity.visit(node, args, value)
        layers.compare(node, value)

    windows: list[dict[str, float]] = []
    hidden = 0.0
    with torch.no_grad():
        for ids in tokens.batches(batch):
            activity.start(ids)
            theirs, their_hidden = _run(analog, ids, keep)
            ours, our_hidden = _run(program, ids, watch)
            others = [theirs] if tuned is None else [theirs, tuned.module(ids)]
            layers.advance(ids.numel())
            hidden += _hidden_cosine(our_hidden, their_hidden) if same_channels(program, analog) else math.nan
            windows += [_window(row, z, *rest) for row, z, *rest in zip(ids, ours, *others, strict=True)]
            progress(len(windows), len(tokens.windows))
    means = {key: torch.tensor([w[key] for w in windows], dtype=torch.float64) for key in windows[0]}
    overall = _figures({key: values.mean() for key, values in means.items()})
    found: dict[str, Any] = {name: float(overall[name]) if name in overall else math.nan for name in _FIGURES}
    found["cosine_hidden"] = hidden / tokens.count
    return Quality(
        **found,
        tokens=tokens.count,
        window=tokens.windows.shape[1],
        steps=program.steps,
        **_spikes(activity.populations.values()),
        data=tokens.description,
        data_sha256=tokens.sha256,
        confidence=_confidence(means, level, resamples, seed),
        layers=layers.result(),
        populations=tuple(activity.populations.values()),
    )


def _check_networks(program: Program, analog: Program, tuned: Program | None) -> None:
    if program.info.vocab_size != analog.info.vocab_size:
        raise DataError(
            f"the program has {program.info.vocab_size} tokens in its vocabulary and {analog.info.source} has "
            f"{analog.info.vocab_size}: they are not the same network"
        )
    if tuned is not None and tuned.info.vocab_size != program.info.vocab_size:
        raise DataError(
            f"the fine-tuned network has {tuned.info.vocab_size} tokens in its vocabulary and the program has "
            f"{program.info.vocab_size}: they do not come from the same network"
        )
    if tuned is not None and tuned.steps:
        raise DataError(
            f"what was given as the fine-tuned network spikes (T = {tuned.steps}): the reference is the original network, fine-tuned "
            "without spikes"
        )


def _check_windows(tokens: Tokens, *programs: Program) -> None:
    for program in programs:
        check_ids(tokens.windows, program.info)
    if tokens.windows.shape[1] < 2:
        raise DataError("a window of one token has no next token to predict: windows need at least 2 tokens")


def _run(program: Program, rows: Tensor, visit: Callable[[Node, tuple[Any, ...], Any], None]) -> tuple[Tensor, Tensor | None]:
    """Logits, and the hidden states that enter the last linear layer."""
    last: Any = next(n for n in program.graph.nodes if n.op == "output").args[0]
    while isinstance(last, Node) and last.target in _SCALINGS:
        last = last.args[0]
    hidden: list[Tensor] = []

    def watch(node: Node, args: tuple[Any, ...], value: Any) -> None:
        if node is last and node.target in _LINEAR:
            hidden.append(args[0].float())
        visit(node, args, value)

    logits = interpret(program, rows, watch)
    return logits, hidden[0] if hidden else None


def _hidden_cosine(ours: Tensor | None, theirs: Tensor | None) -> float:
    """Sum over positions; NaN if the graphs end differently."""
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return math.nan
    return float(functional.cosine_similarity(ours, theirs, dim=-1).double().sum())


def _window(ids: Tensor, ours: Tensor, theirs: Tensor, retuned: Tensor | None = None) -> dict[str, float]:
    """Means over one window, from logits ``[W, V]``.

    One window at a time: the logits of a batch would not stay in the cache.
    """
    z = LogitSummary.of(ours)
    found = next_token(z, ids)
    for suffix, logits in (("_ann", theirs), ("_tuned", retuned)):
        if logits is not None:
            other = LogitSummary.of(logits)
            found |= {key + suffix: value for key, value in next_token(other, ids).items()}
            found |= {key + suffix.removesuffix("_ann"): value for key, value in compare_logits(z, other).items()}
    return found


def _figures(means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The figures that follow from means over windows; all of one shape, that of the text itself or of all draws of a bootstrap."""
    found = {}
    for key, mean in means.items():
        if key.startswith("cross_entropy"):
            found[key.replace("cross_entropy", "perplexity")] = mean.clamp(max=_LARGEST_LOSS).exp()
        else:
            found[key] = mean
    found["perplexity_change"] = found["perplexity"] / found["perplexity_ann"] - 1
    if "perplexity_tuned" in found:
        found["perplexity_change_tuned"] = found["perplexity"] / found["perplexity_tuned"] - 1
    return found


def _confidence(means: Mapping[str, Tensor], level: float, resamples: int, seed: int) -> Confidence | None:
    columns = torch.stack(list(means.values()), dim=1)
    if len(columns) < FEWEST_WINDOWS:
        return None
    draws = bootstrap_means(columns, resamples, seed)
    figures = _figures(dict(zip(means, draws.unbind(1), strict=True)))
    intervals = {name: percentile_interval(figures[name], level) for name in _FIGURES if name in figures}
    return Confidence(level, resamples, seed, len(columns), intervals)


def _spikes(populations: Iterable[PopulationActivity]) -> dict[str, Any]:
    """Sums over the populations."""
    known = tuple(populations)
    values = sum(p.neurons * p.tokens for p in known)
    slots = sum(p.neurons * p.tokens * p.steps for p in known)
    events = sum(float(p.spikes.sum()) for p in known)
    return {
        "events_per_value": events / max(1, values),
        "firing_rate": events / max(1, slots),
        "neurons": sum(p.neurons for p in known),
        "dead": sum(p.dead for p in known),
        "saturated": sum(p.saturated for p in known),
    }


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
    return math.exp(min(total / count, _LARGEST_LOSS))
