"""What the neurons do: runs a network on one sequence and keeps its spikes, packed, and the membranes of a few neurons.

The program of a compiled folder runs in torch. A netlist alone runs in the simulator, which shows spikes but no membranes.

A large network has more spikes than a page can hold, so each population shows evenly spaced neurons when there is no room for all; rates,
histograms and counts of dead and saturated neurons always come from all of them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ntc_backends import netlist_schema as schema
from ntc_backends.inspect_page.subject import Array, Subject

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node

    from ntc.program import Program

__all__ = ["BINS", "Fired", "Trace", "run"]

BINS = 20
"""Of the histogram of firing rates, all equally wide, from 0 to 1; a rate of 1 is in the last one."""

_RASTER_BYTES = 900_000  # of all spikes that are shown, before base64
_TRACE_BYTES = 320_000
_QUANTILES = (1.0, 0.9, 0.75, 0.5, 0.25, 0.0)  # of the spike count: which neurons have their membrane shown
_FEWEST_ROWS = 8


@dataclass(frozen=True)
class Trace:
    """The membrane of one neuron.

    Attributes:
        neuron: Its index.
        spikes: How often it fired.
        threshold: theta.
        start: v(0), at each token anew.
        before: u before each reset, float32, base64, token after token.
        after: v after it, likewise.
    """

    neuron: int
    spikes: int
    threshold: float
    start: float
    before: str
    after: str


@dataclass(frozen=True)
class Fired:
    """What one population did.

    Attributes:
        element: The population.
        counts: Spikes of each neuron over all tokens and steps ``[C]``.
        tokens: L.
        rows: Neurons whose spikes are shown.
        plus: Their spikes, a bit each, neuron after neuron, token after token, step after step; base64.
        minus: Their negative spikes; empty if there are none.
        traces: Membranes, the neuron that fired most first; empty if they are not known.
    """

    element: schema.Population
    counts: Array
    tokens: int
    rows: Array
    plus: str
    minus: str
    traces: tuple[Trace, ...]

    @property
    def most(self) -> int:
        """Spikes of a neuron that fires at every step."""
        return self.element.steps * self.tokens

    @property
    def rate(self) -> float:
        """Spikes per neuron and step."""
        return float(self.counts.sum()) / (self.element.size * self.most)

    @property
    def events_per_value(self) -> float:
        """Spikes per neuron and token."""
        return self.rate * self.element.steps

    @property
    def dead(self) -> int:
        """Neurons that never fired."""
        return int((self.counts == 0).sum())

    @property
    def saturated(self) -> int:
        """Neurons that fired at every step of every token."""
        return int((self.counts == self.most).sum())

    @property
    def histogram(self) -> list[int]:
        """Neurons by firing rate, dead ones included in the first of ``BINS``."""
        return [int(n) for n in np.bincount(np.minimum(self.counts * BINS // self.most, BINS - 1), minlength=BINS)]


def run(subject: Subject, ids: Sequence[int]) -> dict[str, Fired]:
    """Run the network on token ids; what each population did, by name.

    Raises:
        BackendError: If a membrane does not explain the spikes that were seen, or the simulator does not know an op of the netlist.
    """
    elements = {e.name: e for e in subject.populations}
    found = _simulate(subject, ids, elements) if subject.program is None else _interpret(subject.program, ids, elements)
    return {name: found[name] for name in elements}


def _interpret(program: Program, ids: Sequence[int], elements: Mapping[str, schema.Population]) -> dict[str, Fired]:
    """The program itself, node by node."""
    import torch

    from ntc.program import interpret
    from ntc_backends.inspect_page.membranes import membranes

    rows, traced = _rows(elements, len(ids)), _traced(elements, len(ids))
    found: dict[str, Fired] = {}

    def visit(node: Node, args: tuple[Any, ...], value: Any) -> None:
        element = elements.get(node.name)
        if element is None:
            return
        spikes = value[:, 0].to(torch.int8).numpy()  # [T, L, C]
        counts = _counted(spikes)
        chosen = _by_activity(counts, traced)
        inside = membranes(node, args, value, torch.from_numpy(chosen))
        traces = () if inside is None else tuple(
            Trace(int(neuron), int(counts[neuron]), float(inside.threshold[i]), float(inside.start[i]), _floats(inside.before[..., i]),
                  _floats(inside.after[..., i]))
            for i, neuron in enumerate(chosen)
        )  # fmt: skip
        found[node.name] = _packed(element, spikes, counts, rows[node.name], traces)

    with torch.no_grad():
        interpret(program, torch.tensor([list(ids)]), visit)
    return found


def _simulate(subject: Subject, ids: Sequence[int], elements: Mapping[str, schema.Population]) -> dict[str, Fired]:
    """The netlist, token by token as a chip takes it."""
    from ntc_backends.simulator.engine import Simulator
    from ntc_backends.simulator.piece import Counter

    trains: dict[str, list[Array]] = {name: [] for name in elements}

    class Watching(Counter):
        """Keeps what the raster of the simulator leaves out: the sign of a spike."""

        def fired(self, name: str, spikes: Array, before: int) -> None:
            trains[name].append(spikes[:, 0])

    simulator = Simulator(subject.path, verify_hashes=False)  # they were compared when the subject was opened
    simulator.counter = Watching()
    for i in ids:
        simulator.step(i)
    rows = _rows(elements, len(ids))
    joined = {name: np.concatenate(parts, axis=1) for name, parts in trains.items()}
    return {name: _packed(elements[name], spikes, _counted(spikes), rows[name], ()) for name, spikes in joined.items()}


def _counted(spikes: Array) -> Array:
    """Spikes of each neuron ``[C]`` of a train ``[T, L, C]``, whatever their sign."""
    counts: Array = np.abs(spikes).sum((0, 1), dtype=np.int64)
    return counts


def _packed(element: schema.Population, spikes: Array, counts: Array, rows: Array, traces: tuple[Trace, ...]) -> Fired:
    shown = spikes[..., rows].transpose(2, 1, 0)  # neuron, token, step
    plus, minus = _bits(shown > 0), _bits(shown < 0) if element.signed else ""
    return Fired(element, counts, spikes.shape[1], rows, plus, minus, traces)


def _bits(values: Array) -> str:
    return base64.b64encode(np.packbits(values.reshape(-1)).tobytes()).decode()


def _floats(values: Tensor) -> str:
    return base64.b64encode(values.reshape(-1).double().numpy().astype("<f4").tobytes()).decode()


def _rows(elements: Mapping[str, schema.Population], tokens: int) -> dict[str, Array]:
    """Neurons to show: all, or as many evenly spaced ones of each population as there is room for."""
    bits = {name: e.steps * tokens * (2 if e.signed else 1) for name, e in elements.items()}  # of one neuron
    room = 8 * _RASTER_BYTES
    most = max((e.size for e in elements.values()), default=0)
    while most > _FEWEST_ROWS and sum(min(e.size, most) * bits[name] for name, e in elements.items()) > room:
        most = max(_FEWEST_ROWS, most * 7 // 8)
    return {name: np.arange(n := min(e.size, most)) * e.size // n for name, e in elements.items()}


def _traced(elements: Mapping[str, schema.Population], tokens: int) -> int:
    """How many neurons of each population have their membrane shown."""
    one_each = 8 * tokens * sum(e.steps for e in elements.values())
    return max(1, min(len(_QUANTILES), _TRACE_BYTES // max(1, one_each)))


def _by_activity(counts: Array, number: int) -> Array:
    """Different neurons at quantiles of the spike count, the busiest first; of equals the first."""
    order = np.lexsort((-np.arange(len(counts)), counts))  # ascending; of equals the first stands last
    at = [round(q * (len(order) - 1)) for q in _QUANTILES[:number]]
    return np.array(list(dict.fromkeys(int(order[i]) for i in at)), dtype=np.int64)
