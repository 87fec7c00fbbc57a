r"""A spiking program in floating point becomes one that computes with integers from token ids to logits (docs/integers.md).

Before (shortened)::

    %n = layer_norm(%x, ...);  %h = linear(%n, W, b);  %s = ntc.integrate_fire(%h, threshold, v0, 4, ...)
    %i = linear(%s, V, c);  %y = ntc.decode(%i, 'rate');  %z = add(%x, %y)

After::

    %n = ntc.integer_norm(%x, gain, offset, ...)            # int8
    %h = ntc.integer_linear(%n, W, b)                       # int32, one scale per channel
    %s = ntc.integer_fire(%h, threshold, start, 4, ...)     # the threshold is in the units of its channel
    %c = ntc.decode(%s, 'count')
    %i = ntc.integer_linear(%c, V, c)
    %y = ntc.requantize(%i, multiplier, shift, ...)         # to the unit of the residual stream
    %z = add(%x, %y)

The walk is in the order of execution, and every layer is made for the integers that reach it (``walk``): scales are those with the least
squared error of what reads them (``activations``, ``compensation``), weights are rounded so that the layer's result is nearest, biases
make up for the mean error (``linear``). What has no integer form is refused: softmax attention, leaky neurons, divisors that depend on
the token (``rms``, ``row-sum``), leaks per channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import PassError, VerifyError
from ntc.meta import TYPE, where
from ntc.ops import aten, spec_of
from ntc.pipeline import Calibration, Context, Pass, PassResult
from ntc.program import Program, check_ids, op_name
from ntc.spike_type import INDEX
from ntc.verify import verify
from ntc.widths import widths
from ntc_passes.quantize.attention import attention, position_scale
from ntc_passes.quantize.head import head
from ntc_passes.quantize.linear import linear, summed
from ntc_passes.quantize.lookup import lookup
from ntc_passes.quantize.neurons import fire
from ntc_passes.quantize.norm import norm
from ntc_passes.quantize.options import WEIGHT_BITS, Options
from ntc_passes.quantize.statistics import measure
from ntc_passes.quantize.stream import add, embedding, stream_exponent
from ntc_passes.quantize.walk import NAME, Value, Work

__all__ = ["WEIGHT_BITS", "Options", "Quantize"]

_OPS = torch.ops.ntc


class Quantize(Pass):
    """Integer weights, thresholds and membranes: a spiking program that every executor runs alike."""

    name = NAME
    requires = frozenset({"spiking"})
    provides = frozenset({"integer"})
    refuses: ClassVar = {
        "coded": "trains whose spikes have weights or sizes have no integer form; leave the program in floating point, or take a recipe of "
        "neurons that integrate and fire, such as neurtransformer"
    }
    required = True
    Options = Options

    def run(self, program: Program, context: Context) -> PassResult:
        """Walk the program once in floating point, once in integers."""
        if "integer" in program.facts:
            return PassResult(False, missed=(("output", "the program computes with integers already"),))
        if context.calibration is None or context.calibration.tokens == 0:
            raise PassError("quantize chooses its scales on calibration text: give --calibration FILE, or a Calibration in the context")
        batches = _some(context.calibration, self.options.tokens)
        for batch in batches:
            check_ids(batch, program.info)
        _refuse(program)
        floating = measure(program, batches, lambda done, total: context.progress("measure ranges", done, total))
        work = Work(program, lambda node: self.at(node, context), batches, floating, stream_exponent(program, floating))
        sites = _walk(work, lambda done, total: context.progress(self.name, done, total))
        program.refresh()
        _check_widths(program)
        return PassResult(True, sites, notes=_notes(work, context.calibration))


def _some(calibration: Calibration, tokens: int) -> tuple[Tensor, ...]:
    """Whole windows from the start, at most so many tokens, one window at least."""
    taken: list[Tensor] = []
    for batch in calibration.batches:
        rows = min(len(batch), max(tokens // batch.shape[1], 0 if taken else 1))
        if rows <= 0:
            break
        taken.append(batch[:rows])
        tokens -= taken[-1].numel()
    return tuple(taken)


# ------------------------------------------------------------------------------------------------ what becomes of each op


def _decode(work: Work, node: Node) -> Value:
    """Counts in place of a mean; nothing behind a layer that ran on counts."""
    source, code = node.args[:2]
    value = work[source]
    if code != "rate":
        raise PassError(f"the integer grade sums rate-coded trains, and {where(node)} decodes the {code} code")
    return value if not value.steps else summed(work, value, node, node.name)


def _scale(work: Work, node: Node) -> Value:
    """No op: a constant factor goes into what the integers stand for."""
    left, right = node.args[:2]
    value, factor = (left, right) if isinstance(left, Node) and left.op != "get_attr" else (right, left)
    tensor = torch.tensor([float(factor)], dtype=torch.float64) if isinstance(factor, int | float) else None
    if tensor is None:
        tensor = work.constant(node, factor, "a factor")
    if tensor.numel() not in (1, tensor.shape[-1] if tensor.dim() else 1):
        raise PassError(f"the integer grade scales by one number or one per channel, and {where(node)} by {list(tensor.shape)}")
    return work[value].scaled(tensor.reshape(-1))


Handler = Callable[[Work, Node], Value]

_HANDLERS: Mapping[Any, Handler] = {
    aten.embedding.default: embedding, aten.add.Tensor: add, aten.layer_norm.default: norm, aten.rms_norm.default: norm,
    aten.linear.default: linear, aten.mul.Tensor: _scale, _OPS.integrate_fire.default: fire, _OPS.spiking_attention.default: attention,
    _OPS.position_scale.default: position_scale, _OPS.decode.default: _decode,
}  # fmt: skip

_REMEDIES: Mapping[Any, str] = {
    _OPS.attention.default: "softmax attention has none; convert it with replace-attention, convert = true",
    _OPS.leaky_integrate_fire.default: "leaky neurons have none; compile with neuron = \"if\"",
    _OPS.rms_scale.default: "a divisor that depends on the token has none; compile with normalizer = \"leak\" or \"position\"",
    _OPS.row_sum_scale.default: "a divisor that depends on the token has none; compile with normalizer = \"leak\" or \"position\"",
}


def _handler(node: Node) -> Handler | None:
    if node.target in _HANDLERS:
        return _HANDLERS[node.target]
    spec = spec_of(node)
    pointwise = spec is not None and spec.kind == "activation" and len(node.all_input_nodes) == 1
    return lookup if pointwise else None


def _refuse(program: Program) -> None:
    """Refuse what has no integer form, before any work.

    Raises:
        PassError: Names the first such node, and what to do.
    """
    for node in program.graph.nodes:
        if node.op != "call_function" or node.meta[TYPE] == INDEX or _handler(node) is not None:
            continue
        why = _REMEDIES.get(node.target, "the integer grade has no such op; leave the program in floating point")
        raise PassError(f"{op_name(node.target)} has no integer form: {why}: {where(node)}")


# ------------------------------------------------------------------------------------------------ the walk


def _walk(work: Work, progress: Callable[[int, int], None]) -> int:
    """Make the integer program; returns the number of ops that became integer."""
    nodes = list(work.program.graph.nodes)
    last_use = {used: user for user in nodes for used in user.all_input_nodes}
    sites = 0
    for number, node in enumerate(nodes):
        progress(number, len(nodes))
        if node.op == "placeholder":
            work[node] = Value(node, "index", torch.ones(1), list(work.batches))
        elif node.op == "output":
            head(work, node)
        elif node.op == "call_function" and node.meta[TYPE] == INDEX:
            work[node] = Value(node, "index", torch.ones(1), _run(work, node))
        elif node.op == "call_function":
            handler = _handler(node)
            assert handler is not None
            work[node] = handler(work, node)
            sites += 1
        for used in node.all_input_nodes:
            if last_use.get(used) is node:
                work.forget(used)
    return sites


def _run(work: Work, node: Node) -> list[Any]:
    """Ids, positions and sizes stay as they are."""

    def value(argument: Node, batch: int) -> Any:
        return work.program.tensor(argument) if argument.op == "get_attr" else work[argument].data[batch]

    def result(batch: int) -> Any:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: value(n, batch))
        return node.target(*args, **kwargs)  # type: ignore[operator]

    return [result(batch) for batch in range(len(work.batches))]


def _check_widths(program: Program) -> None:
    """Prove that nothing overflows, whatever the text.

    Raises:
        PassError: Names the node, the interval, and what to do.
    """
    try:
        verify(program)  # which says what each value is
        widths(program)
    except VerifyError as error:
        raise PassError(f"the integer program does not fit: {error}") from error


def _notes(work: Work, calibration: Calibration) -> dict[str, Any]:
    return {
        "data": calibration.description, "sha256": calibration.sha256, "tokens": sum(b.numel() for b in work.batches),
        "residual_exponent": work.exponent, "sites": work.notes,
    }  # fmt: skip
