"""Spiking attention of the integer grade in float32 alone, and the neurons in front of it: their ONNX functions, and how trains lie there.

Where every count and every product of a renewal stays below 2^24 (``ntc_passes.quantize.attention`` makes it so where it can), the neurons
give their trains as attention reads them, *packed*: float32 ``[P, B, Hk, T, g, R, D]`` for P renewal periods of R tokens, the last one
filled up; ``Hk g`` heads of D channels. So no train is moved or converted in between, and a period is one slice of the first axis.

Exactness:

- **Trains.** With a constant current x and ``0 <= start <= theta`` the spikes up to step t number
  ``clip(floor((start + t x) / theta), 0, t)`` (signed: from -t), which is ``round(z + ... + z + a)``, t times z, with
  ``z = clip(x / theta, 0, 1)`` and ``a = (start + 1/2) / theta - 1/2``. In float32 each of these operations is monotone in x, as the
  number is: the writer compares the two on both sides of each step of the staircase, for each channel and t, and takes this form where
  they agree (``follows``). A train is the differences.
- **Products** are sums of integers whose magnitudes add up to less than 2^24.
- **Renewals.** ``floor(m n / 2^s + 1/2)`` is the integer nearest to ``(2 m n + 1) / 2^(s+1)``, which is never half way: exact while
  ``|2 m n| + 1 < 2^24``. ``BatchNormalization`` of variance 1 is one pass for the product and the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ntc_backends.onnx_integer_functions import onnx_function, scale, without_comments

__all__ = ["affine", "attention_of_trains", "follows", "layout", "pack", "trains", "unpack"]


_AS_IT_IS = "moved = Identity(scaled)"


def unpack(packed: Tensor, length: int) -> Tensor:
    """``[P, B, Hk, T, g, R, D]`` as ``[T, B, L, C]``."""
    moved = packed.permute(3, 1, 0, 5, 2, 4, 6)  # [T, B, P, R, Hk, g, D]
    return moved.flatten(4).flatten(2, 3)[:, :, :length]


def pack(train: Tensor, kv_heads: int, groups: int, period: int) -> Tensor:
    """``[T, B, L, C]`` as float32 ``[P, B, Hk, T, g, R, D]``; what fills the last period up is 0."""
    steps, batch, length, channels = train.shape
    filled = torch.nn.functional.pad(train.to(torch.float32), (0, 0, 0, -length % period))
    split = filled.reshape(steps, batch, -1, period, kv_heads, groups, channels // (kv_heads * groups))
    return split.permute(2, 1, 4, 0, 5, 3, 6).contiguous()


def follows(threshold: Tensor, start: Tensor, bias: Tensor | None, steps: int, signed: bool) -> bool:
    """Whether ``trains`` is the neuron for every current, by both sides of each step of its staircase.

    Args:
        threshold: theta > 0, int64 ``[C]``.
        start: In ``[0, theta]``, int64 ``[C]``.
        bias: Added to the product that the function gets as the current, int64 ``[C]``, or None.
        steps: T.
        signed: Ternary spikes.
    """
    theta = threshold.to(torch.float32)
    factor, offset = 1 / theta, (start.to(torch.float32) + 0.5) / theta - 0.5
    moved = torch.zeros_like(theta) if bias is None else bias.to(torch.float32) / theta
    low = -1.0 if signed else 0.0
    for t in range(1, steps + 1):
        least = -t if signed else 0
        level = torch.arange(least + 1, t + 1).unsqueeze(1)
        # The least current whose number reaches a level: ceil((level theta - start) / t).
        reaches = -torch.div(start - level * threshold, t, rounding_mode="floor")
        for current, fewest, most in ((reaches, level, t), (reaches - 1, least, level - 1)):
            for scaled in affine(current if bias is None else current - bias, factor, moved):
                z = scaled.clamp(low, 1.0)
                total = z + offset
                for _ in range(t - 1):
                    total = total + z
                number = total.round()
                if bool(((number < fewest) | (number > most)).any()):
                    return False
    return True


def affine(x: Tensor, factor: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """``x factor + offset`` in float32 with a rounding after the product and with one in all: loaders may do either."""
    wide = x.to(torch.float32).to(torch.float64) * factor.to(torch.float64) + offset.to(torch.float64)
    return x.to(torch.float32) * factor + offset, wide.to(torch.float32)


def layout(kv_heads: int, groups: int, period: int) -> str:
    """``TrainLayout``: of token ids, what fills the last period up, the sizes that split a train, and 1.0."""
    return onnx_function("TrainLayout", (f"{kv_heads}x{groups}", f"period{period}"), "", "(ids) => (length, pads, sizes, unity)", f"""
    first = Constant <value_ints = [0]> ()
    any = Constant <value_ints = [-1]> ()
    short = Constant <value_ints = [{period - 1}]> ()
    period = Constant <value_ints = [{period}]> ()
    heads = Constant <value_ints = [{period}, {kv_heads}, 1, {groups}, -1]> ()
    nothing = Constant <value_ints = [0, 0, 0, 0]> ()
    batch = Shape <start = 0, end = 1> (ids)
    length = Shape <start = 1, end = 2> (ids)
    filled = Add(length, short)
    periods = Div(filled, period)
    longer = Mul(periods, period)
    missing = Sub(longer, length)
    pads = Concat <axis = 0> (nothing, missing, first)
    sizes = Concat <axis = 0> (batch, periods, heads)
    one = Constant <value = float {{1.0}}> ()
    length_real = Cast <to = 1> (length)
    unity = Clip(length_real, one, one)
    """)  # fmt: skip


def trains(steps: int, signed: bool, biased: bool) -> str:
    """``IntegerFire`` of a constant current, its train packed; ``biased``: the current lacks its bias, which is an input."""
    low = -1.0 if signed else 0.0
    body = f"""
    theta = Cast <to = 1> (threshold)
    theta_twice = Add(theta, theta)
    unit = Constant <value = float {{1.0}}> ()
    two_units = Constant <value = float {{2.0}}> ()
    half = Constant <value = float {{0.5}}> ()
    least = Constant <value = float {{{low}}}> ()
    # Not 1 / theta: a loader would make a division of the product by it.
    factor = Div(two_units, theta_twice)
    {scale("factor")}
    {"bias_real = Cast <to = 1> (bias)  offset = Div(bias_real, theta)  moved = Add(scaled, offset)" if biased else _AS_IT_IS}
    level = Clip(moved, least, unit)
    padded = Pad(level, pads)
    split = Reshape(padded, sizes)
    # [P, B, Hk, 1, g, R, D]: rows of D numbers move, once for all steps.
    z = Transpose <perm = [1, 0, 3, 4, 5, 2, 6]> (split)
    one = Constant <value_ints = [1]> ()
    any = Constant <value_ints = [-1]> ()
    hk = Constant <value_ints: ints = @kv_heads> ()
    groups = Constant <value_ints: ints = @groups> ()
    period = Constant <value_ints: ints = @period> ()
    start_real = Cast <to = 1> (start)
    start_half = Add(start_real, half)
    start_level = Div(start_half, theta)
    nearest = Sub(start_level, half)
    # The product of a layer must have one reader to become one op with what scales it: so its shape is not read.
    channels = Constant <value_ints: ints = @channels> ()
    # One for each neuron of a period, so that adding it is one pass over whole rows.
    nearest_wide = Expand(nearest, channels)
    nearest_sizes = Concat <axis = 0> (one, one, hk, one, groups, one, any)
    nearest_split = Reshape(nearest_wide, nearest_sizes)
    rows = Concat <axis = 0> (one, one, one, one, one, period, one)
    a = Expand(nearest_split, rows)
    w_1 = Add(z, a)
    c_1 = Round(w_1)
    s_1 = Identity(c_1)
    """
    for t in range(2, steps + 1):
        body += f"w_{t} = Add(w_{t - 1}, z)  c_{t} = Round(w_{t})  s_{t} = Sub(c_{t}, c_{t - 1})\n"
    body += f"spikes = Concat <axis = 3> ({', '.join(f's_{t}' for t in range(1, steps + 1))})\n"
    words = ("signed" if signed else "", "packed", "biased" if biased else "", f"steps{steps}")
    return onnx_function(
        "IntegerFire", words, "steps, signed, timed, comparison, reset, kv_heads, groups, period, channels",
        f"(current, threshold, start{', bias' if biased else ''}, unity, pads, sizes) => (spikes)", without_comments(body),
    )  # fmt: skip


def attention_of_trains(decoded: bool) -> str:
    """``IntegerAttention`` of packed trains: period by period, so that nothing leaves the cache between two products.

    Args:
        decoded: Whether the result is the sum over the steps, ``[B, L, C]``; else ``[T, B, L, C]``. Float32 in both cases.
    """
    body = """
    first = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    any = Constant <value_ints = [-1]> ()
    batch = Shape <start = 1, end = 2> (query)
    hk = Shape <start = 2, end = 3> (query)
    steps = Shape <start = 3, end = 4> (query)
    groups = Shape <start = 4, end = 5> (query)
    period = Shape <start = 1> (growth)
    size = Shape <start = 6> (query)
    tail = Shape <start = 6> (value)
    # Q [P, B, Hk, T, g R, D]: heads that share a key head are rows of one product. K and V [P, B, Hk, T, R, D]
    same = Constant <value_ints = [0, 0, 0, 0, -1]> ()
    q_sizes = Concat <axis = 0> (same, size)
    v_sizes = Concat <axis = 0> (same, tail)
    q = Reshape(query, q_sizes)
    k = Reshape(key, q_sizes)
    v = Reshape(value, v_sizes)
    # Growth, for each key of the period: [Hk, 1, g R, R] with what is not causal left out, and [Hk, 1, R, D].
    weight = Cast <to = 1> (growth)
    weight_axes = Constant <value_ints = [1, 2]> ()
    weight_columns = Unsqueeze(weight, weight_axes)
    unit = Constant <value = float {1.0}> ()
    square_sizes = Concat <axis = 0> (period, period)
    square = Expand(unit, square_sizes)
    causal = Trilu <upper = 0> (square)
    seen_once = Mul(causal, weight_columns)
    times = Concat <axis = 0> (one, one, groups, one)
    seen = Tile(seen_once, times)
    row_axes = Constant <value_ints = [1, 3]> ()
    weight_rows = Unsqueeze(weight, row_axes)
    row_sizes = Concat <axis = 0> (one, one, one, size)
    grown = Expand(weight_rows, row_sizes)
    # M (2 renewal) / 2^(shift + 1) + 1 / 2^(shift + 1), rounded to the nearest: never half way.
    two = Constant <value = double {2.0}> ()
    places = Constant <value_int: int = @shift> ()
    places_real = Cast <to = 11> (places)
    whole_wide = Pow(two, places_real)
    whole = Cast <to = 1> (whole_wide)
    two_real = Constant <value = float {2.0}> ()
    twice = Mul(whole, two_real)
    nudge = Reciprocal(twice)
    renewal_real = Cast <to = 1> (renewal)
    keep_some = Div(renewal_real, whole)
    keep = Expand(keep_some, hk)
    nudges = Expand(nudge, hk)
    nought = Constant <value = float {0.0}> ()
    noughts = Expand(nought, hk)
    units = Expand(unit, hk)
    entries_row = Concat <axis = 0> (steps, size, tail)
    entries = ReduceProd(entries_row, first)
    memory_sizes = Concat <axis = 0> (batch, hk, entries)
    empty = Expand(nought, memory_sizes)
    """
    if decoded:
        # [S_1 | ... | S_T] [V_1; ...; V_T] and [Q_1 | ... | Q_T] [M_1; ...; M_T]: one product each for all steps.
        products = """
        met_moved = Transpose <perm = [0, 1, 3, 2, 4]> (met_seen)
        met_rows = Reshape(met_moved, joined)
        v_rows = Reshape(v_p, stacked)
        inner = MatMul(met_rows, v_rows)
        q_moved = Transpose <perm = [0, 1, 3, 2, 4]> (q_p)
        q_rows = Reshape(q_moved, joined)
        m_rows = Reshape(m, stacked)
        outer = MatMul(q_rows, m_rows)
        """
        body += "joined = Constant <value_ints = [0, 0, 0, -1]> ()  pair = Constant <value_ints = [0, 0, -1]> ()\n"
        body += "stacked = Concat <axis = 0> (pair, tail)\n"
    else:
        products = """
        inner = MatMul(met_seen, v_p)
        m_split = Reshape(m, memory_split)
        outer = MatMul(q_p, m_split)
        """
        body += "memory_split = Concat <axis = 0> (batch, hk, steps, size, tail)\n"
    body += f"""
    flat = Constant <value_ints = [0, 0, -1]> ()
    memory, counted = Scan <num_scan_inputs = 3, body = period_step (m, q_p, k_p, v_p) => (m_next, counts_p) {{
        k_turned = Transpose <perm = [0, 1, 2, 4, 3]> (k_p)
        met = MatMul(q_p, k_turned)
        met_seen = Mul(met, seen)
        {products}
        counts_p = Add(inner, outer)
        k_grown = Mul(k_p, grown)
        k_grown_turned = Transpose <perm = [0, 1, 2, 4, 3]> (k_grown)
        written = MatMul(k_grown_turned, v_p)
        written_flat = Reshape(written, flat)
        m_end = Add(m, written_flat)
        kept = BatchNormalization <epsilon = 0.0> (m_end, keep, nudges, noughts, units)
        m_next = Round(kept)
    }}> (empty, q, k, v)
    """
    if decoded:
        body += """
    back_sizes = Concat <axis = 0> (any, batch, hk, groups, period, tail)
    split = Reshape(counted, back_sizes)
    back = Transpose <perm = [1, 0, 4, 2, 3, 5]> (split)
    lead = Identity(batch)
    token_axis = Identity(one)
    """
    else:
        body += """
    back_sizes = Concat <axis = 0> (any, batch, hk, steps, groups, period, tail)
    split = Reshape(counted, back_sizes)
    back = Transpose <perm = [3, 1, 0, 5, 2, 4, 6]> (split)
    lead = Concat <axis = 0> (steps, batch)
    token_axis = Constant <value_ints = [2]> ()
    """
    body += """
    periods = Shape <start = 0, end = 1> (query)
    longer = Mul(periods, period)
    heads_row = Mul(hk, groups)
    channels = Mul(heads_row, tail)
    padded_sizes = Concat <axis = 0> (lead, longer, channels)
    padded = Reshape(back, padded_sizes)
    counts = Slice(padded, first, length, token_axis)
    """
    words = ("renewal", "packed", "decoded" if decoded else "", "float32")
    signature = "(query, key, value, growth, renewal, length) => (counts)"
    return onnx_function("IntegerAttention", words, "heads, kv_heads, shift", signature, without_comments(body))
