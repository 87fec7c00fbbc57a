"""The ONNX function of spiking attention of the integer grade; see ``onnx_integer_functions`` for how its arithmetic stays exact.

No token waits for another: between two renewals the products of all tokens are taken at once, and only the memory goes from period to
period.
"""

from __future__ import annotations

from ntc_backends.onnx_integer_functions import DOUBLE, onnx_function, without_comments, word

__all__ = ["attention"]

_SIZES = """
    first = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    any = Constant <value_ints = [-1]> ()
    kv = Constant <value_int: int = @kv_heads> ()
    all = Constant <value_int: int = @heads> ()
    hk = Unsqueeze(kv, first)
    share = Div(all, kv)
    groups = Unsqueeze(share, first)
    lead = Shape <start = 0, end = 2> (query)
    length = Shape <start = 2, end = 3> (query)
    batch = ReduceProd(lead, first)
"""


def attention(renewed: bool, met: int, inner: int, written: int, cross: int, renewal: int) -> str:
    """``IntegerAttention``: all periods at once, but for the memory, which goes from period to period in a ``Scan``.

    Each dtype is one in which its products are exact.

    Args:
        renewed: Whether there is a renewal; without one this is the plain causal product.
        met: Of coincidences of queries and keys, times growth.
        inner: Of those times values: the counts that come from the same period.
        written: Of what a period adds to the memory.
        cross: Of queries times memory: the counts that come from earlier periods.
        renewal: Of memory times renewal: float64 or int64.
    """
    body, attributes = _SIZES, "heads, kv_heads, shift"
    if not renewed:
        # [TB, L, Hk, g, D], [TB, L, Hk, 1, D]: heads that share a memory lie beside each other.
        body += f"""
    q_sizes = Concat <axis = 0> (batch, length, hk, groups, any)
    kv_sizes = Concat <axis = 0> (batch, length, hk, one, any)
    q_split = Reshape(query, q_sizes)
    k_split = Reshape(key, kv_sizes)
    v_split = Reshape(value, kv_sizes)
    q_spikes = Transpose <perm = [0, 2, 3, 1, 4]> (q_split)
    k_spikes = Transpose <perm = [0, 2, 3, 4, 1]> (k_split)
    v_spikes = Transpose <perm = [0, 2, 3, 1, 4]> (v_split)
    q = Cast <to = {met}> (q_spikes)
    k = Cast <to = {met}> (k_spikes)
    v = Cast <to = {inner}> (v_spikes)
    met = MatMul(q, k)
    causal_met = Trilu <upper = 0> (met)
    causal = Cast <to = {inner}> (causal_met)
    read = MatMul(causal, v)
    factor_rows = CastLike(growth, read)
    factor_sizes = Constant <value_ints = [-1, 1, 1, 1]> ()
    factor = Reshape(factor_rows, factor_sizes)
    grown = Mul(read, factor)
    back = Transpose <perm = [0, 3, 1, 2, 4]> (grown)
    whole = Cast <to = 6> (back)
    result_sizes = Concat <axis = 0> (lead, length, any)
    counts = Reshape(whole, result_sizes)
    """
        signature = "(query, key, value, growth) => (counts)"
        return onnx_function("IntegerAttention", (word(inner),), attributes, signature, without_comments(body))
    body += f"""
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
    q_sizes = Concat <axis = 0> (batch, periods, period, hk, groups, any)
    kv_sizes = Concat <axis = 0> (batch, periods, period, hk, one, any)
    q_split = Reshape(q_padded, q_sizes)
    k_split = Reshape(k_padded, kv_sizes)
    v_split = Reshape(v_padded, kv_sizes)
    # [TB, Hk, P, g, R, D], [TB, Hk, P, 1, D, R], [TB, Hk, P, 1, R, Dv]
    q_spikes = Transpose <perm = [0, 3, 1, 4, 2, 5]> (q_split)
    k_spikes = Transpose <perm = [0, 3, 1, 4, 5, 2]> (k_split)
    v_spikes = Transpose <perm = [0, 3, 1, 4, 2, 5]> (v_split)
    q = Cast <to = {met}> (q_spikes)
    k = Cast <to = {met}> (k_spikes)
    v_inner = Cast <to = {inner}> (v_spikes)
    v_written = Cast <to = {written}> (v_spikes)
    weight = Cast <to = {met}> (growth)
    weight_axes = Constant <value_ints = [1, 2, 3]> ()
    weight_split = Unsqueeze(weight, weight_axes)
    weight_square_sizes = Concat <axis = 0> (one, one, one, period, one)
    weight_square = Expand(weight_split, weight_square_sizes)
    seen = Trilu <upper = 0> (weight_square)
    met = MatMul(q, k)
    met_grown = Mul(met, seen)
    met_inner = Cast <to = {inner}> (met_grown)
    inner = MatMul(met_inner, v_inner)
    k_grown = Mul(k, weight_split)
    k_written = Cast <to = {written}> (k_grown)
    written = MatMul(k_written, v_written)
    written_wide = Cast <to = {renewal}> (written)
    state_shape_lead = Shape <start = 0, end = 2> (written)
    state_shape_tail = Shape <start = 3> (written)
    state_shape = Concat <axis = 0> (state_shape_lead, state_shape_tail)
    nought_value = Constant <value_float = 0.0> ()
    nought = CastLike(nought_value, written_wide)
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
    body += f"""
    memory, starts = Scan <num_scan_inputs = 1, scan_input_axes = [2], scan_output_axes = [2],
        body = period_step (m, s) => (m_next, start) {{
        {step}
        m_next = Add(start, s)
    }}> (empty, written_wide)
    starts_real = Cast <to = {cross}> (starts)
    q_cross = Cast <to = {cross}> (q)
    outer = MatMul(q_cross, starts_real)
    {_summed(inner, cross)}
    back = Transpose <perm = [0, 2, 4, 1, 3, 5]> (sum)
    padded_sizes = Concat <axis = 0> (lead, longer, any)
    padded = Reshape(back, padded_sizes)
    token_axis = Constant <value_ints = [2]> ()
    counts = Slice(padded, first, length, token_axis)
    """
    words, signature = ("renewal", *map(word, (met, inner, written, cross, renewal))), "(query, key, value, growth, renewal) => (counts)"
    return onnx_function("IntegerAttention", words, attributes, signature, without_comments(body))


def _summed(inner: int, cross: int) -> str:
    if inner == cross == DOUBLE:
        return "sum_real = Add(inner, outer)  sum = Cast <to = 6> (sum_real)"
    return "inner_whole = Cast <to = 6> (inner)  outer_whole = Cast <to = 6> (outer)  sum = Add(inner_whole, outer_whole)"
