"""The streaming ops of the integer grade in ONNX: the next tokens and a state of int32 in, the program's own integers out.

How the arithmetic stays exact is said in ``onnx_integer_functions``; the widths that are proven for the whole context (``ntc.widths``)
choose the dtypes here too. They hold for tokens within the model's context that began with a state of zeros.

Spiking attention takes its tokens in chunks that end where renewal periods do, as the kernel does, so one token is one small chunk and a
prompt is one for each period. The memory is int32 from end to end: what renews or reads it goes through floating point (a renewal that
may pass ``2^53`` through int64) and comes back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ntc_backends.onnx_integer_attention import SIZES
from ntc_backends.onnx_integer_functions import DOUBLE, FLOAT, INT64, factor_by_position, onnx_function, without_comments, word
from ntc_backends.onnx_integer_widths import SINGLE, WHOLE, inside, interval
from ntc_backends.onnx_writer import Value, Writer, bound, functions_in, handles, onnx_type

__all__ = ["attention_stream", "requantize_stream"]

ntc = torch.ops.ntc


def _exact_in(most: int) -> int:
    return FLOAT if most < SINGLE else DOUBLE


def _call(w: Writer, text: str, inputs: list[str], outputs: int, **attributes: Any) -> list[str]:
    """A call of a local function given by its text."""
    (function,) = functions_in(text)
    w.functions.setdefault((function.domain, function.name, function.overload), function)
    return w.call_many(function.name, inputs, outputs, domain=function.domain, overload=function.overload, **attributes)


# -------------------------------------------------------------------------------------------------------------- requantize


@handles(ntc.requantize_stream.default)
def _requantize(w: Writer, node: Node) -> Value:
    a = bound(node)
    by_position = a["multiplier"].meta["val"].dim() == 2
    kind = DOUBLE if inside(w, node)["product"] < WHOLE else INT64
    text = requantize_stream(by_position, kind, onnx_type(node.meta["val"].dtype))
    (name,) = _call(w, text, [w.name_of(a[k]) for k in ("x", "multiplier", "start")], 1, **{k: a[k] for k in ("shift", "low", "high")})
    return name


def requantize_stream(by_position: bool, kind: int, to: int) -> str:
    """``Requantize`` of tokens that begin at position ``start``, int64 ``[1]``.

    Args:
        by_position: Whether the multiplier has rows, one for each position in a period.
        kind: Float64, where products with their half are below 2^53, or int64.
        to: Dtype of the result.
    """
    body = _shift(kind) + _factor(kind, "multiplier", "table")
    if by_position:
        body += factor_by_position("start")
    else:
        body += "factor = Identity(table)\n"
    body += f"""
    values = Cast <to = {kind}> (x)
    scaled = Mul(values, factor)
    {_rounded(kind, "scaled", "rounded")}
    rounded_real = Cast <to = 11> (rounded)
    low_int = Constant <value_int: int = @low> ()
    high_int = Constant <value_int: int = @high> ()
    least = Cast <to = 11> (low_int)
    most = Cast <to = 11> (high_int)
    clamped = Clip(rounded_real, least, most)
    y = Cast <to = {to}> (clamped)
    """
    words = ("position" if by_position else "", "start", word(kind), word(to))
    return onnx_function("Requantize", words, "shift, low, high", "(x, multiplier, start) => (y)", body)


def _shift(kind: int) -> str:
    """What ``round(a / 2^shift)`` needs, in float64 or int64: see ``onnx_integer_functions``."""
    body = """
    two = Constant <value = double {2.0}> ()
    places = Constant <value_int: int = @shift> ()
    places_real = Cast <to = 11> (places)
    whole = Pow(two, places_real)
    """
    if kind == DOUBLE:
        return body + "half = Constant <value = double {0.5}> ()  fraction = Reciprocal(whole)\n"
    return body + """
    whole_int = Cast <to = 7> (whole)
    two_int = Constant <value_int = 2> ()
    half = Div(whole_int, two_int)
    far = Constant <value_int = 4611686018427387904> ()
    far_shifted = Div(far, whole_int)
    positive = Add(half, far)
    """


def _factor(kind: int, name: str, result: str) -> str:
    """A multiplier as ``_rounded`` takes its products: in float64 the places are shifted off already, which is exact."""
    if kind == DOUBLE:
        return f"{result}_real = Cast <to = 11> ({name})  {result} = Mul({result}_real, fraction)\n"
    return f"{result} = Cast <to = 7> ({name})\n"


def _rounded(kind: int, product: str, result: str) -> str:
    """``round(product / 2^shift)``."""
    if kind == DOUBLE:
        return f"{result}_half = Add({product}, half)  {result} = Floor({result}_half)"
    quotient = f"{result}_raised = Add({product}, positive)  {result}_high = Div({result}_raised, whole_int)"
    return f"{quotient}  {result} = Sub({result}_high, far_shifted)"


# --------------------------------------------------------------------------------------------------------------- attention


@handles(ntc.integer_attention_stream.default)
def _attention(w: Writer, node: Node) -> Value:
    a, held = bound(node), inside(w, node)
    renewed = a["renewal"] is not None
    query, key, value = (interval(w, a[k]).magnitude for k in ("query", "key", "value"))
    rows = a["key"].meta["val"].shape[-1] // a["kv_heads"]
    met, cross = query * key * rows, held["count"]
    if renewed:  # a chunk is within one period
        written = key * value * int(w.program.tensor(a["growth"]).sum(1, dtype=torch.int64).max())
        inner = query * rows * written
    else:
        written, inner = held["memory"], cross
    renewal = DOUBLE if held.get("memory times renewal", 0) < WHOLE else INT64
    text = attention_stream(renewed, _exact_in(met), _exact_in(inner), _exact_in(written), _exact_in(cross), renewal)
    names = ["query", "key", "value", "state", "growth", *(("renewal", "position") if renewed else ())]
    return _call(w, text, [w.name_of(a[k]) for k in names], 2, heads=a["heads"], kv_heads=a["kv_heads"], shift=a["shift"])


_SPLIT = SIZES + """
    lead = Shape <start = 0, end = 2> (query)
    rows = ReduceProd(lead, first)
    q_sizes = Concat <axis = 0> (rows, length, hk, groups, any)
    kv_sizes = Concat <axis = 0> (rows, length, hk, one, any)
    q_split = Reshape(query, q_sizes)
    k_split = Reshape(key, kv_sizes)
    v_split = Reshape(value, kv_sizes)
    # With N for T B: Q [N, Hk, g, L, D], K turned [N, Hk, 1, D, L], V [N, Hk, 1, L, Dv], M [N, Hk, 1, D, Dv].
    q_spikes = Transpose <perm = [0, 2, 3, 1, 4]> (q_split)
    k_spikes = Transpose <perm = [0, 2, 3, 4, 1]> (k_split)
    v_spikes = Transpose <perm = [0, 2, 3, 1, 4]> (v_split)
    sides = Shape <start = 3> (state)
    memory_sizes = Concat <axis = 0> (rows, hk, one, sides)
    memory = Reshape(state, memory_sizes)
    # Growth [Hk, R] becomes [Hk, 1, R, 1].
    weight_axes = Constant <value_ints = [1, 3]> ()
    weight_ints = Unsqueeze(growth, weight_axes)
"""

_MERGE = """
    rows_back = Transpose <perm = [0, 3, 1, 2, 4]> (counted_all)
    merged = Concat <axis = 0> (lead, length, any)
    counts = Reshape(rows_back, merged)
    whole_state = Shape(state)
    state_next = Reshape(memory_end, whole_state)
"""

_CHUNK = """
    number_row = Reshape(number, one)
    from = Mul(number_row, period)
    begin_of_period = Sub(from, offset)
    is_first = Less(number_row, one)
    begin = Where(is_first, first, begin_of_period)
    end = Add(begin_of_period, period)
    q = Slice(q_all, begin, end, token_axis)
    k = Slice(k_all, begin, end, turned_axis)
    v = Slice(v_all, begin, end, token_axis)
    row = Sub(begin, begin_of_period)
    tokens = Shape <start = 3, end = 4> (q)
    row_end = Add(row, tokens)
    g = Slice(weight, row, row_end, row_axis)
    place = Add(position, begin)
    begins_period = Equal(row, first)
    has_past = Greater(place, first)
    renews_row = And(begins_period, has_past)
    renews = Squeeze(renews_row)
"""


def attention_stream(renewed: bool, met: int, inner: int, written: int, cross: int, renewal: int) -> str:
    """``IntegerAttentionStream``: counts of the next tokens, and the memory behind them.

    Each dtype is one in which its products are exact.

    Args:
        renewed: Whether there is a renewal; without one all tokens are one chunk.
        met: Of coincidences of queries and keys.
        inner: Of those times the values, which carry the growth: the counts that come from the same chunk.
        written: Of what a chunk adds to the memory.
        cross: Of queries times memory: the counts that come from earlier tokens.
        renewal: Of memory times renewal: float64 or int64.
    """
    body = _SPLIT
    suffix = ("_all", "_before") if renewed else ("", "")
    body += f"""
    q{suffix[0]} = Cast <to = {met}> (q_spikes)
    k{suffix[0]} = Cast <to = {met}> (k_spikes)
    v{suffix[0]} = Cast <to = {written}> (v_spikes)
    {"weight" if renewed else "g"} = Cast <to = {written}> (weight_ints)
    """
    products = _products(inner, written, cross)
    if renewed:
        body += f"""
    {_shift(renewal)}
    {_factor(renewal, "renewal", "keep_flat")}
    # One for each key head, [Hk, 1, 1, 1].
    keep_axes = Constant <value_ints = [1, 2, 3]> ()
    keep = Unsqueeze(keep_flat, keep_axes)
    token_axis = Constant <value_ints = [3]> ()
    turned_axis = Constant <value_ints = [4]> ()
    row_axis = Constant <value_ints = [2]> ()
    period = Shape <start = 1, end = 2> (growth)
    offset = Mod(position, period)
    behind = Add(offset, length)
    short = Sub(period, one)
    filled = Add(behind, short)
    chunks = Div(filled, period)
    always_row = Greater(one, first)
    always = Squeeze(always_row)
    nothing = SequenceEmpty <dtype = 6> ()
    memory_end, parts = Loop <body = chunk (int64 number, bool going, m_before, before) => (going_on, m_next, after) {{
    {_CHUNK}
    m = If (renews) <
        then_branch = renewed () => (m_renewed) {{
            m_wide = Cast <to = {renewal}> (m_before)
            m_scaled = Mul(m_wide, keep)
            {_rounded(renewal, "m_scaled", "m_rounded")}
            m_renewed = Cast <to = 6> (m_rounded)
        }},
        else_branch = kept () => (m_kept) {{ m_kept = Identity(m_before) }}
    >
    {products}
    after = SequenceInsert(before, counted)
    going_on = Identity(going)
    }}> (chunks, always, memory, nothing)
    counted_all = ConcatFromSequence <axis = 3> (parts)
    """
    else:
        body += f"m = Identity(memory)\n{products}\n    memory_end = Identity(m_next)  counted_all = Identity(counted)\n"
    body += _MERGE
    words = ["renewal" if renewed else "", *map(word, (met, inner, written, cross)), word(renewal) if renewed else ""]
    signature = f"(query, key, value, state, growth{', renewal, position' if renewed else ''}) => (counts, state_next)"
    return onnx_function("IntegerAttentionStream", words, "heads, kv_heads, shift", signature, without_comments(body))


def _products(inner: int, written: int, cross: int) -> str:
    """Counts of a chunk and the memory behind it."""
    return f"""
    met = MatMul(q, k)
    causal = Trilu <upper = 0> (met)
    met_inner = Cast <to = {inner}> (causal)
    v_grown = Mul(v, g)
    v_inner = Cast <to = {inner}> (v_grown)
    inner = MatMul(met_inner, v_inner)
    q_cross = Cast <to = {cross}> (q)
    m_cross = Cast <to = {cross}> (m)
    outer = MatMul(q_cross, m_cross)
    inner_whole = Cast <to = 6> (inner)
    outer_whole = Cast <to = 6> (outer)
    counted = Add(inner_whole, outer_whole)
    k_written = Cast <to = {written}> (k)
    written = MatMul(k_written, v_grown)
    written_whole = Cast <to = 6> (written)
    m_next = Add(m, written_whole)"""
