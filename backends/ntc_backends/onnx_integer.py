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

__all__ = ["BLOCK", "SINGLE", "WHOLE"]

SINGLE, WHOLE = 1 << 24, 1 << 53
"""Integers below are exact in float32 and in float64."""

BLOCK = 512
"""Channels of the head that are taken at once: with 256 tokens, 1 MiB of float64."""

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


def _call(w: Writer, node: Node, text: str, inputs: Sequence[str], part: str = "", **attributes: Any) -> str:
    """A call of a local function given by its text."""
    (function,) = functions_in(text)
    w.functions.setdefault((function.domain, function.name, function.overload), function)
    given: dict[str, Any] = {k: int(v) if isinstance(v, bool) else v for k, v in attributes.items()}
    return w.call(function.name, inputs, part, domain=function.domain, overload=function.overload, **given)


def _result_type(node: Node) -> int:
    return onnx_type(node.meta["val"].dtype)


@handles(ntc.integer_norm.default)
def _norm(w: Writer, node: Node) -> Value:
    a, held = bound(node), _inside(w, node)
    shifted = held["shifted difference"]
    real = shifted < 1 << 48 and shifted >> a["guard"] + 16 < 1 << 26 and held["normalised value times gain"] < WHOLE
    channels, group = a["x"].meta["val"].shape[-1], 1
    square = max(shifted >> a["guard"] + 16, 1) ** 2
    while real and channels % (2 * group) == 0 and 2 * group * square <= WHOLE:
        group *= 2
    text = functions.norm(a["centre"], real, _result_type(node), group)
    given = {k: a[k] for k in ("epsilon", "guard", "shift", "low", "high")}
    return _call(w, node, text, [w.name_of(a[k]) for k in ("x", "gain", "offset")], **given)


@handles(ntc.requantize.default)
def _requantize(w: Writer, node: Node) -> Value:
    if _head_of(w, node) is not None:
        return []
    a, held = bound(node), _inside(w, node)
    by_position = a["multiplier"].meta["val"].dim() == 2
    real = held["product"] < WHOLE or _same_steps(w, node)
    scaled = all(user.target is ntc.from_integer.default for user in node.users)
    text = functions.requantize(by_position, real, functions.FLOAT if scaled else _result_type(node))
    given = {k: a[k] for k in ("shift", "low", "high")}
    name = _call(w, node, text, [w.name_of(a["x"]), w.name_of(a["multiplier"])], **given)
    if scaled:  # to float32, which holds these integers and is what all readers make of them
        w.shared["real", node] = name
        return []
    return name


def _same_steps(w: Writer, node: Node) -> bool:
    """Whether float64 gives each result of few bits: neither form decreases with x, so the two sides of each step decide."""
    a = bound(node)
    low, high, shift = a["low"], a["high"], a["shift"]
    multiplier = w.program.tensor(a["multiplier"]).to(torch.int64).flatten()
    if high - low > 255 or not 0 < shift <= 52 or bool((multiplier <= 0).any()):
        return False
    level = torch.arange(low + 1, high + 1).unsqueeze(1)
    factor = multiplier.to(torch.float64) / (1 << shift)
    for start in range(0, len(multiplier), 4096):
        m, f = multiplier[start : start + 4096], factor[start : start + 4096]
        # The least x that is rounded to a level: ceil((level - 1/2) 2^shift / m).
        reaches = -torch.div(-((2 * level - 1) << shift - 1), m, rounding_mode="floor")
        for x, least, most in ((reaches, level, high), (reaches - 1, low, level - 1)):
            rounded = (x.to(torch.float64) * f + 0.5).floor().clamp(low, high).to(torch.int64)
            if bool(((rounded < least) | (rounded > most)).any()):
                return False
    return True


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
    if all(_counted(user) for user in node.users) and _closed_form(w, node):
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
    for kind in ("counts", "decoded"):
        if (kind, train) in w.shared:
            return w.shared[kind, train]
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
    decoded = all(_counted(user) for user in node.users)
    steps = a["query"].meta["val"].shape[0] if decoded else 1  # that one product adds up
    met, written = query * key * rows, key * value * int(growth.sum(1, dtype=torch.int64).max())
    inner, cross = steps * query * rows * written, steps * held["count"]
    if not renewed:
        inner, written = cross, value * int(growth.max())
    renewal = functions.DOUBLE if held.get("memory times renewal", 0) < WHOLE else functions.INT64
    text = attention(renewed, decoded, _exact_in(met), _exact_in(inner), _exact_in(written), _exact_in(cross), renewal)
    names = ("query", "key", "value", "growth", "renewal")
    inputs = [w.name_of(a[k]) for k in names if a[k] is not None]
    name = _call(w, node, text, inputs, heads=a["heads"], kv_heads=a["kv_heads"], shift=a["shift"])
    if decoded:  # this node's value is that of its readers
        w.shared["decoded", node] = name
        return []
    return name


def _counted(user: Node) -> bool:
    """Whether a reader only adds up the steps."""
    return user.target is ntc.decode.default and bound(user)["code"] == "count"


def _exact_in(most: int) -> int:
    return functions.FLOAT if most < SINGLE else functions.DOUBLE


# ------------------------------------------------------------------------------------------------------------------ linear


@handles(ntc.integer_linear.default)
def _linear(w: Writer, node: Node) -> Value:
    a = bound(node)
    if _head_of(w, node) is not None:  # written with its readers, block by block
        return []
    part = "" if a["bias"] is None else "product"
    operands = _bytes(w, node)
    product = _wide_product(w, node, a["x"], a["weight"], part) if operands is None else w.call("MatMulInteger", operands, part)
    if a["bias"] is None:
        return product
    return w.call("Add", [product, w.operand(a["bias"], torch.int32, "bias")])


def _is_narrow(w: Writer, node: Node) -> bool:
    """Whether both operands have 8 bits."""
    a = bound(node)
    low, high = _interval(w, a["x"]).ends
    return w.program.tensor(a["weight"]).dtype == torch.int8 and high - min(low, 0) <= 255


def _bytes(w: Writer, node: Node) -> list[str] | None:
    """Operands of ``MatMulInteger``: unsigned activation, weight, zero point; None where one is wider than 8 bits."""
    if not _is_narrow(w, node):
        return None
    a = bound(node)
    x, weight = a["x"], a["weight"]
    low, high = _interval(w, x).ends
    table, zero = w.program.tensor(weight), max(-low, 0)
    left = _unsigned(w, x, zero)
    pair = (high + zero) * int(table.to(torch.int64).abs().topk(min(2, table.shape[1]), dim=1).values.sum(1).max())
    right = _weight(w, weight, halved=pair > _PAIR)
    if pair > _PAIR:
        left = _once(w, ("twice", left), lambda: w.call("Concat", [left, left], "twice", axis=-1))
    return [left, right, w.constant(zero, torch.uint8)]


# -------------------------------------------------------------------------------------------------------------------- head


def _head_of(w: Writer, node: Node) -> tuple[Node, Node, Node] | None:
    """The chain ``integer_linear``, ``requantize``, ``from_integer`` that a node is in, if it is to be written in blocks of channels.

    Logits in float64 are the largest values of the whole network, and what is done to them one by one takes longer than the product
    when they leave the cache in between.
    """
    chain = [node]
    while chain[-1].target is not ntc.from_integer.default:
        if len(chain) == 3 or len(chain[-1].users) != 1:
            return None
        chain.append(next(iter(chain[-1].users)))
    while len(chain) < 3:
        if chain[0].target not in (ntc.requantize.default, ntc.from_integer.default):
            return None
        chain.insert(0, bound(chain[0])["x"])
    linear, rescaled, last = chain
    if linear.target is not ntc.integer_linear.default or rescaled.target is not ntc.requantize.default:
        return None
    if len(linear.users) != 1 or len(rescaled.users) != 1:
        return None
    by_position = bound(rescaled)["multiplier"].meta["val"].dim() == 2
    wide = linear.meta["val"].shape[-1] >= 2 * BLOCK and _inside(w, rescaled)["product"] < WHOLE
    return (linear, rescaled, last) if wide and not by_position and _is_narrow(w, linear) else None


def _in_blocks(w: Writer, linear: Node, rescaled: Node, last: Node) -> str:
    """The chain for ``BLOCK`` channels at a time."""
    a, r = bound(linear), bound(rescaled)
    operands = _bytes(w, linear)
    assert operands is not None
    left, right, zero = operands
    channels = linear.meta["val"].shape[-1]
    sizes = w.constant([min(BLOCK, channels - start) for start in range(0, channels, BLOCK)], torch.int64)
    count = -(-channels // BLOCK)

    def parts(value: str, part: str, axis: int) -> list[str]:
        return w.call_many("Split", [value, sizes], count, part, axis=axis)

    weights = parts(right, "weight_block", 1)
    biases = None if a["bias"] is None else parts(w.operand(a["bias"], torch.int32, "bias"), "bias_block", 0)
    multiplier = w.name_of(r["multiplier"])
    multipliers = parts(multiplier, "multiplier_block", 0) if r["multiplier"].meta["val"].numel() > 1 else [multiplier] * count
    text, blocks = functions.requantize(False, True, functions.FLOAT), []
    for i in range(count):
        value = w.call("MatMulInteger", [left, weights[i], zero], f"product.{i}")
        if biases is not None:
            value = w.call("Add", [value, biases[i]], f"sum.{i}")
        value = _call(w, rescaled, text, [value, multipliers[i]], f"scaled.{i}", **{k: r[k] for k in ("shift", "low", "high")})
        blocks.append(_call(w, last, functions.from_integer(), [value], f"block.{i}", exponent=bound(last)["exponent"]))
    return w.call("Concat", blocks, axis=-1)


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
    if (chain := _head_of(w, node)) is not None:
        return _in_blocks(w, *chain)
    value = w.shared.get(("real", a["x"])) or w.name_of(a["x"])
    return _call(w, node, functions.from_integer(), [value], exponent=a["exponent"])
