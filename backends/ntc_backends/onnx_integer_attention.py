"""The ONNX function of spiking attention of the integer grade; see ``onnx_integer_functions`` for how its arithmetic stays exact.

No token waits for another: between two renewals the products of all tokens are taken at once, and only the memory goes from period to
period.

Where a ``decode`` adds up the steps and nobody else reads them (``decoded``), it is part of the function: for each token
``sum_t Q_t M_t = [Q_1 | ... | Q_T] [M_1; ...; M_T]`` is one product instead of T, and nothing behind it has T times the size.
"""

from __future__ import annotations

from ntc_backends.onnx_integer_functions import DOUBLE, onnx_function, without_comments, word

__all__ = ["SIZES", "attention"]

SIZES = """
    first = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    any = Constant <value_ints = [-1]> ()
    kv = Constant <value_int: int = @kv_heads> ()
    all = Constant <value_int: int = @heads> ()
    hk = Unsqueeze(kv, first)
    share = Div(all, kv)
    groups = Unsqueeze(share, first)
    length = Shape <start = 2, end = 3> (query)
"""

_DECODED = """
    steps = Shape <start = 0, end = 1> (query)
    lead = Shape <start = 1, end = 2> (query)
    batch = Identity(lead)
"""

_TIMED = """
    steps = Identity(one)
    lead = Shape <start = 0, end = 2> (query)
    batch = ReduceProd(lead, first)
"""


def attention(renewed: bool, decoded: bool, met: int, inner: int, written: int, cross: int, renewal: int) -> str:
    """``IntegerAttention``: all periods at once, but for the memory, which goes from period to period in a ``Scan``.

    Each dtype is one in which its products are exact. Without renewals there is one period, as long as the sequence.

    Args:
        renewed: Whether there is a renewal; without one this is the plain causal product.
        decoded: Whether the result is the sum over the steps, ``[B, L, C]``.
        met: Of coincidences of queries and keys.
        inner: Of those times the values, which carry the growth: the counts that come from the same period.
        written: Of what a period adds to the memory.
        cross: Of queries times memory: the counts that come from earlier periods.
        renewal: Of memory times renewal: float64 or int64.
    """
    body = SIZES + (_DECODED if decoded else _TIMED)
    if renewed:
        body += """
    period = Shape <start = 1, end = 2> (growth)
    short = Sub(period, one)
    filled = Add(length, short)
    periods = Div(filled, period)
    longer = Mul(periods, period)
    missing = Sub(longer, length)
    nothing = Constant <value_ints = [0, 0, 0, 0, 0, 0]> ()
    pads_end = Concat <axis = 0> (missing, first)
    pads = Concat <axis = 0> (nothing, pads_end)
    q_padded = Pad(query, pads)
    k_padded = Pad(key, pads)
    v_padded = Pad(value, pads)
    """
    else:
        body += "period = Identity(length)  periods = Identity(one)  longer = Identity(length)\n"
        body += "q_padded = Identity(query)  k_padded = Identity(key)  v_padded = Identity(value)\n"
    body += f"""
    q_sizes = Concat <axis = 0> (steps, batch, periods, period, hk, groups, any)
    kv_sizes = Concat <axis = 0> (steps, batch, periods, period, hk, one, any)
    q_split = Reshape(q_padded, q_sizes)
    k_split = Reshape(k_padded, kv_sizes)
    v_split = Reshape(v_padded, kv_sizes)
    # Q [P, B, Hk, g, T, R, D], K [P, B, Hk, 1, T, R, D], V [P, B, Hk, 1, T, R, Dv]: rows of D bytes move.
    q_spikes = Transpose <perm = [2, 1, 4, 5, 0, 3, 6]> (q_split)
    k_moved = Transpose <perm = [2, 1, 4, 5, 0, 3, 6]> (k_split)
    # The same shape: it keeps ONNX Runtime from making one transposition, byte by byte, of the one above and the one that MatMul does.
    k_sizes = Concat <axis = 0> (periods, batch, hk, one, steps, period, any)
    k_spikes = Reshape(k_moved, k_sizes)
    v_spikes = Transpose <perm = [2, 1, 4, 5, 0, 3, 6]> (v_split)
    q = Cast <to = {met}> (q_spikes)
    k = Cast <to = {met}> (k_spikes)
    k_turned = Transpose <perm = [0, 1, 2, 3, 4, 6, 5]> (k)
    met = MatMul(q, k_turned)
    ones_value = Constant <value = float {{1.0}}> ()
    ones_like = CastLike(ones_value, met)
    square_sizes = Concat <axis = 0> (period, period)
    square = Expand(ones_like, square_sizes)
    causal = Trilu <upper = 0> (square)
    met_causal = Mul(met, causal)
    # Beside each other in the row of their query: [P, B, Hk, g, R, T R]
    met_rows = Transpose <perm = [0, 1, 2, 3, 5, 4, 6]> (met_causal)
    met_sizes = Constant <value_ints = [0, 0, 0, 0, 0, -1]> ()
    met_flat = Reshape(met_rows, met_sizes)
    met_inner = Cast <to = {inner}> (met_flat)
    # Growth [Hk, R] becomes [Hk, 1, 1, R, 1].
    weight_axes = Constant <value_ints = [1, 2, 4]> ()
    weight_ints = Unsqueeze(growth, weight_axes)
    weight = Cast <to = {written}> (weight_ints)
    v = Cast <to = {written}> (v_spikes)
    v_grown = Mul(v, weight)
    tail = Shape <start = 6> (v_grown)
    flat_sizes = Concat <axis = 0> (periods, batch, hk, one, any, tail)
    v_flat = Reshape(v_grown, flat_sizes)
    v_inner = Cast <to = {inner}> (v_flat)
    inner = MatMul(met_inner, v_inner)
    """
    if renewed:
        body += _renewals(met, inner, written, cross, renewal)
    else:
        body += "sum = Cast <to = 6> (inner)\n"
    body += """
    back = Transpose <perm = [1, 0, 4, 2, 3, 5]> (sum)
    padded_sizes = Concat <axis = 0> (lead, longer, any)
    padded = Reshape(back, padded_sizes)
    """
    if renewed:
        body += f"""
    token_axis = Constant <value_ints = [{1 if decoded else 2}]> ()
    counts = Slice(padded, first, length, token_axis)
    """
    else:
        body += "counts = Identity(padded)\n"
    words = ["renewal" if renewed else "", "decoded" if decoded else "", *map(word, (met, inner, written))]
    words += map(word, (cross, renewal)) if renewed else ()
    signature = f"(query, key, value, growth{', renewal' if renewed else ''}) => (counts)"
    return onnx_function("IntegerAttention", words, "heads, kv_heads, shift", signature, without_comments(body))


def _renewals(met: int, inner: int, written: int, cross: int, renewal: int) -> str:
    """The memory at the start of each period, ``[P, B, Hk, 1, T D, Dv]``, and the counts that it gives."""
    body = f"""
    k_written = {"Identity(k_turned)" if met == written else f"Cast <to = {written}> (k_turned)"}
    written = MatMul(k_written, v_grown)
    written_flat = Reshape(written, flat_sizes)
    state_shape = Shape <start = 1> (written_flat)
    nought_value = Constant <value = double {{0.0}}> ()
    nought = Cast <to = {renewal}> (nought_value)
    empty = Expand(nought, state_shape)
    keep_axes = Constant <value_ints = [1, 2, 3]> ()
    two = Constant <value = double {{2.0}}> ()
    places = Constant <value_int: int = @shift> ()
    places_real = Cast <to = 11> (places)
    whole_renewal = Pow(two, places_real)
    """
    if renewal == DOUBLE:
        body += """
    half = Constant <value = double {0.5}> ()
    fraction = Reciprocal(whole_renewal)
    renewal_real = Cast <to = 11> (renewal)
    keep_flat = Mul(renewal_real, fraction)
    keep = Unsqueeze(keep_flat, keep_axes)
    """
        step = "kept = Mul(m, keep)  kept_half = Add(kept, half)  start = Floor(kept_half)"
    else:
        body += """
    whole_int = Cast <to = 7> (whole_renewal)
    two_int = Constant <value_int = 2> ()
    half = Div(whole_int, two_int)
    far = Constant <value_int = 4611686018427387904> ()
    far_shifted = Div(far, whole_int)
    positive = Add(half, far)
    keep_flat = Cast <to = 7> (renewal)
    keep = Unsqueeze(keep_flat, keep_axes)
    """
        step = "kept = Mul(m, keep)  raised = Add(kept, positive)  lower = Div(raised, whole_int)  start = Sub(lower, far_shifted)"
    # Scanned along the first axis: along any other one ONNX Runtime moves every element by itself, 15 times as slow as all the rest.
    return body + f"""
    memory, starts = Scan <num_scan_inputs = 1, body = period_step (m, s) => (m_next, start) {{
        {step}
        s_wide = Cast <to = {renewal}> (s)
        m_next = Add(start, s_wide)
    }}> (empty, written_flat)
    starts_real = {"Identity(starts)" if cross == renewal else f"Cast <to = {cross}> (starts)"}
    q_rows = Transpose <perm = [2, 1, 4, 5, 3, 0, 6]> (q_split)
    q_row_sizes = Constant <value_ints = [0, 0, 0, 0, 0, -1]> ()
    q_flat = Reshape(q_rows, q_row_sizes)
    q_cross = Cast <to = {cross}> (q_flat)
    outer = MatMul(q_cross, starts_real)
    {_summed(inner, cross)}
    """


def _summed(inner: int, cross: int) -> str:
    if inner == cross:
        return "sum_real = Add(inner, outer)  sum = Cast <to = 6> (sum_real)"
    return "inner_whole = Cast <to = 6> (inner)  outer_whole = Cast <to = 6> (outer)  sum = Add(inner_whole, outer_whole)"
