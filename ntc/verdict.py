"""What a comparison of an executor with its program comes to: figures by population, one word and one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import DisagreementError
from ntc.meta import where
from ntc.recording import Grade

__all__ = ["Current", "Findings", "First", "Layer", "LogitDifference", "Verdict", "finite", "judge", "promised", "worst_of"]

Verdict: TypeAlias = Literal["exact", "approximate", "unsupported", "differs"]


@dataclass(frozen=True)
class First:
    """Where spikes differ first: in the first such sequence, at its first token, in the first step there.

    Attributes:
        sequence: Which window of the text, from 0.
        position: Token in it, from 0.
        step: Time step, from 0; None where counts are compared.
        neuron: Neuron of the population.
    """

    sequence: int
    position: int
    step: int | None
    neuron: int


def _farther(value: float, limit: float, other: float, other_limit: float) -> bool:
    """Whether a value is farther off than another one, in proportion to their limits."""
    left, right = value * other_limit, other * limit
    return value > other if left == right else left > right


@dataclass
class Layer:
    """One population in one executor.

    Attributes:
        node: Node of the program.
        module: Module of the model.
        block: Transformer block.
        role: ``q``, ``k``, ``v``, ``ssa``, ``ffn``, ``input``, or nothing (``ntc.recording.role_of``).
        neurons: Per token.
        steps: T.
        by: What is compared: ``spikes``, ``counts`` (the artefact has no steps there), or ``nothing``.
        reason: Why nothing is compared, or what the artefact has in its place.
        spikes: Spikes of the program.
        compared: Places that were compared: neurons times tokens, times steps unless ``by`` is ``counts``.
        spike_mismatches: Places that differ in the free run; of what cannot run freely, in the held run.
        first: The first of them.
        held_mismatches: Places that differ in the held run.
        ties: How many of them are proven to be ties.
        consequences: How many come after another difference within a piece that cannot be held.
        margin: Of the neurons that differ, how far the membrane of the worst one was from its threshold, relative to it; the worst one is
            the farthest in proportion to how far rounding reaches.
        margin_limit: How far rounding reaches at that neuron.
        resolution: How far it reaches at half of the neurons or more.
        strict: Whether many neurons met their threshold exactly and none of them fired, although the program compares with ``>=``.
        free_unexplained: Of the first population that differs in the free run of a batch: spikes that are no ties.
    """

    node: str
    module: str
    block: str
    role: str
    neurons: int
    steps: int
    by: Literal["spikes", "counts", "nothing"] = "spikes"
    reason: str = ""
    spikes: int = 0
    compared: int = 0
    spike_mismatches: int = 0
    first: First | None = None
    held_mismatches: int = 0
    ties: int = 0
    consequences: int = 0
    margin: float | None = None
    margin_limit: float | None = None
    resolution: float | None = None
    strict: bool = False
    free_unexplained: int = 0

    def note(self, margin: float, limit: float) -> None:
        """Take note of a neuron, if it is the worst one so far."""
        if self.margin is None or _farther(margin, limit, self.margin, self.margin_limit or 0.0):
            self.margin, self.margin_limit = margin, limit

    @property
    def unexplained(self) -> int:
        """Differences of the held run that are no ties and no consequences."""
        return self.held_mismatches - self.ties - self.consequences


@dataclass
class Current:
    """A value that leaves a piece of an artefact.

    Attributes:
        node: Node of the program.
        difference: Of the element that is the farthest off in proportion to how far rounding reaches.
        limit: How far it reaches there; 0 for integers.
    """

    node: str
    difference: float = 0.0
    limit: float = 0.0

    def note(self, difference: float, limit: float) -> None:
        """Take note of an element, if it is the worst one so far."""
        if _farther(difference, limit, self.difference, self.limit):
            self.difference, self.limit = difference, limit


@dataclass
class LogitDifference:
    """How far logits are from the program's, over all batches.

    Attributes:
        largest: ``max |delta logit|``; infinite where one side is no number; None if nothing was compared.
        same: Positions with the same most probable token.
        positions: Positions.
    """

    largest: float | None = None
    same: int = 0
    positions: int = 0

    def add(self, got: Tensor, expected: Tensor) -> bool:
        """Compare a batch; whether anything differs.

        Raises:
            DisagreementError: If the shapes differ.
        """
        if got.shape != expected.shape:
            raise DisagreementError(f"it gives logits of shape {list(got.shape)}, the program {list(expected.shape)}")
        equal = (got == expected) | (got.isnan() & expected.isnan())
        apart = float(torch.where(equal, 0.0, (got - expected).abs()).nan_to_num(nan=torch.inf).max())
        self.largest = max(self.largest or 0.0, apart)
        self.same += int((got.argmax(-1) == expected.argmax(-1)).sum())
        self.positions += expected.shape[0] * expected.shape[1]
        return apart > 0


@dataclass
class Findings:
    """All that one executor was found to do.

    Attributes:
        grade: Of the program.
        nodes: Its populations.
        layers: What was found of each.
        free: Logits of the free run.
        held: Logits of the held run.
        logit_limit: How far rounding moves logits given equal spikes; None for integers.
        currents: Values that leave pieces of the artefact.
    """

    grade: Grade
    nodes: Mapping[str, Node]
    layers: dict[str, Layer]
    free: LogitDifference = field(default_factory=LogitDifference)
    held: LogitDifference = field(default_factory=LogitDifference)
    logit_limit: float | None = None
    currents: dict[str, Current] = field(default_factory=dict)

    @property
    def compared(self) -> list[Layer]:
        """Populations that the artefact has."""
        return [layer for layer in self.layers.values() if layer.by != "nothing"]

    def place(self, layer: Layer) -> str:
        """Where a population is, for the end of a sentence."""
        return where(self.nodes[layer.node])


def promised(grade: Grade) -> tuple[Verdict, ...]:
    """Verdicts that are not worse than a program of that grade promises; what an artefact does not have, it does not promise."""
    return ("exact", "unsupported") if grade == "integer" else ("exact", "approximate", "unsupported")


def judge(found: Findings) -> tuple[Verdict, str]:
    """One word and one sentence."""
    layers = found.compared
    if not layers:
        return "unsupported", f"it has none of the program's populations: {next(iter(found.layers.values())).reason}"
    problem = (_other_integers(found) if found.grade == "integer" else _beyond_rounding(found)) or _other_currents(found)
    if problem:
        return "differs", problem
    reaches = found.free.largest is not None or found.held.largest is not None
    declared = [layer for layer in layers if layer.reason and (layer.held_mismatches or layer.spike_mismatches)]
    if declared:
        return "approximate", _covered(found, f"{declared[0].reason}: {found.place(declared[0])}")
    if any(layer.spike_mismatches or layer.held_mismatches for layer in layers):
        return "approximate", _covered(found, f"threshold ties: {_ties(layers)}")
    if found.free.largest or found.held.largest or any(current.difference for current in found.currents.values()):
        what = "logits" if reaches else "currents"
        return "approximate", _covered(found, f"every spike is the program's, {what} differ by rounding")
    return "exact", _covered(found, f"every spike {'and every logit ' if reaches else ''}is the program's")


def _beyond_rounding(found: Findings) -> str:
    """What rounding does not explain, the node named; empty if there is nothing."""
    for layer in found.compared:
        if layer.strict:
            return f"neurons that meet their threshold exactly do not fire, so it compares with > instead of >=: {found.place(layer)}"
        if layer.unexplained and not layer.reason:
            return _unexplained(layer, "given equal spikes", layer.held_mismatches, layer.unexplained, found.place(layer))
        if layer.free_unexplained and not layer.reason:
            return _unexplained(layer, "run freely", layer.spike_mismatches, layer.free_unexplained, found.place(layer))
    limit, apart = found.logit_limit, found.held.largest
    if limit is not None and apart is not None and not apart <= limit:
        return f"given equal spikes, logits differ by {apart:.3g}, and rounding moves them by {limit:.2g} at most"
    return "its logits are no numbers where the program's are" if found.free.largest == float("inf") else ""


def _other_currents(found: Findings) -> str:
    for current in found.currents.values():
        if not current.difference <= current.limit:
            reach = "integers leave no room" if found.grade == "integer" else f"rounding moves it by {current.limit:.2g} at most"
            return f"given equal spikes, a current is off by {current.difference:.3g}, and {reach}: node %{current.node}"
    return ""


def _unexplained(layer: Layer, start: str, differ: int, unexplained: int, place: str) -> str:
    start = f"{start}, {differ:,} of {layer.compared:,} spikes differ, and {unexplained:,} are no ties"
    if layer.margin is None:
        return f"{start} that could be proven, since the op does not tell its membrane: {place}"
    return (
        f"{start}: a membrane was {layer.margin:.2g} thresholds from where it would fire so, and rounding moves it by "
        f"{layer.margin_limit:.2g} at most: {place}"
    )


def _other_integers(found: Findings) -> str:
    """Any difference; the first population that fires something else on equal spikes is named."""
    layers = [layer for layer in found.compared if not layer.reason]
    odd = [layer for layer in layers if layer.held_mismatches > layer.consequences] or [x for x in layers if x.spike_mismatches]
    if odd:
        layer, at = odd[0], odd[0].first
        begins = "" if at is None else f", first at token {at.position} of sequence {at.sequence}, neuron {at.neuron}"
        what = "spike counts" if layer.by == "counts" else "spikes"
        number = layer.spike_mismatches or layer.held_mismatches
        return f"{number:,} of {layer.compared:,} {what} differ{begins}, and integers leave no room: {found.place(layer)}"
    if any(layer.reason and layer.spike_mismatches for layer in found.compared):
        return ""  # logits of an artefact that declares another neuron
    worst = max(found.free.largest or 0.0, found.held.largest or 0.0)
    return f"every spike is the program's, but logits differ by {worst:.3g}, and integers leave no room" if worst else ""


def _ties(layers: Sequence[Layer]) -> str:
    held = sum(layer.held_mismatches for layer in layers)
    whole = sum(layer.compared for layer in layers)
    worst = worst_of(layers)
    if held:
        start = f"given equal spikes {held:,} of {whole:,} differ, all within rounding of a threshold"
    else:
        start = "given equal spikes none differs; in the free run the first that do are within rounding of a threshold"
    if worst is None:
        return start
    return f"{start} (at most {worst.margin:.1g} thresholds away, where rounding reaches {worst.margin_limit:.1g})"


def worst_of(layers: Sequence[Layer]) -> Layer | None:
    """The population with the neuron that is the farthest from a tie."""
    known = [layer for layer in layers if layer.margin is not None]
    return max(known, key=lambda layer: (layer.margin or 0.0) / (layer.margin_limit or 1.0), default=None)


def _covered(found: Findings, sentence: str) -> str:
    """The sentence, and what it does not hold for."""
    counted = sum(layer.by == "counts" for layer in found.compared)
    if counted:
        which, them = ("1 population", "it") if counted == 1 else (f"{counted} populations", "them")
        sentence += f"; {which} by spike counts, since it runs {them} in closed form"
    left = [layer for layer in found.layers.values() if layer.by == "nothing"]
    if left:
        share = 1 - sum(layer.neurons for layer in left) / sum(layer.neurons for layer in found.layers.values())
        sentence += f"; this is {share:.1%} of the neurons: it has no {', '.join('%' + layer.node for layer in left[:3])}"
        sentence += f" and {len(left) - 3} more" if len(left) > 3 else ""
    return sentence


def finite(value: float | None) -> float | None:
    """JSON has no infinity and no NaN."""
    return None if value is None or value - value != 0 else value
