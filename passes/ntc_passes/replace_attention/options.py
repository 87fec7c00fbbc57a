"""The options of replace-attention, and the neurons that they ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from ntc.meta import NeuronSpec

__all__ = ["Normalizer", "Options", "check_percentile", "check_steps", "check_switch"]

Normalizer = Literal["position", "learned-position", "leak", "channel-leak", "rms", "leak-rms", "row-sum"]


@dataclass(frozen=True)
class Options:
    """Options of ``replace-attention``.

    Attributes:
        steps: T, time steps of the Q, K and V neurons.
        percentile: Percentile of the activations that becomes the threshold of Q, K and V.
        normalizer: What stands for the row sum of softmax. ``position``: divide by the number of keys seen.
            ``learned-position``: the same as a table per head and position that can be trained. ``leak``: no division; the
            memory of each head forgets at a rate of its own (retention). ``channel-leak``: a rate for each key channel
            (gated linear attention). ``rms``: root mean square of each token and head. ``leak-rms``: both (RetNet).
            ``row-sum``: divide by the row sum of the scores.
        signed_query: Ternary spikes for Q (values of either sign), else binary.
        signed_key: Ternary spikes for K, else binary.
        signed_value: Ternary spikes for V, else binary.
        neuron: ``if``, integrate and fire, or ``lif``, leaky integrate and fire (binary only).
        tau: Membrane time constant of ``lif`` in steps, at least 1. Thresholds are those of ``if`` divided by tau: then the
            percentile of the activations is the current that fires at every step, for both.
        gain: The least-squares factor between spiking and softmax attention: one per ``channel`` or one per ``head``.
        output: ``spikes``: an output neuron, so that the output projection is driven by spikes; ``current``: the counts
            are decoded and projected as an analog value, which costs less quality (docs/results.md).
        output_percentile: Threshold of the output neuron.
        convert: Whether to convert at all: false, set for some modules in an override, leaves their softmax attention.
    """

    steps: int = 4
    percentile: float = 90.0
    normalizer: Normalizer = "position"
    signed_query: bool = False
    signed_key: bool = False
    signed_value: bool = True
    neuron: Literal["if", "lif"] = "if"
    tau: float = 2.0
    gain: Literal["channel", "head"] = "channel"
    output: Literal["current", "spikes"] = "spikes"
    output_percentile: float = 99.0
    convert: bool = True

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_percentile(self.percentile)
        check_percentile(self.output_percentile)
        signs = ("signed_query", "signed_key", "signed_value")
        for name in (*signs, "convert"):
            check_switch(name, getattr(self, name))
        _check_choice("normalizer", self.normalizer, get_args(Normalizer))
        _check_choice("neuron", self.neuron, ("if", "lif"))
        _check_choice("gain", self.gain, ("channel", "head"))
        _check_choice("output", self.output, ("current", "spikes"))
        if not isinstance(self.tau, int | float) or isinstance(self.tau, bool) or not 1 <= self.tau < float("inf"):
            raise ValueError(f"tau must be a number of steps of at least 1, got {self.tau!r}")
        if self.neuron == "lif" and (signed := [name for name in signs if getattr(self, name)]):
            raise ValueError(f"leaky neurons are binary, and {' and '.join(signed)} would be ternary: set to false for 'lif'")

    @property
    def leaky(self) -> bool:
        """Whether the memory of spiking attention forgets."""
        return "leak" in self.normalizer

    @property
    def signs(self) -> tuple[bool, bool, bool]:
        """Whether Q, K and V are ternary."""
        return self.signed_query, self.signed_key, self.signed_value

    def neuron_of(self, role: str) -> NeuronSpec:
        """The neuron that codes Q (``q``), K (``k``), V (``v``) or the result (``ssa``).

        The result is ternary if any of the three is: then it has values of either sign. A leaky neuron starts at rest (Fang
        et al. 2021): what it starts with would leak away before it could round anything.
        """
        signed = any(self.signs) if role == "ssa" else self.signs["qkv".index(role)]
        if self.neuron == "lif":
            return NeuronSpec("lif", steps=self.steps, v0=0.0, tau=float(self.tau), role=role)
        return NeuronSpec(steps=self.steps, signed=signed, role=role)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")


def check_switch(name: str, value: Any) -> None:
    """Refuse what is neither true nor false."""
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false, got {value!r}")


def check_steps(steps: int) -> None:
    """Refuse a number of time steps that is no positive integer."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")


def check_percentile(percentile: float) -> None:
    """Refuse a percentile outside of (0, 100]."""
    if not isinstance(percentile, int | float) or isinstance(percentile, bool) or not 0 < percentile <= 100:
        raise ValueError(f"a percentile lies in (0, 100], got {percentile!r}")
