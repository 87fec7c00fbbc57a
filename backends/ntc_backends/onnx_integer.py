"""How the ops of the integer grade are written: as local functions of domain ``ntc`` whose results are the program's, bit for bit.

Each function has variants, and the proven widths of the program (``ntc.widths``) choose one, so that the fastest arithmetic that is
exact is used: float32 while every intermediate integer is below ``2**24``, float64 below ``2**53``, else int64. Sums and products
of integers in floating point are exact within those limits, in any order and with or without fused multiply-add. A floor of a quotient is
exact where the quotient cannot come near an integer without being one: see the comments.

Linear layers are ``MatMulInteger`` of unsigned activations and signed weights, which ONNX Runtime computes fast (signed times signed
is a trap: 30 to 200 times slower on x86, measured). On x86 without VNNI that product adds two neighbouring products in int16 and
*saturates*. So it is taken as it is only where no two terms can exceed ``2^15 - 1``: spike counts, and activations of 7 bits. Where they
can (activations of 8 bits), the weight is taken as two halves and the activation twice: exact on every processor, for twice the
multiplications. Where an operand is wider than 8 bits, a product in floating point stands in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.fx import Node

from ntc.ops.interval import Bound, Interval
from ntc.ops.spec import spec_of
from ntc.widths import bounds
from ntc_backends import onnx_integer_functions as functions
from ntc_backends.onnx_integer_attention import attention
from ntc_backends.onnx_writer import Value, Writer, bound, functions_in, handles, onnx_type

__all__ = ["SINGLE", "WHOLE"]

SINGLE, WHOLE = 1 << 24, 1 << 53
"""Integers below are exact in float32 and in float64."""

_PAIR = (1 << 15) - 1
"""What two neighbouring products may add up to on a processor that adds them in int16."""

ntc = torch.ops.ntc


_PROVEN: WeakKeyDictionary[Writer, dict[Node, Bound]] = WeakKeyDictionary()


def _bounds(w: Writer) -> dict[Node, Bound]:
    if w not in _PROVEN:
        _PROVEN[w] = bounds(w.program)
    return _PROVEN[w]


def _interval(w: Writer, node: Node) -> Interval:
    return _bounds(w)[node].result


def _inside(w: Writer, node: Node) -> dict[str, int]:
    """Largest magnitude of what an op holds, by name."""
    return {i.what: max(-i.low, i.high) for i in _bounds(w)[node].inside}


def _call(w: Writer, node: Node, text: str, inputs: Sequence[str], **attributes: Any) -> str:
    """A call of a local function given by its text."""
    (function,) = functions_in(text)
    w.functions.setdefault((function.domain, function.name, function.overload), function)
    given: dict[str, Any] = {k: int(v) if isinstance(v, bool) else v for k, v in attributes.items()}
    return w.call(function.name, inputs, domain=function.domain, overload=function.overload, **given)


def _result_type(node: Node) -> int:
    return onnx_type(node.meta["val"].dtype)


@handles(ntc.integer_norm.default)
def _norm(w: Writer, node: Node) -> Value:
    a, held = bound(node), _inside(w, node)
    shifted = held["shifted difference"]
    real = shifted < 1 << 48 and shifted >> a["guard"] + 16 < 1 << 26 and held["normalised value times gain"] < WHOLE
    text = functions.norm(a["centre"], real, _result_type(node))
    given = {k: a[k] for k in ("epsilon", "guard", "shift", "low", "high")}
    return _call(w, node, text, [w.name_of(a[k]) for k in ("x", "gain", "offset")], **given)


@handles(ntc.requantize.default)
def _requantize(w: Writer, node: Node) -> Value:
    a, held = bound(node), _inside(w, node)
    by_position = a["multiplier"].meta["val"].dim() == 2
    text = functions.requantize(by_position, held["product"] < WHOLE, _result_type(node))
    return _call(w, node, text, [w.name_of(a["x"]), w.name_of(a["multiplier"])], shift=a["shift"], low=a["low"], high=a["high"])


@handles(ntc.integer_lookup.default)
def _lookup(w: Writer, node: Node) -> Value:
    a = bound(node)
    return _call(w, node, functions.lookup(), [w.name_of(a["x"]), w.name_of(a["table"])], low=a["low"])


# ----------------------------------------------------------------------------------------------------------------- neurons


def _neuron(w: Writer, neuron: Node, text: str) -> str:
    a = bound(neuron)
    given = {k: a[k] for k in ("steps", "signed", "timed")}
    inputs = [w.name_of(a[k]) for k in ("current", "threshold", "start")]
    return _call(w, neuron, text, inputs, **given, comparison=">=", reset="soft")


@handles(ntc.integer_fire.default)
def _fire(w: Writer, node: Node) -> Value:
    a = bound(node)
    if all(user.target is ntc.decode.default for user in node.users) and _closed_form(w, node):
        # Nobody reads the spikes one by one. The value of this node is not what it is in the program, so it is kept beside.
        w.shared["counts", node] = _neuron(w, node, functions.count(a["steps"], a["signed"]))
        return []
    return _neuron(w, node, functions.fire(a["steps"], a["signed"], a["timed"]))


def _closed_form(w: Writer, node: Node) -> bool:
    """Whether the count in float32 is the count, for every current: both do not decrease with it, so both sides of each step decide."""
    a = bound(node)
    if a["timed"]:
        return False
    channels = node.meta["val"].shape[-1]
    theta, start = (w.program.tensor(a[k]).to(torch.int64).expand(channels) for k in ("threshold", "start"))
    steps, low = a["steps"], -a["steps"] if a["signed"] else 0
    factor = torch.tensor(float(steps)) / theta.to(torch.float32)
    offset = (start.to(torch.float32) + 0.5) / theta.to(torch.float32)
    level = torch.arange(low + 1, steps + 1).unsqueeze(1)
    # The least current whose count reaches a level: ceil((level theta - start) / T).
    reaches = -torch.div(start - level * theta, steps, rounding_mode="floor")
    for current, least, most in ((reaches, level, steps), (reaches - 1, low, level - 1)):
        counted = (current.to(torch.float32) * factor + offset).floor().clamp(low, steps).to(torch.int64)
        if bool(((counted < least) | (counted > most)).any()):
            return False
    return True


@handles(ntc.decode.default)
def _decode(w: Writer, node: Node) -> Value:
    a = bound(node)
    train = a["train"]
    if ("counts", train) in w.shared:
        return w.shared["counts", train]
    if node.meta["val"].is_floating_point():
        spec = spec_of(node)
        assert spec is not None and spec.onnx is not None
        return w.call_function(node, spec.onnx)
    return _call(w, node, functions.decode(), [w.name_of(train)], code=a["code"])


# --------------------------------------------------------------------------------------------------------------- attention


@handles(ntc.integer_attention.default)
def _attention(w: Writer, node: Node) -> Value:
    a, held = bound(node), _inside(w, node)
    renewed = a["renewal"] is not None
    growth = w.program.tensor(a["growth"])
    query, key, value = (_interval(w, a[k]).magnitude for k in ("query", "key", "value"))
    rows = a["key"].meta["val"].shape[-1] // a["kv_heads"]
    met, written = query * key * rows * int(growth.max()), key * value * int(growth.sum(1, dtype=torch.int64).max())
    inner = query * rows * written if renewed else held["count"]
    renewal = functions.DOUBLE if held.get("memory times renewal", 0) < WHOLE else functions.INT64
    text = attention(renewed, _exact_in(met), _exact_in(inner), _exact_in(written), _exact_in(held["count"]), renewal)
    names = ("query", "key", "value", "growth", "renewal")
    inputs = [w.name_of(a[k]) for k in names if a[k] is not None]
    return _call(w, node, text, inputs, heads=a["heads"], kv_heads=a["kv_heads"], shift=a["shift"])


def _exact_in(most: int) -> int:
    return functions.FLOAT if most < SINGLE else functions.DOUBLE


# ------------------------------------------------------------------------------------------------------------------ linear


@handles(ntc.integer_linear.default)
def _linear(w: Writer, node: Node) -> Value:
    a = bound(node)
    x, weight = a["x"], a["weight"]
    low, high = _interval(w, x).ends
    table = w.program.tensor(weight)
    part = "" if a["bias"] is None else "product"
    if table.dtype != torch.int8 or high - min(low, 0) > 255:
        product = _wide_product(w, node, x, weight, part)
    else:
        zero = max(-low, 0)
        left = _unsigned(w, x, zero)
        pair = (high + zero) * int(table.to(torch.int64).abs().topk(min(2, table.shape[1]), dim=1).values.sum(1).max())
        right = _weight(w, weight, halved=pair > _PAIR)
        if pair > _PAIR:
            left = _once(w, ("twice", left), lambda: w.call("Concat", [left, left], "twice", axis=-1))
        product = w.call("MatMulInteger", [left, right, w.constant(zero, torch.uint8)], part)
    if a["bias"] is None:
        return product
    return w.call("Add", [product, w.operand(a["bias"], torch.int32, "bias")])


def _once(w: Writer, key: Any, make: Callable[[], str]) -> str:
    if key not in w.shared:
        w.shared[key] = make()
    name: str = w.shared[key]
    return name


def _unsigned(w: Writer, x: Node, zero: int) -> str:
    """``x + zero`` as uint8, made once for all readers of x."""

    def make() -> str:
        raised = w.name_of(x)
        if zero:
            raised = w.call("Add", [w.operand(x, torch.int32, "wide"), w.constant(zero, torch.int32)], "raised")
        return w.call("Cast", [raised], "unsigned", to=onnx_type(torch.uint8))

    return _once(w, ("unsigned", x), make)


def _weight(w: Writer, weight: Node, *, halved: bool) -> str:
    """The weight ``[C, O]``, or its two halves ``[2 C, O]``; the file keeps it as the program has it, loaders fold this."""
    name = w.name_of(weight)

    def whole() -> str:
        return w.call("Transpose", [name], "weight_t", perm=[1, 0])

    def halves() -> str:
        wide = w.call("Cast", [name], "weight_wide", to=onnx_type(torch.int32))
        first = w.call("Div", [wide, w.constant(2, torch.int32)], "weight_first")
        parts = [first, w.call("Sub", [wide, first], "weight_second")]
        narrow = [w.call("Cast", [part], f"{('first', 'second')[i]}_bytes", to=onnx_type(torch.int8)) for i, part in enumerate(parts)]
        return w.call("Transpose", [w.call("Concat", narrow, "weight_halves", axis=1)], "weight_t", perm=[1, 0])

    return _once(w, ("halves" if halved else "transposed", weight), halves if halved else whole)


def _wide_product(w: Writer, node: Node, x: Node, weight: Node, part: str) -> str:
    """Operands of more than 8 bits: a product in floating point, exact below its limit."""
    most = _inside(w, node)["accumulator"]
    dtype = torch.float32 if most < SINGLE else torch.float64
    right = w.call("Transpose", [w.operand(weight, dtype, "weight")], "weight_t", perm=[1, 0])
    product = w.call("MatMul", [w.operand(x, dtype, "x"), right], "real")
    return w.call("Cast", [product], part, to=onnx_type(torch.int32))


@handles(ntc.from_integer.default)
def _from_integer(w: Writer, node: Node) -> Value:
    a = bound(node)
    return _call(w, node, functions.from_integer(), [w.name_of(a["x"])], exponent=a["exponent"])
