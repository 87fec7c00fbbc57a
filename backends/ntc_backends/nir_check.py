r"""Do the files do what the program does? Each is run on the inputs that its nodes have in the program, and spikes are compared.

In floating point a membrane that is within rounding of its threshold may fire on one side and not on the other: the loop of NIR adds
``x - theta s`` to v, the program adds x to ``v - theta s``, and matrix products add in other orders. Whether that explains a spike that
differs is *decided*, not assumed: the neuron is run again in float64, and its membrane must come as near to a threshold as

    u (n + 3 T + 4) (sum_c |W_c x_c| + |b| + (T + 1) theta),          u = 2**-24 (float32)

which bounds the error of n products and T steps of either side (Higham 2002, Accuracy and Stability, section 3.1). Anything else is a
mistake, and the export fails. Integers leave no room: there every spike is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import DisagreementError
from ntc.meta import where
from ntc.program import Program, interpret
from ntc_backends.nir_index import Measured
from ntc_backends.nir_neurons import Array, Neuron, arguments, full, neuron_of, numpy_of
from ntc_backends.nir_parts import Part, is_scale, source_of_part

__all__ = ["Run", "compare"]

Run = Callable[[Part, Array, str], dict[str, Array]]
"""Runs the file of a part on a value, under a reading (``definition`` or ``subtract``)."""


@dataclass
class _Watch:
    """What a part still waits for while the program runs."""

    part: Part
    waiting: set[str]
    seen: dict[str, Array] = field(default_factory=dict)


def compare(
    program: Program, parts: list[Part], ids: Tensor, run: Run, readings: tuple[str, ...], exact: Callable[[Node, str], bool]
) -> dict[str, list[Measured]]:
    """Run the program on token ids, and every part on what the program has at its input.

    Args:
        program: The program.
        parts: Its parts.
        ids: Token ids ``[B, L]``.
        run: Runs a file.
        readings: Under which readings.
        exact: Whether a population is held to the program's spikes under a reading.

    Returns:
        Per part, one comparison per reading.

    Raises:
        DisagreementError: If spikes of a population that should be exact differ, and not by rounding.
    """
    result: dict[str, list[Measured]] = {}
    needs: dict[str, list[_Watch]] = {}
    for part in parts:
        layers = [source_of_part(n) for n in part.nodes if not is_scale(n) and n not in part.forms]  # what matrices read
        names = {n.name for n in (part.source, *part.populations, *part.outputs, *layers)}
        watch = _Watch(part, set(names))
        for name in names:
            needs.setdefault(name, []).append(watch)

    def visit(node: Node, args: tuple[Any, ...], value: Any) -> None:
        for watch in needs.pop(node.name, ()):
            watch.seen[node.name] = numpy_of(value)
            watch.waiting.discard(node.name)
            if not watch.waiting:
                part, seen = watch.part, watch.seen
                result[part.name] = [
                    _measure(program, part, seen, run(part, seen[part.source.name], reading), reading, exact) for reading in readings
                ]
                watch.seen = {}

    with torch.no_grad():
        interpret(program, ids, visit)
    return result


def _measure(
    program: Program, part: Part, seen: dict[str, Array], found: dict[str, Array], reading: Any, exact: Callable[[Node, str], bool]
) -> Measured:
    events = differing = by_rounding = 0
    same = np.ones(seen[part.source.name].shape[-3:-1], dtype=bool)  # tokens in which no spike has differed so far
    for node in part.populations:
        other = seen[node.name] != found[node.name]
        first = other & same[..., None]  # not the consequences of what differed in front
        explained = _explained(program, node, seen, first) if exact(node, reading) and first.any() else 0
        unexplained = int(first.sum()) - explained
        if exact(node, reading) and unexplained:
            raise DisagreementError(
                f"{unexplained} of {other.size} spikes in the NIR file of {part.name} are not those of the program, and rounding does not "
                f"explain it: {where(node)}"
            )
        events += int(np.count_nonzero(seen[node.name]))
        differing += int(other.sum())
        by_rounding += explained
        same &= ~other.any(axis=(0, -1))
    worst: float | None = None
    for node in part.outputs if same.any() else ():
        if node not in part.forms:
            expected, got = seen[node.name][:, same], found[node.name][:, same]
            error, limit = float(np.abs(expected - got).max()), _rounding_of(program, node, seen)
            if error > limit:
                raise DisagreementError(
                    f"currents in the NIR file of {part.name} are off by {error:.3g}, and rounding explains {limit:.3g}: {where(node)}"
                )
            worst = max(worst or 0.0, error / max(float(np.abs(expected).max()), 1e-30))
    return Measured(
        reading=reading, tokens=int(same.size), events=events, differing=differing, by_rounding=by_rounding, largest_error=worst
    )


def _rounding_of(program: Program, node: Node, seen: dict[str, Array]) -> float:
    """What the order of the sums can move a current of layers behind neurons, at most."""
    constants = [numpy_of(program.tensor(a)) for a in node.all_input_nodes if a.op == "get_attr"]
    unit = float(np.finfo(np.result_type(np.float32, *constants)).eps) / 2
    size, terms = _largest_terms(program, node, seen)
    return 2 * unit * (terms + 4) * size


def _largest_terms(program: Program, node: Node, seen: dict[str, Array]) -> tuple[float, int]:
    """Largest sum of magnitudes that makes up a value, and how many terms it has."""
    before = source_of_part(node)
    if is_scale(node):
        size, terms = (float(np.abs(seen[before.name]).max()), 1) if before.name in seen else _largest_terms(program, before, seen)
        factor = full(program, next(a for a in node.args if a is not before), int(node.meta["val"].shape[-1]))
        return size * float(np.abs(factor).max()), terms + 1
    given = arguments(node)
    weight, bias = np.abs(numpy_of(program.tensor(given["weight"]))), given["bias"]
    most = float(weight.sum(axis=1).max()) * float(np.abs(seen[before.name]).max())
    return most + (0.0 if bias is None else float(np.abs(numpy_of(program.tensor(bias))).max())), weight.shape[1]


def _explained(program: Program, node: Node, seen: dict[str, Array], other: Array) -> int:
    """How many of the differing spikes belong to neurons that come within rounding of a threshold."""
    neuron = neuron_of(program, node)
    if neuron.integer:
        return 0
    places = np.nonzero(other.any(axis=0))  # batch, token, channel
    x, size, terms = _currents(program, source_of_part(node), seen, places)
    if not neuron.timed:
        x = np.repeat(x, neuron.steps, axis=0)
    channel = places[-1]
    theta = neuron.threshold[channel].astype(np.float64)
    unit = float(np.finfo(neuron.threshold.dtype).eps) / 2
    bound = unit * (terms + 3 * neuron.steps + 4) * (size.max(axis=0) + (neuron.steps + 1) * theta)
    near = _margin(neuron, channel, x, theta) <= bound
    return int((other.sum(axis=0)[places] * near).sum())


def _currents(program: Program, node: Node, seen: dict[str, Array], places: tuple[Array, ...]) -> tuple[Array, Array, int]:
    """The value of a node at K places in float64, ``[T or 1, K]``, the sum of the magnitudes of its terms, and how many terms."""
    batch, token, channel = places
    if node.name in seen:
        x = seen[node.name].astype(np.float64)
        x = (x if x.ndim == 4 else x[None])[:, batch, token, channel]
        return x, np.abs(x), 1
    if is_scale(node):
        train = source_of_part(node)
        factor = full(program, next(a for a in node.args if a is not train), int(node.meta["val"].shape[-1])).astype(np.float64)[channel]
        x, size, terms = _currents(program, train, seen, places)
        return x * factor, size * np.abs(factor), terms + 1
    given = arguments(node)
    weight = numpy_of(program.tensor(given["weight"])).astype(np.float64)[channel]
    bias = np.zeros(len(channel)) if given["bias"] is None else numpy_of(program.tensor(given["bias"])).astype(np.float64)[channel]
    value = seen[source_of_part(node).name].astype(np.float64)
    products = (value if value.ndim == 4 else value[None])[:, batch, token] * weight  # [T or 1, K, n]
    return products.sum(axis=-1) + bias, np.abs(products).sum(axis=-1) + np.abs(bias), weight.shape[-1]


def _margin(neuron: Neuron, channel: Array, x: Array, theta: Array) -> Array:
    """How near the membrane of each neuron comes to a threshold in T steps."""
    v = neuron.start[channel].astype(np.float64)
    tau = None if neuron.tau is None else neuron.tau[channel].astype(np.float64)
    least = np.full(len(channel), np.inf)
    for current in x:
        u = v + (current if tau is None else (current - v) / tau)
        least = np.minimum(least, np.abs(u - theta))
        s = (u >= theta).astype(np.float64)
        if neuron.signed:
            least = np.minimum(least, np.abs(u))
            s -= u < 0
        v = u * (1 - s) if neuron.hard else u - theta * s
    return least
