"""Elements of the integer grade (docs/integers.md): integers for weights, membranes and thresholds, and the widths that they need.

The widths are proven (``ntc.widths``): from the weights and the range of the token ids, for any text.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from ntc.meta import NEURON, TYPE
from ntc.ops.interval import bits_of
from ntc.spike_type import SpikeType
from ntc.widths import widths
from ntc_backends import netlist_schema as schema
from ntc_backends.netlist_elements import LAZY
from ntc_backends.netlist_makers import Makers, arguments_of, place_of

__all__ = ["dynamic_product", "population", "projection", "scale", "takes_counts"]


def takes_counts(node: Node) -> bool:
    """Whether a node is a linear layer, with constant weights, of the counts of spikes: synapses on the chip."""
    if node.target is not torch.ops.ntc.integer_linear.default:
        return False
    x, *constants = (a for a in node.args if isinstance(a, Node))
    decoded = x.target is torch.ops.ntc.decode.default
    return decoded and isinstance(x.all_input_nodes[0].meta[TYPE], SpikeType) and all(a.op == "get_attr" for a in constants)


def population(make: Makers, node: Node) -> schema.Population:
    """Neurons with an integer membrane."""
    given = arguments_of(node)
    spec = node.meta.get(NEURON)
    return schema.Population(
        **place_of(node), model="if", role=spec.role if spec else "", size=int(node.meta["val"].shape[-1]), steps=given["steps"],
        threshold=make.integer(given["threshold"]), v0=None, start=make.integer(given["start"]), signed=given["signed"], reset="soft",
        input="timed" if given["timed"] else "constant", membrane_bits=_bits(make, node, "membrane"),
        inputs=schema.PopulationInput(current=make.endpoint(given["current"])), outputs=schema.SpikesOutput(spikes=make.port(node)),
    )  # fmt: skip


def projection(make: Makers, node: Node) -> schema.Projection:
    """Integer weights, on one vector of values or of spike counts per token."""
    given = arguments_of(node)
    x, weight = given["x"], given["weight"]
    post, pre = (int(s) for s in weight.meta["val"].shape)
    low, high = torch.aminmax(make.program.tensor(weight).detach())
    return schema.Projection(
        **place_of(node), kind="dense", synapse="counts" if takes_counts(node) else "analog", shape=[post, pre], synapses=post * pre,
        weight=make.tensor(weight), bias=make.tensor(given["bias"]) if given["bias"] is not None else None,
        weight_bits=_signed(int(low), int(high)), accumulator_bits=_bits(make, node, "accumulator"),
        inputs=schema.ProjectionInput(pre=make.endpoint(x)), outputs=schema.CurrentOutput(current=make.port(node)),
    )  # fmt: skip


def dynamic_product(make: Makers, node: Node) -> schema.DynamicProduct:
    """Spiking attention whose leak is applied once in R tokens."""
    given = arguments_of(node)
    heads, kv_heads, growth, renewal = given["heads"], given["kv_heads"], given["growth"], given["renewal"]
    size = int(given["query"].meta["val"].shape[-1]) // heads
    value_size = int(given["value"].meta["val"].shape[-1]) // kv_heads
    kind = node.meta[TYPE]
    period = int(growth.meta["val"].shape[-1])
    memory, count = (_largest(make, node, what) for what in ("memory", "count"))
    limited = make.program.info.context or renewal is not None
    return schema.DynamicProduct(
        **place_of(node), rule=LAZY,
        # One number would hide a period of more than one token.
        growth=make.integer(growth) if period == 1 else schema.TensorRef(tensor=make.tensor(growth)),
        renewal=None if renewal is None else make.integer(renewal), shift=given["shift"], heads=heads, kv_heads=kv_heads,
        head_size=size, value_size=value_size, steps=kind.steps, state_shape=[kind.steps, kv_heads, size, value_size],
        max_state=memory if limited else None, max_count=count if limited else None,
        state_bits=_bits(make, node, "memory"), count_bits=_bits(make, node, "count"),
        inputs=schema.ProductInputs(**{name: make.endpoint(given[name]) for name in ("query", "key", "value")}),
        outputs=schema.ProductOutput(counts=make.port(node)),
    )  # fmt: skip


def scale(make: Makers, node: Node) -> schema.Scale:
    """A requantization of currents."""
    given = arguments_of(node)
    return schema.Scale(
        **place_of(node), kind="requantize", factor=None, multiplier=make.integer(given["multiplier"]), shift=given["shift"],
        low=given["low"], high=given["high"], inputs=schema.TrainInput(train=make.endpoint(given["x"])),
        outputs=schema.TrainOutput(train=make.port(node)),
    )  # fmt: skip


def _registers(make: Makers) -> dict[tuple[str, str], tuple[int, int]]:
    """Interval of everything that an op holds inside, by node and name; proven once per program."""
    if make.registers is None:
        make.registers = {(w.node, w.what): (w.low, w.high) for w in widths(make.program)}
    return make.registers


def _bits(make: Makers, node: Node, what: str) -> int:
    return _signed(*_registers(make)[node.name, what])


def _largest(make: Makers, node: Node, what: str) -> int:
    return max(map(abs, _registers(make)[node.name, what]))


def _signed(low: int, high: int) -> int:
    """Bits of a two's complement register."""
    return bits_of(min(low, -1), high)
