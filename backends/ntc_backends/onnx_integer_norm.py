"""The ONNX function of the integer norms; see ``onnx_integer_functions`` for how its arithmetic stays exact.

One form more:

- *round((x - m) 2^p / r)*, many x for one m and r: the whole number nearest to ``x rho + (nu - m rho)`` with ``rho = 2^p / r`` and
  ``nu = 1/(4 r)``. Without rounding, ``(x - m) 2^p / r`` is a multiple of ``1/(2 r)`` away from any half, so nu keeps it ``1/(4 r)``
  away and moves halves up. With ``|x| <= X`` and u = 2^-53 the roundings of rho, products and sums move it by less than
  ``8 X 2^p u / r``, which is less while ``X 2^p < 2^48``.
"""

from __future__ import annotations

from ntc_backends.onnx_integer_functions import ENDS, FLOOR_INT64, FLOOR_REAL, UINT8, clamped, onnx_function, without_comments, word

__all__ = ["norm"]

_ROOT = """
    one = Constant <value_int = 1> ()
    four = Constant <value_int = 4> ()
    guard_places = Constant <value_int: int = @guard> ()
    four_to_guard = Pow(four, guard_places)
    added = Constant <value_int: int = @epsilon> ()
    variance = Add(quotient, added)
    square = Mul(variance, four_to_guard)
    square_real = Cast <to = 11> (square)
    root_real = Sqrt(square_real)
    root_near = Cast <to = 7> (root_real)
    near_square = Mul(root_near, root_near)
    is_above = Greater(near_square, square)
    above = Cast <to = 7> (is_above)
    root_below = Sub(root_near, above)
    root_next = Add(root_below, one)
    next_square = Mul(root_next, root_next)
    is_reached = LessOrEqual(next_square, square)
    reached = Cast <to = 7> (is_reached)
    root_whole = Add(root_below, reached)
    is_nought = Less(root_whole, one)
    root = Where(is_nought, one, root_whole)
"""


def norm(centre: bool, real: bool, to: int, group: int = 1) -> str:
    """``IntegerNorm``.

    Args:
        centre: Whether the mean is taken off.
        real: In float64 but for a number per token; needs ``|x| 2^(guard + 16) < 2^48``, ``|x| < 2^26`` and scaled values below 2^53.
        to: Dtype of the result; uint8: with ``zero`` added, an attribute then.
        group: Number of neighbouring channels, a divisor of all, whose squares add up to at most 2^53: float64 does that; the rest int64.
    """
    words = ("centre" if centre else "", "float64" if real else "int64", f"group{group}" if real else "", word(to))
    attributes = "epsilon, guard, shift, low, high" + (", zero" if to == UINT8 else "")
    body = _norm_real(centre, to, group) if real else _norm_int64(centre, to)
    return onnx_function("IntegerNorm", words, attributes, "(x, gain, offset) => (y)", without_comments(body))


def _norm_real(centre: bool, to: int, group: int) -> str:
    body = f"""
    last = Constant <value_ints = [-1]> ()
    channels = Shape <start = -1> (x)
    values = Cast <to = 11> (x)
    group = Constant <value_ints = [{group}]> ()
    rows = Shape <start = 0, end = -1> (x)
    grouped_sizes = Concat <axis = 0> (rows, last, group)
    grouped = Reshape(values, grouped_sizes)
    squares = ReduceSumSquare <keepdims = 0> (grouped, last)
    squares_int = Cast <to = 7> (squares)
    """
    if centre:  # sum (x - m)^2 = sum x^2 - m (2 sum x - C m), so that differences are not needed for it
        body += """
    squares_all = ReduceSum(squares_int, last)
    two_int = Constant <value_int = 2> ()
    half_channels = Div(channels, two_int)
    half_channels_real = Cast <to = 11> (half_channels)
    channels_real = Cast <to = 11> (channels)
    total = ReduceSum(values, last)
    total_half = Add(total, half_channels_real)
    mean_quotient = Div(total_half, channels_real)
    mean = Floor(mean_quotient)
    mean_int = Cast <to = 7> (mean)
    total_int = Cast <to = 7> (total)
    total_twice = Mul(total_int, two_int)
    means = Mul(mean_int, channels)
    rest = Sub(total_twice, means)
    taken = Mul(mean_int, rest)
    squares_sum = Sub(squares_all, taken)
    """
    else:
        body += "squares_sum = ReduceSum(squares_int, last)\n"
    body += "quotient = Div(squares_sum, channels)\n" + _ROOT + ENDS + FLOOR_REAL + """
    sixteen = Constant <value = double {16.0}> ()
    guard_real = Cast <to = 11> (guard_places)
    binary_places = Add(guard_real, sixteen)
    unit = Pow(two, binary_places)
    root_double = Cast <to = 11> (root)
    rho = Div(unit, root_double)
    quarter = Constant <value = double {0.25}> ()
    nu = Div(quarter, root_double)
    """
    # The nearest whole number of x rho + (nu - m rho): one channel for each token, so that this is one pass.
    body += f"""
    {"mean_scaled = Mul(mean, rho)  beside = Sub(nu, mean_scaled)" if centre else "beside = Identity(nu)"}
    rho_row = Reshape(rho, last)
    beside_row = Reshape(beside, last)
    nought = Constant <value = double {{0.0}}> ()
    unity = Constant <value = double {{1.0}}> ()
    tokens = Shape(rho_row)
    noughts = Expand(nought, tokens)
    units = Expand(unity, tokens)
    one_row = Constant <value_ints = [1]> ()
    token_sizes = Concat <axis = 0> (one_row, tokens, channels)
    by_token = Reshape(values, token_sizes)
    near = BatchNormalization <epsilon = 0.0> (by_token, rho_row, beside_row, noughts, units)
    n = Round(near)
    gain_real = Cast <to = 11> (gain)
    offset_real = Cast <to = 11> (offset)
    gain_scaled = Mul(gain_real, fraction)
    offset_scaled = Mul(offset_real, fraction)
    offset_half = Add(offset_scaled, half)
    gained = Mul(n, gain_scaled)
    """
    body += clamped("gained", "offset_half", to)
    return body + "    sizes = Shape(x)  y = Reshape(narrow, sizes)\n"


def _norm_int64(centre: bool, to: int) -> str:
    body = """
    last = Constant <value_ints = [-1]> ()
    channels = Shape <start = -1> (x)
    values = Cast <to = 7> (x)
    """
    if centre:
        body += """
    wide = Constant <value_int = 4294967296> ()
    two_of_mean = Constant <value_int = 2> ()
    half_channels = Div(channels, two_of_mean)
    raise_mean = Mul(channels, wide)
    raise_sum = Add(raise_mean, half_channels)
    total = ReduceSum(values, last)
    total_raised = Add(total, raise_sum)
    mean_raised = Div(total_raised, channels)
    mean = Sub(mean_raised, wide)
    d = Sub(values, mean)
    """
    else:
        body += "d = Identity(values)\n"
    body += "squares_int = Mul(d, d)\n"
    body += "squares_sum = ReduceSum(squares_int, last)  quotient = Div(squares_sum, channels)\n" + _ROOT + ENDS
    body += """
    sixteen = Constant <value = double {16.0}> ()
    guard_real = Cast <to = 11> (guard_places)
    binary_places = Add(guard_real, sixteen)
    unit = Pow(two, binary_places)
    unit_int = Cast <to = 7> (unit)
    # Negative numerators are raised by 2^31 roots: |n| is less than 2^31.
    raise_n = Constant <value_int = 2147483648> ()
    two_of_root = Constant <value_int = 2> ()
    raised_roots = Mul(root, raise_n)
    half_root = Div(root, two_of_root)
    raise_d = Add(raised_roots, half_root)
    d_shifted = Mul(d, unit_int)
    d_raised = Add(d_shifted, raise_d)
    n_raised = Div(d_raised, root)
    n = Sub(n_raised, raise_n)
    gain_int = Cast <to = 7> (gain)
    offset_int = Cast <to = 7> (offset)
    gained = Mul(n, gain_int)
    scaled = Add(gained, offset_int)
    """
    return body + FLOOR_INT64 + f"    y = Cast <to = {to}> (clamped)\n"
