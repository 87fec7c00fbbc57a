"""What ops move between memories and arithmetic: the rules that several ops share.

A program's arguments come from three places: constants of the program (weights), values of other nodes (activations and
spikes), and what an op keeps from token to token (a cache, a state). The rules here tell them apart by the graph and by
the types, so most ops need none of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.fx import Node

from ntc.ops.spec import Counts, Operand, Traffic
from ntc.spike_type import Analog, CurrentType, Integer, NodeType, RateType, SpikeType

__all__ = [
    "bits_per_slot", "causal", "constants", "fired", "looked_up", "matrix", "remembered", "rows_of", "spiking_rows", "still", "streamed",
    "tokens_of", "values",
]  # fmt: skip


def bits_per_slot(kind: SpikeType) -> int:
    """Bits that say what a neuron did at one time step; the payload of a graded spike is the weight of a synapse, read there."""
    return 2 if kind.levels == "ternary" else 1


def values(operand: Operand) -> Traffic:
    """One value of a node, read or written once. Indices and currents are not stored: those are sums under way."""
    if isinstance(operand.type, SpikeType):
        return Traffic(spikes=operand.numel * bits_per_slot(operand.type))
    return Traffic(activations=operand.numel) if isinstance(operand.type, Analog | Integer | RateType) else Traffic()


def _arguments(node: Node, operands: Sequence[Operand]) -> list[tuple[bool, Operand]]:
    """Tensor arguments in order, and whether each is a constant of the program."""
    nodes = [a for a in node.args if isinstance(a, Node)]
    return [(n.op == "get_attr", operand) for n, operand in zip(nodes, operands, strict=True)]


def tokens_of(operand: Operand, kind: NodeType) -> int:
    """Tokens of a value ``[..., C]``: its time steps are none."""
    steps = kind.steps if isinstance(kind, SpikeType | CurrentType) else 1
    return operand.numel // max(1, operand.shape[-1] if operand.shape else 1) // steps


def constants(tokens: int, operands: Sequence[Operand]) -> Traffic:
    """Numbers per channel (gains, biases, thresholds), read once per token."""
    read = tokens * sum(c.shape[-1] if c.shape else 1 for c in operands)
    return Traffic(weights=read, sweep=read)


def streamed(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    """Arguments are read once, constants once per token (their last axis), the result is written once."""
    arguments = _arguments(node, operands)
    total = constants(tokens_of(result, result.type), [o for constant, o in arguments if constant]) + values(result)
    for constant, operand in arguments:
        if not constant:
            total = total + values(operand)
    return total


def matrix(operands: Sequence[Operand], result: Operand, counts: Counts) -> Traffic:
    """A linear layer ``x W^T + b`` with operands x, W and b if any: each operation reads its weight, each spike its row of the matrix.

    A weight that comes from elsewhere in the graph is read all the same: only where it lies differs.
    """
    x = operands[0]
    total = Traffic(weights=counts.macs + counts.acs + counts.graded_macs, sweep=counts.dense_macs) + values(x) + values(result)
    return total + constants(tokens_of(x, x.type), operands[2:])


def looked_up(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    """Rows of a table of embeddings: one is read per token; one pass over the table reads all of it."""
    table, indices = operands[0], operands[1]
    return Traffic(weights=result.numel, sweep=indices.numel * table.numel) + values(result)


def rows_of(operands: Sequence[Operand], result: Operand, seen: float) -> Traffic:
    """Softmax attention: a query reads the keys and values of the ``seen`` tokens that it sees, once per key head."""
    query, key, value = operands[:3]
    tokens = query.numel // query.shape[-1]
    cache = tokens * seen * (key.shape[-1] + value.shape[-1])
    return Traffic(cache=cache) + values(query) + values(result)


def spiking_rows(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    """Spiking attention, parallel form, of Q, K, V and perhaps a leak: at each step a query reads the spikes of the keys and values
    that it sees, once per key head.
    """
    query, key, value, *leak = operands
    seen, kept = causal(query.shape[-2]), constants(tokens_of(query, query.type), leak)
    if not isinstance(key.type, SpikeType) or not isinstance(value.type, SpikeType):  # the float limit: rates in place of spikes
        return rows_of(operands, result, seen) + kept
    rows = query.numel // query.shape[-1]  # tokens and steps
    bits = key.shape[-1] * bits_per_slot(key.type) + value.shape[-1] * bits_per_slot(value.type)
    return Traffic(spike_cache=rows * seen * bits) + values(query) + values(result) + kept


def remembered(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    """Spiking attention, streaming form, of Q, K, V, M ``[..., D, Dv]`` and perhaps a leak: a spike of Q reads a row of M, a coincidence of
    K and V reads and writes an entry, and a leak reads and writes all of it, whatever fires.
    """
    query, key, value, memory, *leak = operands
    # Without spikes (the float limit) every entry changes at every token, too.
    state = measured["read"] + 2 * measured["write"] if measured and not leak else 2.0 * key.numel * memory.shape[-1]
    given = values(query) + values(key) + values(value) + values(result)
    return given + Traffic(state=state) + constants(tokens_of(query, query.type), leak)


def fired(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    """A population: its constants once per token, a membrane read and written at each step, a constant current read once."""
    return streamed(node, operands, result, measured) + Traffic(membranes=2 * result.numel)


def causal(length: int, window: int = 0) -> float:
    """Mean number of keys that a token of L sees: those up to itself, at most ``window`` of them (0 = all)."""
    w = min(window or length, length)
    return w - w * (w - 1) / 2 / length if length else math.nan


def still(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    """A change of layout: the consumer reads the same numbers in another order."""
    return Traffic()
