r"""Encoder neurons: an analog value becomes ternary spikes, once it has been integrated.

With a step d > 0 [units of x] and T time steps, N the largest whole number that the code can tell:

    n = sign(x) min(floor(|x| / d + 1/2), N)               what is coded: x to the nearest multiple of d
    count    N = T          theta(t) = d                   n = sum_t s(t)
    phase    N = 2^T - 1    theta(t) = d 2^(T-1-t)         n = 2^T sum_t 2^-(t+1) s(t),   t = 0..T-1

A neuron takes the whole value first, and then fires with its sign until nothing is left:

    v(0) = |x| + d/2;   s(t) = sign(x) 1[v(t) >= theta(t)];   v(t+1) = v(t) - theta(t) |s(t)|

Spikes are -1, 0 or 1; ``|x - d n| <= d / 2`` for ``|x| <= (N + 1/2) d``, whatever the step. *count* is the bidirectional encoding of SDLLM
(arXiv 2604.16475; the ternary one of Int2Spike): the spikes of a value stand together at the beginning, |n| of them. *phase* is the binary
code of |n| with the sign on every plane, most significant first (Kim et al. 2018; LAS, arXiv 2505.09659): at most T of them for 2^(T+1) - 1
values. The step is one number, one per channel ``[C]``, or one per token ``[B, L, 1]`` as ``ntc::token_step`` makes it:

    d = factor max_c |x_c|,   factor = r / N               one comparison per channel and one product per token (or token and head)

Gradients are straight through: ``d n`` has slope 1 in x between its ends and 0 outside, and ``n - x / d`` and ``+-N`` in d (Esser et al.
2020, LSQ); every time step takes the share of its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.decode import decode_weights
from ntc.ops.if_neuron import check_constant
from ntc.ops.spec import Counts, Operand, OpSpec, TypeMismatch, register
from ntc.ops.traffic import fired
from ntc.spike_type import ANALOG, Analog, NodeType, SpikeType

__all__ = ["ENCODE", "MOST_PLANES", "TOKEN_STEP", "encode", "levels_of", "token_step"]

MOST_PLANES = 16
"""Time steps of the phase code: n is counted exactly in float32."""

_LEAST = 1e-20  # the step of a token that is all zeros: any will do


def levels_of(code: str, steps: int) -> int:
    """N, the largest whole number that T steps can tell.

    Raises:
        ValueError: For a code that encoders do not have, or too many or too few steps.
    """
    most = {"count": 1 << 20, "phase": MOST_PLANES}
    if code not in most:
        raise ValueError(f"encoders have the codes 'count' and 'phase', got {code!r}")
    if not 1 <= steps <= most[code]:
        raise ValueError(f"the {code} code has 1 to {most[code]} time steps, got {steps}")
    return steps if code == "count" else 2**steps - 1


def _check(x: Tensor, step: Tensor, steps: int, code: str) -> None:
    levels_of(code, steps)
    per_channel = step.dim() == 1 and step.shape[0] in (1, x.shape[-1])
    per_token = step.dim() == x.dim() and step.shape[-1] == 1 and all(a == b for a, b in zip(step.shape[:-1], x.shape[:-1], strict=True))
    if not per_channel and not per_token:
        raise ValueError(f"a step has shape [1], [{x.shape[-1]}] or {[*x.shape[:-1], 1]}, and not {list(step.shape)}")


def _ticks(code: str, steps: int, x: Tensor) -> Tensor:
    """theta(t) / d, ``[T, 1, ...]``."""
    exponents = torch.zeros(steps) if code == "count" else torch.arange(steps - 1, -1, -1)
    return torch.exp2(exponents).to(x).reshape(-1, *[1] * x.dim())


def _encoded(x: Tensor, step: Tensor, steps: int, code: str) -> Tensor:
    """The closed form: no loop over the steps."""
    n = (x.abs() / step + 0.5).floor().clamp(max=levels_of(code, steps))
    if code == "count":
        fires = torch.arange(steps, device=x.device).to(x).reshape(-1, *[1] * x.dim()) < n
    else:
        shifted = (n / _ticks(code, steps, x)).floor()  # exact: a division by a power of two
        fires = shifted - 2 * (shifted / 2).floor() == 1
    return fires.to(x.dtype) * x.sign()


@torch.library.custom_op("ntc::encode", mutates_args=())
def encode(x: Tensor, step: Tensor, steps: int, code: str) -> Tensor:
    """Ternary spikes of a value (see the module's docstring).

    Args:
        x: Value, ``[B, L, C]``.
        step: d > 0, in the units of x: ``[1]``, ``[C]`` or ``[B, L, 1]``.
        steps: T.
        code: ``count`` or ``phase``.

    Returns:
        Spikes ``[T, B, L, C]`` in {-1, 0, 1}, in the dtype of x. They decode to n (count) or n / 2^T (phase).

    Raises:
        ValueError: If the step has another shape, or the code does not have that many steps.
    """
    _check(x, step, steps, code)
    return _encoded(x, step, steps, code).contiguous()


@encode.register_fake
def _fake(x: Tensor, step: Tensor, steps: int, code: str) -> Tensor:
    _check(x, step, steps, code)
    return x.new_empty((steps, *x.shape))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, step, ctx.steps, ctx.code = inputs
    ctx.save_for_backward(x, step)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """``ds(t)/dn = w(t) / sum w^2``, with the weights w of the decoded sum; then n as a function of x and d."""
    x, step = ctx.saved_tensors
    most = levels_of(ctx.code, ctx.steps)
    w = torch.tensor(decode_weights(ctx.code, ctx.steps), dtype=grad.dtype, device=grad.device)
    w = w * (2.0**ctx.steps if ctx.code == "phase" else 1.0)  # n = sum w(t) s(t)
    to_n = torch.tensordot(w / (w * w).sum(), grad, dims=1)
    inside = (x.abs() <= (most + 0.5) * step).to(grad.dtype)
    to_x = to_n * inside / step
    return to_x, (-to_x * x / step).sum_to_size(step.shape), None, None


encode.register_autograd(_backward, setup_context=_setup)


def membrane(arguments: Sequence[Any], spikes: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """``sign(x) v(t) / theta(t)`` of a neuron that has fired ``spikes``, and where it fires: at 1, and below -1 the other way."""
    x, step, steps, code = arguments[:4]
    ticks = _ticks(code, steps, x)
    spent = (ticks * spikes.abs()).cumsum(0) - ticks * spikes.abs()
    left = (x.abs() / step + 0.5 - spent) / ticks
    one = torch.ones(1, dtype=x.dtype, device=x.device)
    return left * x.sign(), (one, -one)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    x, step, steps, code = node.args
    assert isinstance(x, Node) and isinstance(step, Node) and isinstance(steps, int)
    for what, argument in (("a value", x), ("a step", step)):
        if not isinstance(type_of(argument), Analog):
            raise TypeMismatch(f"an encoder takes {what} that is analog, and %{argument.name} is {type_of(argument)}", argument)
    check_constant(node, step, lambda d: d > 0, "an encoder needs steps > 0")
    return SpikeType(steps, code, "ternary")  # type: ignore[arg-type]


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    """Each time step compares and subtracts once per neuron."""
    return Counts(neuron_updates=result.numel, spikes=result.nonzero, neurons=result.numel / result.shape[0])


_ONNX = """
<domain: "ntc", overload: "count", opset_import: ["": 20]>
Encode <steps, code> (x, step) => (spikes)
{
    magnitude = Abs(x)
    ratio = Div(magnitude, step)
    half_value = Constant <value_float = 0.5> ()
    half = CastLike(half_value, x)
    raised = Add(ratio, half)
    whole = Floor(raised)
    first = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    trips = Constant <value_int: int = @steps> ()
    most = CastLike(trips, x)
    n = Min(whole, most)
    ticks = Range(first, trips, one)
    ticks_like = CastLike(ticks, x)
    others = Constant <value_ints = [1, 2, 3]> ()
    column = Unsqueeze(ticks_like, others)
    fires = Less(column, n)
    events = CastLike(fires, x)
    sign = Sign(x)
    spikes = Mul(events, sign)
}

<domain: "ntc", overload: "phase", opset_import: ["": 20]>
Encode <steps, code> (x, step) => (spikes)
{
    magnitude = Abs(x)
    ratio = Div(magnitude, step)
    half_value = Constant <value_float = 0.5> ()
    half = CastLike(half_value, x)
    raised = Add(ratio, half)
    whole = Floor(raised)
    first = Constant <value_int = -1> ()
    minus = Constant <value_int = -1> ()
    one = Constant <value_int = 1> ()
    trips = Constant <value_int: int = @steps> ()
    top = Sub(trips, one)
    exponents = Range(top, first, minus)
    exponents_like = CastLike(exponents, x)
    two_value = Constant <value_float = 2.0> ()
    two = CastLike(two_value, x)
    powers = Pow(two, exponents_like)
    steps_like = CastLike(trips, x)
    all = Pow(two, steps_like)
    unit = CastLike(one, x)
    most = Sub(all, unit)
    n = Min(whole, most)
    others = Constant <value_ints = [1, 2, 3]> ()
    column = Unsqueeze(powers, others)
    parts = Div(n, column)
    shifted = Floor(parts)
    halved = Mul(shifted, half)
    even = Floor(halved)
    doubled = Mul(even, two)
    events = Sub(shifted, doubled)
    sign = Sign(x)
    spikes = Mul(events, sign)
}
"""
ENCODE = register(
    OpSpec(
        target=torch.ops.ntc.encode.default, infer=_infer, count=_count, moves=fired, element="population", kind="neurons",
        membrane=membrane, onnx=_ONNX,
    )
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the step of a token


def _check_groups(x: Tensor, groups: int) -> None:
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"{x.shape[-1]} channels are not {groups} groups of as many")


@torch.library.custom_op("ntc::token_step", mutates_args=())
def token_step(x: Tensor, factor: float, groups: int = 1) -> Tensor:
    """``factor max_c |x_c|`` of every token, over each group of neighbouring channels.

    Args:
        x: Value, ``[..., C]``.
        factor: > 0.
        groups: G, such as the number of heads; divides C.

    Returns:
        ``[..., G]``, positive; that of a token of zeros is tiny.

    Raises:
        ValueError: If the channels are not that many groups.
    """
    _check_groups(x, groups)
    size: Tensor = x.abs().reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    return (size.amax(-1) * factor).clamp(min=_LEAST).contiguous()


@token_step.register_fake
def _fake_step(x: Tensor, factor: float, groups: int = 1) -> Tensor:
    _check_groups(x, groups)
    return x.new_empty((*x.shape[:-1], groups))


def _setup_step(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.factor, ctx.groups = inputs
    ctx.save_for_backward(x)


def _backward_step(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (x,) = ctx.saved_tensors
    size = x.abs().unflatten(-1, (ctx.groups, -1))
    largest = (size == size.amax(-1, keepdim=True)).to(grad.dtype)
    to_size = grad.unsqueeze(-1) * ctx.factor * largest / largest.sum(-1, keepdim=True)
    return to_size.flatten(-2) * x.sign(), None, None


token_step.register_autograd(_backward_step, setup_context=_setup_step)


def _infer_step(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    x, factor = node.args[:2]
    assert isinstance(x, Node) and isinstance(factor, float)
    if not isinstance(type_of(x), Analog):
        raise TypeMismatch(f"the step of a token is made of analog values, and %{x.name} is {type_of(x)}", x)
    if not factor > 0:
        raise TypeMismatch(f"the step of a token is positive, and its factor is {factor:g}")
    return ANALOG


def _count_step(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    return Counts(elementwise=operands[0].numel + result.numel)


_ONNX_STEP = f"""
<domain: "ntc", opset_import: ["": 20]>
TokenStep <factor, groups> (x) => (step)
{{
    last = Constant <value_ints = [-1]> ()
    zero = Constant <value_ints = [0]> ()
    number = Constant <value_int: int = @groups> ()
    column = Unsqueeze(number, zero)
    lead = Shape <end = -1> (x)
    split = Concat <axis = 0> (lead, column, last)
    parts = Reshape(x, split)
    size = Abs(parts)
    top = ReduceMax <keepdims = 0> (size, last)
    factor_value = Constant <value_float: float = @factor> ()
    factor_like = CastLike(factor_value, x)
    scaled = Mul(top, factor_like)
    least_value = Constant <value_float = {_LEAST}> ()
    least = CastLike(least_value, x)
    step = Max(scaled, least)
}}
"""
TOKEN_STEP = register(
    OpSpec(target=torch.ops.ntc.token_step.default, infer=_infer_step, count=_count_step, kind="neurons", onnx=_ONNX_STEP)
)
