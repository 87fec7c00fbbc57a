"""How neurons, their counts and spiking attention of the integer grade are written; see ``onnx_integer``."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.interval import Interval
from ntc.ops.spec import spec_of
from ntc_backends import onnx_integer_functions as functions
from ntc_backends.onnx_integer_attention import attention
from ntc_backends.onnx_integer_trains import affine, attention_of_trains, follows, layout, trains
from ntc_backends.onnx_integer_widths import SINGLE, WHOLE, call, inside, interval, readers, zero_point
from ntc_backends.onnx_writer import Value, Writer, bound, functions_in, handles, onnx_type

__all__ = ["product_of", "unity"]

ntc = torch.ops.ntc

Form: TypeAlias = Literal["packed", "count", "steps"]


class Packing(NamedTuple):
    """How heads and tokens of a packed train lie (``onnx_integer_trains``)."""

    kv_heads: int
    groups: int
    period: int


_FORMS: WeakKeyDictionary[Writer, dict[Node, Form]] = WeakKeyDictionary()


def _form(w: Writer, node: Node) -> Form:
    """How a population is written: its train packed for attention, its counts where nobody reads the spikes one by one, or step by step."""
    known = _FORMS.setdefault(w, {})
    if node not in known:
        attended = next((u for u in node.users if u.target is ntc.integer_attention.default), None)
        if attended is not None and _takes_packed(w, attended):
            known[node] = "packed"
        else:
            known[node] = "count" if all(map(_counted, node.users)) and _closed_form(w, node) else "steps"
    return known[node]


def _counted(user: Node) -> bool:
    """Whether a reader only adds up the steps."""
    return user.target is ntc.decode.default and bound(user)["code"] == "count"


def product_of(w: Writer, node: Node) -> Node | None:
    """The linear layer whose product, without its bias, is what a population in closed form takes as its current."""
    if node.target is not ntc.integer_fire.default or _form(w, node) == "steps":
        return None
    return _layer_before(node)


def _layer_before(node: Node) -> Node | None:
    current: Node = bound(node)["current"]
    if current.target is not ntc.integer_linear.default or len(current.users) != 1 or bound(current)["bias"] is None:
        return None
    return current


def _constants_of(w: Writer, node: Node) -> tuple[Tensor, Tensor, Tensor | None]:
    """Threshold, start and the bias of the layer before, which the current then lacks; int64 ``[C]``."""
    a, layer = bound(node), _layer_before(node)
    channels = node.meta["val"].shape[-1]
    theta, start = (w.program.tensor(a[k]).to(torch.int64).expand(channels) for k in ("threshold", "start"))
    return theta, start, None if layer is None else w.program.tensor(bound(layer)["bias"]).to(torch.int64)


@handles(ntc.integer_fire.default)
def _fire(w: Writer, node: Node) -> Value:
    a, form = bound(node), _form(w, node)
    given = {k: a[k] for k in ("steps", "signed", "timed")} | {"comparison": ">=", "reset": "soft"}
    inputs = [w.name_of(a[k]) for k in ("threshold", "start")]
    if form == "steps":
        return call(w, node, functions.fire(a["steps"], a["signed"], a["timed"]), [w.name_of(a["current"]), *inputs], **given)
    layer = product_of(w, node)
    current = [w.name_of(a["current"])] if layer is None else [w.shared["product", layer]]
    bias = [] if layer is None else [w.name_of(bound(layer)["bias"])]
    # The value of this node is not what it is in the program, so it is kept beside.
    if form == "packed":
        packing = _packing(next(iter(node.users)), node)
        text = trains(a["steps"], a["signed"], layer is not None)
        lie: dict[str, Any] = {name: [size] for name, size in packing._asdict().items()} | {"channels": [node.meta["val"].shape[-1]]}
        _, pads, sizes, one = _layout(w, packing)
        w.shared["packed", node] = call(w, node, text, [*current, *inputs, *bias, one, pads, sizes], **given, **lie)
        return []
    unsigned = all(zero_point(w, user) == 0 for user in node.users)
    text = functions.count(a["steps"], a["signed"], layer is not None, functions.UINT8 if unsigned else functions.INT32)
    name = call(w, node, text, [*current, *inputs, *bias, unity(w)], **given)
    for user in node.users:
        w.shared["unsigned" if unsigned else "counts", user] = name
    return []


def _layout(w: Writer, packing: Packing) -> list[str]:
    """Length, pads, sizes and 1.0 (``onnx_integer_trains.layout``), made once for all trains that lie alike."""
    if ("layout 0", packing) not in w.shared:
        (function,) = functions_in(layout(*packing))
        w.functions.setdefault((function.domain, function.name, function.overload), function)
        made = w.call_many(function.name, ["input_ids"], 4, "layout", domain=function.domain, overload=function.overload)
        w.shared |= {(f"layout {i}", packing): name for i, name in enumerate(made)}
    return [w.shared[f"layout {i}", packing] for i in range(4)]


def unity(w: Writer) -> str:
    """1.0 that is no constant (``onnx_integer_functions.scale``)."""
    return _layout(w, Packing(1, 1, 1))[3]


def _closed_form(w: Writer, node: Node) -> bool:
    """Whether the count in float32 is the count, for every current: both do not decrease with it, so both sides of each step decide."""
    a = bound(node)
    if a["timed"]:
        return False
    theta, start, bias = _constants_of(w, node)
    steps, low = a["steps"], -a["steps"] if a["signed"] else 0
    factor = torch.tensor(float(2 * steps)) / (2 * theta.to(torch.float32))
    raised = start.to(torch.float32) + 0.5
    if bias is not None:
        raised = raised + bias.to(torch.float32) * float(steps)
    offset = raised / theta.to(torch.float32)
    level = torch.arange(low + 1, steps + 1).unsqueeze(1)
    # The least current whose count reaches a level: ceil((level theta - start) / T).
    reaches = -torch.div(start - level * theta, steps, rounding_mode="floor")
    for current, least, most in ((reaches, level, steps), (reaches - 1, low, level - 1)):
        for scaled in affine(current if bias is None else current - bias, factor, offset):
            counted = scaled.floor().clamp(low, steps).to(torch.int64)
            if bool(((counted < least) | (counted > most)).any()):
                return False
    return True


@handles(ntc.decode.default)
def _decode(w: Writer, node: Node) -> Value:
    a = bound(node)
    if any((kind, node) in w.shared for kind in ("unsigned", "real")):
        return []
    if ("counts", node) in w.shared:
        return w.shared["counts", node]
    if node.meta["val"].is_floating_point():
        spec = spec_of(node)
        assert spec is not None and spec.onnx is not None
        return w.call_function(node, spec.onnx)
    return call(w, node, functions.decode(), [w.name_of(a["train"])], code=a["code"])


# --------------------------------------------------------------------------------------------------------------- attention


@handles(ntc.integer_attention.default)
def _attention(w: Writer, node: Node) -> Value:
    a = bound(node)
    decoded = all(map(_counted, node.users))
    if _takes_packed(w, node):
        length = _layout(w, _packing(node, a["key"]))[0]
        names = [w.shared["packed", a[k]] for k in ("query", "key", "value")] + [w.name_of(a[k]) for k in ("growth", "renewal")]
        name = call(w, node, attention_of_trains(decoded), [*names, length], heads=a["heads"], kv_heads=a["kv_heads"], shift=a["shift"])
        return _counts(w, node, name, decoded, real=True)
    names = [w.name_of(a[k]) for k in ("query", "key", "value", "growth", "renewal") if a[k] is not None]
    name = call(w, node, _wide(w, node, decoded), names, heads=a["heads"], kv_heads=a["kv_heads"], shift=a["shift"])
    return _counts(w, node, name, decoded, real=False)


def _counts(w: Writer, node: Node, name: str, decoded: bool, real: bool) -> Value:
    """The value of the node, or of the decodes that read it; float32 stays float32 where all readers rescale it."""
    kind = "counts"
    if real and all(r.target is ntc.requantize.default for r in readers(node)):
        kind = "real"
    elif real:
        name = w.call("Cast", [name], "whole", to=onnx_type(torch.int32))
    if not decoded and kind == "counts":
        return name
    for user in node.users if decoded else [node]:
        w.shared[kind, user] = name
    return []


def _wide(w: Writer, node: Node, decoded: bool) -> str:
    """The function of any widths."""
    a, held = bound(node), inside(w, node)
    renewed = a["renewal"] is not None
    growth = w.program.tensor(a["growth"])
    query, key, value = (interval(w, a[k]).magnitude for k in ("query", "key", "value"))
    rows = a["key"].meta["val"].shape[-1] // a["kv_heads"]
    steps = a["query"].meta["val"].shape[0] if decoded else 1  # that one product adds up
    met, written = query * key * rows, key * value * int(growth.sum(1, dtype=torch.int64).max())
    inner, cross = steps * query * rows * written, steps * held["count"]
    if not renewed:
        inner, written = cross, value * int(growth.max())
    renewal = functions.DOUBLE if held.get("memory times renewal", 0) < WHOLE else functions.INT64
    return attention(renewed, decoded, _exact_in(met), _exact_in(inner), _exact_in(written), _exact_in(cross), renewal)


def _exact_in(most: int) -> int:
    return functions.FLOAT if most < SINGLE else functions.DOUBLE


def _packing(attended: Node, train: Node) -> Packing:
    """How attention reads a train."""
    a = bound(attended)
    period = int(a["growth"].meta["val"].shape[1])
    return Packing(a["kv_heads"], a["heads"] // a["kv_heads"] if train is a["query"] else 1, period)


def _takes_packed(w: Writer, node: Node) -> bool:
    """Whether attention is exact in float32 from end to end, and the neurons in front of it have nobody else to tell."""
    a = bound(node)
    given = [a[k] for k in ("query", "key", "value")]
    if a["renewal"] is None or a["shift"] < 1 or not all(t.target is ntc.integer_fire.default and set(t.users) == {node} for t in given):
        return False
    if len({_packing(node, t)[:2] for t in given}) > 1 and len(set(given)) < 3:
        return False  # one train in two layouts
    steps = a["query"].meta["val"].shape[0]
    if steps * inside(w, node)["count"] >= SINGLE or _renewed(w, node) >= SINGLE:
        return False
    return all(not bound(t)["timed"] and follows(*_constants_of(w, t), steps, bound(t)["signed"]) for t in given)


def _renewed(w: Writer, node: Node) -> int:
    """Most of twice a product of a renewal, without the half that rounding adds, plus one; head by head."""
    a, spec, one = bound(node), spec_of(node), Interval.of(-1, 1)
    assert spec is not None and spec.bound is not None
    growth, renewal = (w.program.tensor(a[k]) for k in ("growth", "renewal"))
    most = 0
    for head in range(a["kv_heads"]):
        tables = growth.expand(a["kv_heads"], -1)[head : head + 1], renewal.expand(a["kv_heads"])[head : head + 1]
        held = spec.bound(node, w.program.info.context, one, one, one, 1, 1, *tables, a["shift"])
        (product,) = (i.high for i in held.inside if i.what == "memory times renewal")
        most = max(most, 2 * product - (1 << a["shift"]) + 1)
    return most
