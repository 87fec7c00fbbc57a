r"""Product of two trains, value by value: what it decodes to is the product of what they decode to.

With the weights w(t) of a train's code and its running sum ``S(t) = sum_(u <= t) w(u) s(u)``:

    o(t) = A(t) B(t) - A(t-1) B(t-1) = w_a(t) a(t) B(t) + A(t-1) w_b(t) b(t),      sum_t o(t) = A(T) B(T)

(the incremental product of LAS, arXiv 2505.09659). It is exact: nothing is lost but what the trains have lost themselves. Each spike
adds the other train's running sum to the result, shifted where its own weight is a power of two (``phase``), as it is (``count``), or times
the payload of a graded spike; and adds to its own running sum. A train with itself is its square, and a gate ``g * u`` costs as many
additions as both have spikes, where quarter squares ``((g + u)^2 - (g - u)^2) / 4`` need two more populations and round twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.decode import PHASE_WEIGHTS, TICKS, decode_weights
from ntc.ops.spec import Counts, Operand, OpSpec, Traffic, TypeMismatch, register
from ntc.ops.traffic import values
from ntc.spike_type import CurrentType, NodeType, SpikeType

__all__ = ["INCREMENTS", "TRAIN_PRODUCT", "train_product"]

_CODES = (("count", "count"), ("phase", "phase"), ("phase", "count"))


def _shape(a: Tensor, b: Tensor, code_a: str, code_b: str) -> list[int]:
    if (code_a, code_b) not in _CODES:
        raise ValueError(f"products are of trains with the codes 'count' and 'phase', that of 'phase' first, got {code_a!r} and {code_b!r}")
    if a.dim() != b.dim() or a.shape[0] != b.shape[0]:
        raise ValueError(f"a product is of two trains of as many steps and axes, and not of {list(a.shape)} and {list(b.shape)}")
    return list(torch.broadcast_shapes(a.shape, b.shape))  # type: ignore[no-untyped-call]


def _weights(train: Tensor, code: str) -> Tensor:
    """w(t), ``[T, 1, ...]``."""
    steps = train.shape[0]
    return torch.tensor(decode_weights(code, steps), dtype=train.dtype, device=train.device).reshape(-1, *[1] * (train.dim() - 1))


def _sums(train: Tensor, code: str) -> Tensor:
    """S(t), ``[T, ...]``; of the phase code they are whole multiples of ``2^-T``, and exact."""
    return (train * _weights(train, code)).cumsum(0) if code == "phase" else train.cumsum(0)


@torch.library.custom_op("ntc::train_product", mutates_args=())
def train_product(a: Tensor, b: Tensor, code_a: str, code_b: str) -> Tensor:
    """Incremental product of two trains (see the module's docstring).

    Args:
        a: Spikes ``[T, ...]``.
        b: Spikes ``[T, ...]``; other axes broadcast, so that a factor of a row, ``[T, B, L, 1]``, meets all of its channels.
        code_a: ``count`` or ``phase``.
        code_b: The same or ``count``: of two codes ``phase`` comes first.

    Returns:
        ``[T, ...]``, with the code ``count``.

    Raises:
        ValueError: For other codes, or trains that do not fit.
    """
    _shape(a, b, code_a, code_b)
    product = _sums(a, code_a) * _sums(b, code_b)
    result = product.clone()
    result[1:] -= product[:-1]
    return result.contiguous()


@train_product.register_fake
def _fake(a: Tensor, b: Tensor, code_a: str, code_b: str) -> Tensor:
    return a.new_empty(_shape(a, b, code_a, code_b))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, ctx.code_a, ctx.code_b = inputs
    ctx.save_for_backward(a, b)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """``dL/dP(t) = g(t) - g(t+1)`` with ``P = A B``; a spike is in all running sums from its step on."""
    a, b = ctx.saved_tensors
    to_product = grad.clone()
    to_product[:-1] -= grad[1:]

    def to_train(train: Tensor, code: str, other: Tensor) -> Tensor:
        to_sum = (to_product * other).sum_to_size(train.shape)
        return to_sum.flip(0).cumsum(0).flip(0) * _weights(train, code)

    return to_train(a, ctx.code_a, _sums(b, ctx.code_b)), to_train(b, ctx.code_b, _sums(a, ctx.code_a)), None, None


train_product.register_autograd(_backward, setup_context=_setup)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    a, b, code_a, code_b = node.args
    assert isinstance(a, Node) and isinstance(b, Node)
    kinds = []
    for train, code in ((a, code_a), (b, code_b)):
        given = type_of(train)
        if not isinstance(given, SpikeType) or given.code != code:
            raise TypeMismatch(f"a product of trains takes spikes of the {code} code here, and %{train.name} is {given}", train)
        kinds.append(given)
    if kinds[0].steps != kinds[1].steps:
        raise TypeMismatch(f"a product is of two trains of as many steps: %{a.name} is {kinds[0]}, and %{b.name} is {kinds[1]}", b)
    return CurrentType(kinds[0].steps, "count")


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    """A spike adds to its own running sum, and in each product that it is a factor of the other running sum to the result."""
    dense = result.numel / result.shape[0]
    total = Counts(dense_macs=dense)
    for one in operands:
        kind, products = one.type, one.nonzero * (result.numel / max(1, one.numel))
        graded = isinstance(kind, SpikeType) and kind.levels == "graded"
        total = total + Counts(acs=one.nonzero + (0 if graded else products), graded_macs=products if graded else 0)
    return total


def _moves(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    """Both trains in; a spike reads and writes its own running sum and reads the other one."""
    total = Traffic()
    for one in operands:
        total = total + values(one) + Traffic(membranes=2 * one.nonzero + one.nonzero * (result.numel / max(1, one.numel)))
    return total


INCREMENTS = """
    zero = Constant <value_ints = [0]> ()
    first = Constant <value_ints = [1]> ()
    last = Constant <value_ints = [-1]> ()
    earlier = Slice({0}, zero, last, zero)
    start = Slice({0}, zero, first, zero)
    nothing = Sub(start, start)
    before = Concat <axis = 0> (nothing, earlier)
    {1} = Sub({0}, before)
"""
"""ONNX: what each step adds to a running total ``[T, ...]``, ``P(t) - P(t-1)`` with ``P(-1) = 0``; the total and the result are named."""


def _onnx(code_a: str, code_b: str) -> str:
    """One variant as an ONNX function; the words of both codes choose it, so two trains of one code are one word."""
    sums = {"count": "{0}_sums = CumSum({0}, time)", "phase": "{0}_weighted = Mul({0}, weights)  {0}_sums = CumSum({0}_weighted, time)"}
    return f"""
    <domain: "ntc", overload: "{'.'.join(dict.fromkeys((code_a, code_b)))}", opset_import: ["": 20]>
    TrainProduct <code_a, code_b> (a, b) => (train)
    {{
        time = Constant <value_int = 0> ()
        {TICKS.format("a") + PHASE_WEIGHTS if "phase" in (code_a, code_b) else ""}
        {sums[code_a].format("a")}
        {sums[code_b].format("b")}
        product = Mul(a_sums, b_sums)
        {INCREMENTS.format("product", "train")}
    }}
    """


TRAIN_PRODUCT = register(
    OpSpec(
        target=torch.ops.ntc.train_product.default, infer=_infer, count=_count, moves=_moves, element="dynamic_product", kind="elementwise",
        onnx=_onnx("count", "count") + _onnx("phase", "phase") + _onnx("phase", "count"),
    )
)  # fmt: skip
