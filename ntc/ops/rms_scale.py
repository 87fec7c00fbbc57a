r"""Divide each token and head by its root mean square over the channels, taken on the decoded value.

    m_i[c]    = mean over t of x(t)_i[c]                              the value that the current stands for
    r_i[h]    = sqrt(mean over the channels c of head h of m_i[c]**2 + eps)
    y(t)_i[c] = x(t)_i[c] / r_i[h]

The normaliser of RetNet (Sun et al. 2023, arXiv 2307.08621: a group norm per head behind retention, without its mean) for a
current over time steps. One divisor for all steps of a token, made from their mean: so it commutes with the decode of the
rate code, ``mean_t y(t) = m / r``, and T steps need no T norms. It looks at no other token, and streams; but the divisor is
known only when all T steps of the token are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.spec import Counts, Operand, OpSpec, TypeMismatch, register
from ntc.spike_type import Analog, CurrentType, NodeType

__all__ = ["RMS_SCALE", "rms_scale"]


def _check(current: Tensor, heads: int) -> None:
    if current.dim() not in (3, 4):
        raise ValueError(f"rms_scale takes [B, L, C] or [T, B, L, C], not {list(current.shape)}")
    if heads < 1 or current.shape[-1] % heads:
        raise ValueError(f"rms_scale takes a number of heads that divides the {current.shape[-1]} channels, not {heads}")


def _parts(current: Tensor, heads: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The current per head ``[T, B, L, H, D]``, its mean ``m`` and the root ``r``, at least in float32."""
    x = current.to(torch.promote_types(current.dtype, torch.float32)).reshape(*current.shape[:-1], heads, -1)
    x = x if current.dim() == 4 else x.unsqueeze(0)
    mean = x.mean(0)
    return x, mean, (mean.square().mean(-1, keepdim=True) + eps).sqrt()


def _scaled(current: Tensor, heads: int, eps: float) -> Tensor:
    x, _, root = _parts(current, heads, eps)
    return (x / root).reshape(current.shape).to(current.dtype)


@torch.library.custom_op("ntc::rms_scale", mutates_args=())
def rms_scale(current: Tensor, heads: int, eps: float) -> Tensor:
    """Root-mean-square norm per token and head (see the module's docstring).

    Args:
        current: ``[T, B, L, H D]`` over time steps, or an analog value ``[B, L, H D]`` (then T = 1 above).
        heads: H.
        eps: Added to the mean square, in its unit; keeps a token without coincidences at 0.

    Returns:
        The shape and dtype of the current.

    Raises:
        ValueError: For another rank, or if H does not divide the channels.
    """
    _check(current, heads)
    return _scaled(current, heads, eps).contiguous()


@rms_scale.register_fake
def _fake(current: Tensor, heads: int, eps: float) -> Tensor:
    _check(current, heads)
    return current.new_empty(current.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    current, ctx.heads, ctx.eps = inputs
    ctx.save_for_backward(current)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    """``dL/dx(t)[c] = g(t)[c] / r - m[c] / (T D r**3) sum_{t', c'} g(t')[c'] x(t')[c']`` per token and head."""
    (current,) = ctx.saved_tensors
    x, mean, root = _parts(current, ctx.heads, ctx.eps)
    g = grad.to(x.dtype).reshape(x.shape)
    shared = (g * x).sum((0, -1)).unsqueeze(-1)
    to_mean = -shared * mean / (root**3 * x.shape[-1])
    return (g / root + to_mean / x.shape[0]).reshape(current.shape).to(current.dtype), None, None


rms_scale.register_autograd(_backward, setup_context=_setup)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    x, eps = node.args[0], node.args[2]
    assert isinstance(x, Node) and isinstance(eps, float)
    given = type_of(x)
    # The divisor is made of the mean over the steps: of a train that decodes otherwise it would not be the value's norm.
    if not isinstance(given, Analog) and not (isinstance(given, CurrentType) and given.code == "rate"):
        raise TypeMismatch(f"rms_scale takes a rate-coded current or an analog value, and %{x.name} is {given}", x)
    if not eps > 0:
        raise TypeMismatch(f"rms_scale needs eps > 0, or a silent token divides by zero: got {eps:g}")
    return given


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    is_timed = isinstance(operands[0].type, CurrentType)
    decoded = result.numel / (result.shape[0] if is_timed else 1)
    # The scale itself; the mean over the steps; a square and an addition for each decoded value.
    return Counts(elementwise=result.numel * (2 if is_timed else 1) + 2 * decoded)


# How many steps there are: the product of the sizes before [B, L, C], 1 if there are none.
_ONNX = """
<domain: "ntc", opset_import: ["": 20]>
RmsScale <heads, eps> (current) => (y)
{
    whole = Shape(current)
    zeroth = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    any = Constant <value_ints = [-1]> ()
    count = Constant <value_int: int = @heads> ()
    h = Unsqueeze(count, zeroth)
    leading = Shape <end = -3> (current)
    at_least_one = Concat <axis = 0> (one, leading)
    steps = ReduceProd <keepdims = 1> (at_least_one)
    width = Shape <start = -1> (current)
    size = Div(width, h)
    split = Concat <axis = 0> (steps, any, h, size)
    x = Reshape(current, split)
    mean = ReduceMean <keepdims = 1> (x, zeroth)
    squares = Mul(mean, mean)
    power = ReduceMean <keepdims = 1> (squares, any)
    epsilon = Constant <value_float: float = @eps> ()
    epsilon_like = CastLike(epsilon, current)
    raised = Add(power, epsilon_like)
    root = Sqrt(raised)
    scaled = Div(x, root)
    y = Reshape(scaled, whole)
}
"""
RMS_SCALE = register(
    OpSpec(
        target=torch.ops.ntc.rms_scale.default, infer=_infer, count=_count, element="scale", kind="attention", onnx=_ONNX,
        traced=_scaled,  # the kernel is plain torch operations
    )
)
