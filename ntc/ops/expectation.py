r"""Expectation compensation: a function of the mean of a train, told step by step.

    o(t) = t f(S(t) / t) - (t-1) f(S(t-1) / (t-1)),   S(t) = sum_{u <= t} x(u),        (1/T) sum_t o(t) = f((1/T) sum_t x(t))

for any f (ECMT, arXiv 2502.21193): the mean over the steps is exact whatever came when, and so is every mean up to a step t. f is evaluated
once per step on real values, T times what the function costs alone: an island that spreads its result over time, and no spiking form of it.

| function | f |
| --- | --- |
| ``silu``, ``gelu``, ``gelu_tanh`` | of each value |
| ``softmax`` | along the last axis |
| ``rms_norm`` | ``x / sqrt(mean(x^2) + eps)`` along the last axis, times ``weight`` |
| ``layer_norm`` | the same of ``x - mean(x)``, plus ``bias`` |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from ntc.ops.decode import TICKS
from ntc.ops.spec import Counts, Operand, OpSpec, TypeMismatch, register
from ntc.ops.train_product import INCREMENTS
from ntc.spike_type import CurrentType, NodeType, SpikeType

__all__ = ["EXPECTATION", "FUNCTIONS", "expectation"]

FUNCTIONS: dict[str, Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor]] = {
    "silu": lambda x, weight, bias, eps: functional.silu(x),
    "gelu": lambda x, weight, bias, eps: functional.gelu(x),
    "gelu_tanh": lambda x, weight, bias, eps: functional.gelu(x, approximate="tanh"),
    "softmax": lambda x, weight, bias, eps: functional.softmax(x, -1),
    "rms_norm": lambda x, weight, bias, eps: functional.rms_norm(x, [x.shape[-1]], weight, eps),
    "layer_norm": lambda x, weight, bias, eps: functional.layer_norm(x, [x.shape[-1]], weight, bias, eps),
}
_COST = {"silu": 5, "gelu": 8, "gelu_tanh": 8, "softmax": 3, "rms_norm": 5, "layer_norm": 8}  # per value, as alone (aten.py)
_TABLES = {"rms_norm": 1, "layer_norm": 2}  # how many of weight and bias a function takes


def _check(train: Tensor, function: str, weight: Tensor | None, bias: Tensor | None) -> None:
    if function not in FUNCTIONS:
        raise ValueError(f"expectations are of {', '.join(FUNCTIONS)}, and not of {function!r}")
    for number, (name, table) in enumerate((("weight", weight), ("bias", bias))):
        if table is not None and number >= _TABLES.get(function, 0):
            raise ValueError(f"{function} has no {name}")
        if table is not None and tuple(table.shape) != (train.shape[-1],):
            raise ValueError(f"a {name} of {function} has shape [{train.shape[-1]}], and not {list(table.shape)}")


def _told(train: Tensor, function: str, eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The docstring's formula in plain torch operations."""
    ticks = torch.arange(1, train.shape[0] + 1, device=train.device).to(train.dtype).reshape(-1, *[1] * (train.dim() - 1))
    total = FUNCTIONS[function](train.cumsum(0) / ticks, weight, bias, eps) * ticks
    return torch.cat([total[:1], total[1:] - total[:-1]])


@torch.library.custom_op("ntc::expectation", mutates_args=())
def expectation(train: Tensor, function: str, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """A function of the running mean of a train, as increments (see the module's docstring).

    Args:
        train: ``[T, ...]``, rate-coded.
        function: A name of ``FUNCTIONS``.
        eps: Of the norms.
        weight: Of the norms, ``[C]``.
        bias: Of LayerNorm, ``[C]``.

    Returns:
        ``[T, ...]``, rate-coded; its mean over any first steps is the function of the train's mean over them.

    Raises:
        ValueError: For an unknown function, or a weight or bias that it does not have or of another shape.
    """
    _check(train, function, weight, bias)
    return _told(train, function, eps, weight, bias).contiguous()


@expectation.register_fake
def _fake(train: Tensor, function: str, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    _check(train, function, weight, bias)
    return train.new_empty(train.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    train, ctx.function, ctx.eps, weight, bias = inputs
    ctx.save_for_backward(train, weight, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    given: list[Any] = [None if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors]
    with torch.enable_grad():
        result = _told(given[0], ctx.function, ctx.eps, given[1], given[2])
    found = iter(torch.autograd.grad(result, [x for x in given if x is not None], grad))
    train, weight, bias = (None if x is None else next(found) for x in given)
    return train, None, None, weight, bias


expectation.register_autograd(_backward, setup_context=_setup)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    train = node.args[0]
    assert isinstance(train, Node)
    given = type_of(train)
    if not isinstance(given, SpikeType | CurrentType) or given.code != "rate":
        raise TypeMismatch(f"an expectation is of a rate-coded train, and %{train.name} is {given}", train)
    return CurrentType(given.steps, "rate")


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    """The function at every step; a running sum, its mean, and the increment."""
    function = node.args[1]
    assert isinstance(function, str)
    return Counts(elementwise=(_COST[function] + 4) * result.numel)


_BODIES = {
    # Not x Sigmoid(x): ONNX Runtime's is off by up to 1e-7 whatever its value, a fifth of it at -13.
    "silu": """
        turned = Neg(mean)  power = Exp(turned)  unit_value = Constant <value_float = 1.0> ()  unit = CastLike(unit_value, train)
        below = Add(power, unit)  y = Div(mean, below)
    """,
    "gelu": 'y = Gelu <approximate = "none"> (mean)',
    "gelu_tanh": 'y = Gelu <approximate = "tanh"> (mean)',
    "softmax": "y = Softmax <axis = -1> (mean)",
}
_NORMAL = """
    channels = Constant <value_ints = [-1]> ()
    {centre}
    square = Mul(centred, centred)
    power = ReduceMean <keepdims = 1> (square, channels)
    least_value = Constant <value_float: float = @eps> ()
    least = CastLike(least_value, train)
    shifted = Add(power, least)
    root = Sqrt(shifted)
    normal = Div(centred, root)
"""
_CENTRE = {
    "rms_norm": "centred = Identity(mean)",
    "layer_norm": "middle = ReduceMean <keepdims = 1> (mean, channels)  centred = Sub(mean, middle)",
}


def _onnx(function: str, *tables: str) -> str:
    body = _BODIES.get(function)
    if body is None:
        tail = {(): "y = Identity(normal)", ("weight",): "y = Mul(normal, weight)"}
        tail[("weight", "bias")] = "scaled = Mul(normal, weight)  y = Add(scaled, bias)"
        body = _NORMAL.format(centre=_CENTRE[function]) + tail[tables]
    return f"""
    <domain: "ntc", overload: "{".".join((function, *tables))}", opset_import: ["": 20]>
    Expectation <function, eps> ({", ".join(("train", *tables))}) => (told)
    {{
        time = Constant <value_int = 0> ()
        {TICKS.format("train")}
        sums = CumSum(train, time)
        mean = Div(sums, ticks)
        {body}
        total = Mul(y, ticks)
        {INCREMENTS.format("total", "told")}
    }}
    """


EXPECTATION = register(
    OpSpec(
        target=torch.ops.ntc.expectation.default, infer=_infer, count=_count, kind="elementwise", traced=_told,
        onnx="".join(map(_onnx, _BODIES)) + _onnx("rms_norm") + _onnx("rms_norm", "weight") + _onnx("layer_norm")
        + _onnx("layer_norm", "weight") + _onnx("layer_norm", "weight", "bias"),
    )
)  # fmt: skip
