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

import torch
from torch.fx import Node

from ntc_backends import onnx_integer_functions as functions
from ntc_backends.onnx_integer_neurons import product_of, unity
from ntc_backends.onnx_integer_norm import norm
from ntc_backends.onnx_integer_sums import is_real_sum
from ntc_backends.onnx_integer_widths import SINGLE, WHOLE, call, inside, interval, is_narrow, once, result_type, zero_point
from ntc_backends.onnx_writer import Value, Writer, bound, handles, onnx_type

__all__ = ["BLOCK", "SINGLE", "WHOLE"]

BLOCK = 512
"""Channels of the head that are taken at once: with 256 tokens, 1 MiB of float64."""

_PAIR = (1 << 15) - 1
"""What two neighbouring products may add up to on a processor that adds them in int16."""

ntc = torch.ops.ntc


@handles(ntc.integer_norm.default)
def _norm(w: Writer, node: Node) -> Value:
    a, held = bound(node), inside(w, node)
    most, channels, group = max(interval(w, a["x"]).magnitude, 1), a["x"].meta["val"].shape[-1], 1
    real = most << a["guard"] + 16 < 1 << 48 and most < 1 << 26 and 4 * channels * most**2 < 1 << 63
    real = real and held["normalised value times gain"] + (1 << a["shift"] + 8) < WHOLE
    while real and channels % (2 * group) == 0 and 2 * group * most**2 <= WHOLE:
        group *= 2
    given = {k: a[k] for k in ("epsilon", "guard", "shift", "low", "high")}
    zero = zero_point(w, node) if real else None
    text = norm(a["centre"], real, result_type(node) if zero is None else functions.UINT8, group)
    inputs = [w.shared.get(("real", a["x"])) or w.name_of(a["x"]), *(w.name_of(a[k]) for k in ("gain", "offset"))]
    return _stored(w, node, call(w, node, text, inputs, **(given if zero is None else given | {"zero": zero})), zero)


def _stored(w: Writer, node: Node, name: str, zero: int | None) -> Value:
    """The value of a node, or what its readers take in its place."""
    if zero is None:
        return name
    w.shared["unsigned", node] = name
    return []


@handles(ntc.requantize.default)
def _requantize(w: Writer, node: Node) -> Value:
    if _head_of(w, node) is not None:
        return []
    if _is_short(w, node) and node.users and all(is_real_sum(w, user) for user in node.users):
        w.shared["real", node] = _short(w, node, node)
        return []
    a, held = bound(node), inside(w, node)
    by_position = a["multiplier"].meta["val"].dim() == 2
    zero = zero_point(w, node)
    real = held["product"] + ((zero or 0) << a["shift"]) < WHOLE or _same_steps(w, node, zero or 0)
    zero = zero if real else None
    scaled = all(user.target is ntc.from_integer.default for user in node.users)
    to = functions.FLOAT if scaled else functions.UINT8 if zero is not None else result_type(node)
    layer = _layer_before(w, node)
    text = functions.requantize(by_position, real, to, layer is not None or _is_raised(w, node, to, held["product"]), layer is not None)
    given = {k: a[k] for k in ("shift", "low", "high")} | ({} if zero is None else {"zero": zero})
    x = w.shared.get(("product", a["x"])) or w.shared.get(("real", a["x"])) or w.name_of(a["x"])
    bias = [] if layer is None else [w.name_of(bound(layer)["bias"])]
    name = call(w, node, text, [x, w.name_of(a["multiplier"]), *bias], **given)
    if scaled:  # to float32, which holds these integers and is what all readers make of them
        w.shared["real", node] = name
        return []
    return _stored(w, node, name, zero)


def _layer_before(w: Writer, node: Node) -> Node | None:
    """The linear layer whose product, without its bias, a ``requantize`` takes: the bias is added to what it adds anyway."""
    if node.target is not ntc.requantize.default or zero_point(w, node) is not None:
        return None
    a = bound(node)
    layer: Node = a["x"]
    if layer.target is not ntc.integer_linear.default or len(layer.users) != 1 or bound(layer)["bias"] is None:
        return None
    if a["multiplier"].meta["val"].dim() == 2:
        return None
    if _is_short(w, node) and (_head_of(w, node) is not None or all(is_real_sum(w, user) for user in node.users)):
        return layer
    to = functions.FLOAT if all(user.target is ntc.from_integer.default for user in node.users) else result_type(node)
    return layer if _is_raised(w, node, to, _product(w, layer, node)) else None


def _product(w: Writer, layer: Node, node: Node) -> int:
    """Most of a layer's sums without their bias times the multiplier of the ``requantize`` behind, with its half."""
    bias, multiplier = (w.program.tensor(x).to(torch.int64).abs() for x in (bound(layer)["bias"], bound(node)["multiplier"]))
    return int((inside(w, layer)["accumulator"] + int(bias.max())) * int(multiplier.max()) + (1 << bound(node)["shift"]))


def _sums(w: Writer, layer: Node) -> torch.Tensor:
    """Most of the sums of each output, whatever the input, int64 ``[O]``."""
    a = bound(layer)
    most = w.program.tensor(a["weight"]).to(torch.int64).abs().sum(1) * interval(w, a["x"]).magnitude
    return most if a["bias"] is None else most + w.program.tensor(a["bias"]).to(torch.int64).abs()


def _is_short(w: Writer, node: Node) -> bool:
    """Whether a ``requantize`` of a layer's sums is exact in float32."""
    if node.target is not ntc.requantize.default:
        return False
    a, layer = bound(node), bound(node)["x"]
    if layer.target is not ntc.integer_linear.default or len(layer.users) != 1 or a["multiplier"].meta["val"].dim() == 2:
        return False
    multiplier = w.program.tensor(a["multiplier"]).to(torch.int64).abs()
    return bool(a["shift"] < 24 and int((_sums(w, layer) * multiplier).max()) + (1 << a["shift"] >> 1) < SINGLE)


def _short(w: Writer, at: Node, node: Node, exponent: int | None = None) -> str:
    """The function of such a ``requantize``; with an exponent, of the ``from_integer`` behind it too."""
    a, layer = bound(node), bound(node)["x"]
    bias = bound(layer)["bias"]
    product = w.name_of(layer) if bias is None else w.shared["product", layer]
    text = functions.rescale(a["shift"] > 0, _is_clipped(w, node), bias is not None, exponent is not None)
    inputs = [product, w.name_of(a["multiplier"]), *([] if bias is None else [w.name_of(bias)]), unity(w)]
    given = {k: a[k] for k in ("shift", "low", "high")} | ({} if exponent is None else {"exponent": exponent})
    return call(w, at, text, inputs, **given)


def _is_clipped(w: Writer, node: Node) -> bool:
    """Whether the result of a short ``requantize`` can be outside of its range."""
    a = bound(node)
    most = int((_sums(w, a["x"]) * w.program.tensor(a["multiplier"]).to(torch.int64).abs()).max())
    return bool((most + (1 << a["shift"] >> 1) >> a["shift"]) > min(-a["low"], a["high"]))


def _is_raised(w: Writer, node: Node, to: int, product: int) -> bool:
    """Whether results are rounded down by being cast to int32: raised by ``-low``, exact and within it."""
    a = bound(node)
    if to not in (functions.INT32, functions.FLOAT) or a["low"] >= 0 or (to == functions.FLOAT and a["high"] - a["low"] >= SINGLE):
        return False
    return bool(product - (a["low"] << a["shift"]) < WHOLE and (product >> a["shift"]) - a["low"] + 1 < 1 << 31)


def _same_steps(w: Writer, node: Node, zero: int) -> bool:
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
            rounded = (x.to(torch.float64) * f + (0.5 + zero)).floor().clamp(low + zero, high + zero).to(torch.int64) - zero
            if bool(((rounded < least) | (rounded > most)).any()):
                return False
    return True


@handles(ntc.integer_lookup.default)
def _lookup(w: Writer, node: Node) -> Value:
    a = bound(node)
    return call(w, node, functions.lookup(), [w.name_of(a["x"]), w.name_of(a["table"])], low=a["low"])


# ------------------------------------------------------------------------------------------------------------------ linear


@handles(ntc.integer_linear.default)
def _linear(w: Writer, node: Node) -> Value:
    a = bound(node)
    if (chain := _head_of(w, node)) is not None and not _is_exact_head(w, chain):  # written with its readers, block by block
        return []
    added = any(node in (product_of(w, u), _layer_before(w, u)) for u in node.users)
    part = "" if a["bias"] is None else "product"
    operands = _bytes(w, node)
    product = _wide_product(w, node, a["x"], a["weight"], part) if operands is None else w.call("MatMulInteger", operands, part)
    if a["bias"] is None:
        return product
    if added:  # by the reader
        w.shared["product", node] = product
        return []
    return w.call("Add", [product, w.operand(a["bias"], torch.int32, "bias")])


def _bytes(w: Writer, node: Node) -> list[str] | None:
    """Operands of ``MatMulInteger``: unsigned activation, weight, zero point; None where one is wider than 8 bits."""
    if not is_narrow(w, node):
        return None
    a = bound(node)
    x, weight = a["x"], a["weight"]
    low, high = interval(w, x).ends
    table, zero = w.program.tensor(weight), max(-low, 0)
    left = _unsigned(w, x, zero)
    pair = (high + zero) * int(table.to(torch.int64).abs().topk(min(2, table.shape[1]), dim=1).values.sum(1).max())
    right = _weight(w, weight, halved=pair > _PAIR)
    if pair > _PAIR:
        left = once(w, ("twice", left), lambda: w.call("Concat", [left, left], "twice", axis=-1))
    return [left, right, w.constant(zero, torch.uint8)]


# -------------------------------------------------------------------------------------------------------------------- head


def _head_of(w: Writer, node: Node) -> tuple[Node, Node, Node] | None:
    """The chain ``integer_linear``, ``requantize``, ``from_integer`` that a node is in, if it is to be written as one or block by block.

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
    wide = linear.meta["val"].shape[-1] >= 2 * BLOCK and inside(w, rescaled)["product"] < WHOLE
    if not is_narrow(w, linear) or by_position or not (wide or _is_exact_head(w, (linear, rescaled, last))):
        return None
    return linear, rescaled, last


def _is_exact_head(w: Writer, chain: tuple[Node, Node, Node]) -> bool:
    """Whether sums are logits but for a scale: the product, its scale and its bias are one op of ONNX Runtime then."""
    _, rescaled, last = chain
    exponent = bound(last)["exponent"] - bound(rescaled)["shift"]
    return _is_short(w, rescaled) and not bound(rescaled)["shift"] and not _is_clipped(w, rescaled) and -100 < exponent < 100


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
    biased = a["bias"] is not None
    biases = parts(w.operand(a["bias"], torch.int32, "bias"), "bias_block", 0) if biased else []
    multiplier = w.name_of(r["multiplier"])
    multipliers = parts(multiplier, "multiplier_block", 0) if r["multiplier"].meta["val"].numel() > 1 else [multiplier] * count
    raised = _is_raised(w, rescaled, functions.FLOAT, _product(w, linear, rescaled) if biased else inside(w, rescaled)["product"])
    text, blocks = functions.requantize(False, True, functions.FLOAT, raised, raised and biased), []
    for i in range(count):
        value = w.call("MatMulInteger", [left, weights[i], zero], f"product.{i}")
        inputs = [value, multipliers[i], *biases[i : i + 1]]
        if biased and not raised:
            inputs = [w.call("Add", [value, biases[i]], f"sum.{i}"), multipliers[i]]
        value = call(w, rescaled, text, inputs, f"scaled.{i}", **{k: r[k] for k in ("shift", "low", "high")})
        blocks.append(call(w, last, functions.from_integer(), [value], f"block.{i}", exponent=bound(last)["exponent"]))
    return w.call("Concat", blocks, axis=-1)


def _unsigned(w: Writer, x: Node, zero: int) -> str:
    """``x + zero`` as uint8, made once for all readers of x."""

    def make() -> str:
        raised = w.name_of(x)
        if zero:
            raised = w.call("Add", [w.operand(x, torch.int32, "wide"), w.constant(zero, torch.int32)], "raised")
        return w.call("Cast", [raised], "unsigned", to=onnx_type(torch.uint8))

    return once(w, ("unsigned", x), make)


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

    return once(w, ("halves" if halved else "transposed", weight), halves if halved else whole)


def _wide_product(w: Writer, node: Node, x: Node, weight: Node, part: str) -> str:
    """Operands of more than 8 bits: a product in floating point, exact below its limit."""
    most = inside(w, node)["accumulator"]
    dtype = torch.float32 if most < SINGLE else torch.float64
    right = w.call("Transpose", [w.operand(weight, dtype, "weight")], "weight_t", perm=[1, 0])
    product = w.call("MatMul", [w.operand(x, dtype, "x"), right], "real")
    return w.call("Cast", [product], part, to=onnx_type(torch.int32))


@handles(ntc.from_integer.default)
def _from_integer(w: Writer, node: Node) -> Value:
    a = bound(node)
    if (chain := _head_of(w, node)) is not None:
        return _short(w, node, chain[1], a["exponent"]) if _is_exact_head(w, chain) else _in_blocks(w, *chain)
    value = w.shared.get(("real", a["x"])) or w.name_of(a["x"])
    return call(w, node, functions.from_integer(), [value], exponent=a["exponent"])
