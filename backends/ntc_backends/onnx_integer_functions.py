"""Bodies of the ONNX functions of the integer grade, in the text syntax of ``onnx.parser``.

Each op has a body for every arithmetic that its proven widths may allow (float32 or float64, in which integers are exact up to a limit;
else int64), so the bodies stand here and not with the ops. How they stay exact:

- *floor(a / 2^k)* of int64 with ``|a| < 2^62``: division in ONNX Runtime truncates, so a is made positive first:
  ``(a + 2^62) / 2^k - 2^(62-k)``.
- *floor(a / 2^k)* of float64 with ``|a| < 2^53``: multiplication by ``2^-k`` is exact, and so is ``floor``.
- *floor(a / b)* of float64 with ``|a| < 2^53``, b > 0: a quotient that is no integer is at least ``1 / b`` below the next one, which is
  more than its rounding error ``|a / b| 2^-53``.
- *round(d 2^p / r)*, many d for one r: ``floor(d rho + nu)`` with ``rho = 2^p / r`` and ``nu = 1/2 + 1/(4 r)``. Without rounding,
  ``d 2^p / r + 1/2`` is a multiple of ``1 / (2 r)``, so nu keeps it ``1 / (4 r)`` away from any integer: more than the roundings of
  rho, product and sum can do while ``|d| 2^p < 2^48``.

No ``Min``, ``Max`` or ``Clip`` of int64: in ONNX Runtime up to 1.31 they compare wrongly on x86 beyond 2^31 (microsoft/onnxruntime#25280).
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "DOUBLE", "FLOAT", "INT32", "INT64", "count", "decode", "fire", "from_integer", "lookup", "norm", "onnx_function", "requantize",
    "without_comments", "word",
]

FLOAT, INT32, INT64, DOUBLE = 1, 6, 7, 11
"""ONNX's numbers of dtypes."""


def onnx_function(name: str, overload: Iterable[str], attributes: str, signature: str, body: str) -> str:
    """The text of a function of domain ``ntc``; empty words are left out of its overload."""
    words = ".".join(filter(None, overload))
    return f'<domain: "ntc", overload: "{words}", opset_import: ["": 20]> {name} <{attributes}> {signature} {{{body}}}'


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

_ENDS = """
    two = Constant <value = double {2.0}> ()
    half = Constant <value = double {0.5}> ()
    places = Constant <value_int: int = @shift> ()
    places_real = Cast <to = 11> (places)
    whole = Pow(two, places_real)
    least_int = Constant <value_int: int = @low> ()
    most_int = Constant <value_int: int = @high> ()
"""

_FLOOR_REAL = """
    fraction = Reciprocal(whole)
    least = Cast <to = 11> (least_int)
    most = Cast <to = 11> (most_int)
"""

_FLOOR_INT64 = """
    whole_int = Cast <to = 7> (whole)
    two_int = Constant <value_int = 2> ()
    half_int = Div(whole_int, two_int)
    far = Constant <value_int = 4611686018427387904> ()
    far_shifted = Div(far, whole_int)
    positive = Add(half_int, far)
    raised = Add(scaled, positive)
    quotient_raised = Div(raised, whole_int)
    rounded = Sub(quotient_raised, far_shifted)
    rounded_real = Cast <to = 11> (rounded)
    least = Cast <to = 11> (least_int)
    most = Cast <to = 11> (most_int)
    clamped = Clip(rounded_real, least, most)
"""


def norm(centre: bool, real: bool, to: int, group: int = 1) -> str:
    """``IntegerNorm``.

    Args:
        centre: Whether the mean is taken off.
        real: In float64; needs differences below 2^26, shifted ones below 2^48, and scaled values below 2^53.
        to: Dtype of the result.
        group: Number of neighbouring channels, a divisor of all, whose squares add up to at most 2^53: float64 does that; the rest int64.
    """
    kind = DOUBLE if real else INT64
    body = f"""
    last = Constant <value_ints = [-1]> ()
    channels = Shape <start = -1> (x)
    values = Cast <to = {kind}> (x)
    """
    if centre and real:
        body += """
    two_int = Constant <value_int = 2> ()
    half_channels = Div(channels, two_int)
    half_channels_real = Cast <to = 11> (half_channels)
    channels_real = Cast <to = 11> (channels)
    total = ReduceSum(values, last)
    total_half = Add(total, half_channels_real)
    mean_quotient = Div(total_half, channels_real)
    mean = Floor(mean_quotient)
    d = Sub(values, mean)
    """
    elif centre:
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
    if real:
        body += f"""
    group = Constant <value_ints = [{group}]> ()
    rows = Shape <start = 0, end = -1> (x)
    grouped_sizes = Concat <axis = 0> (rows, last, group)
    grouped = Reshape(d, grouped_sizes)
    squares = ReduceSumSquare <keepdims = 0> (grouped, last)
    squares_int = Cast <to = 7> (squares)
    """
    else:
        body += "squares_int = Mul(d, d)\n"
    body += "squares_sum = ReduceSum(squares_int, last)  quotient = Div(squares_sum, channels)\n"
    body += _ROOT + _ENDS
    body += """
    sixteen = Constant <value = double {16.0}> ()
    guard_real = Cast <to = 11> (guard_places)
    binary_places = Add(guard_real, sixteen)
    unit = Pow(two, binary_places)
    """
    if real:
        body += (
            _FLOOR_REAL
            + f"""
    root_double = Cast <to = 11> (root)
    rho = Div(unit, root_double)
    quarter = Constant <value = double {{0.25}}> ()
    nudge = Div(quarter, root_double)
    nu = Add(half, nudge)
    product = Mul(d, rho)
    product_half = Add(product, nu)
    n = Floor(product_half)
    gain_real = Cast <to = 11> (gain)
    offset_real = Cast <to = 11> (offset)
    gain_scaled = Mul(gain_real, fraction)
    offset_scaled = Mul(offset_real, fraction)
    offset_half = Add(offset_scaled, half)
    gained = Mul(n, gain_scaled)
    scaled = Add(gained, offset_half)
    rounded = Floor(scaled)
    clamped = Clip(rounded, least, most)
    y = Cast <to = {to}> (clamped)
    """
        )
    else:
        body += (
            """
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
            + _FLOOR_INT64
            + f"    y = Cast <to = {to}> (clamped)\n"
        )
    attributes = "epsilon, guard, shift, low, high"
    words = ("centre" if centre else "", "float64" if real else "int64", f"group{group}" if real else "", word(to))
    return onnx_function("IntegerNorm", words, attributes, "(x, gain, offset) => (y)", without_comments(body))


def requantize(by_position: bool, real: bool, to: int) -> str:
    """``Requantize``; ``real`` needs products with their half below 2^53."""
    body = _ENDS
    if real:
        body += (
            _FLOOR_REAL
            + """
    multiplier_real = Cast <to = 11> (multiplier)
    table = Mul(multiplier_real, fraction)
    values = Cast <to = 11> (x)
    """
        )
    else:
        body += "table = Cast <to = 7> (multiplier)  values = Cast <to = 7> (x)\n"
    if by_position:
        body += """
    length_row = Shape <start = -2, end = -1> (x)
    length = Squeeze(length_row)
    zero = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    positions = Range(zero, length, step)
    period = Shape <start = 0, end = 1> (multiplier)
    rows = Mod(positions, period)
    factor = Gather <axis = 0> (table, rows)
    """
    else:
        body += "factor = Identity(table)\n"
    if real:
        body += "scaled = Mul(values, factor)  scaled_half = Add(scaled, half)  rounded = Floor(scaled_half)\n"
        body += "clamped = Clip(rounded, least, most)\n"
    else:
        body += "scaled = Mul(values, factor)\n" + _FLOOR_INT64
    body += f"y = Cast <to = {to}> (clamped)\n"
    words = ("position" if by_position else "", "float64" if real else "int64", word(to))
    return onnx_function("Requantize", words, "shift, low, high", "(x, multiplier) => (y)", body)


def lookup() -> str:
    """``IntegerLookup``."""
    return onnx_function("IntegerLookup", (), "low", "(x, table) => (y)", """
    low_value = Constant <value_int: int = @low> ()
    first = Cast <to = 6> (low_value)
    values = Cast <to = 6> (x)
    index = Sub(values, first)
    y = Gather <axis = 0> (table, index)
    """)  # fmt: skip


def fire(steps: int, signed: bool, timed: bool) -> str:
    """``IntegerFire``, step by step in int32: what a membrane is stored as."""
    body = "axis = Constant <value_ints = [0]> ()  zero = Constant <value = int32 {0}> ()\n"
    body += "theta = Cast <to = 6> (threshold)  v_0 = Cast <to = 6> (start)  drive = Cast <to = 6> (current)\n"
    if timed and steps > 1:
        body += ", ".join(f"x_{t + 1}" for t in range(steps)) + f" = Split <axis = 0, num_outputs = {steps}> (drive)\n"
    elif timed:
        body += "x_1 = Identity(drive)\n"
    else:
        body += "held = Unsqueeze(drive, axis)\n"
    for t in range(1, steps + 1):
        body += f"u_{t} = Add(v_{t - 1}, {f'x_{t}' if timed else 'held'})  fires_{t} = GreaterOrEqual(u_{t}, theta)  "
        if signed:
            body += f"up_{t} = Cast <to = 6> (fires_{t})  falls_{t} = Less(u_{t}, zero)  down_{t} = Cast <to = 6> (falls_{t})  "
            body += f"s_{t} = Sub(up_{t}, down_{t})  "
        else:
            body += f"s_{t} = Cast <to = 6> (fires_{t})  "
        body += f"spikes_{t} = Cast <to = 3> (s_{t})  "
        if t < steps:
            body += f"drop_{t} = Mul(s_{t}, theta)  v_{t} = Sub(u_{t}, drop_{t})\n"
    body += f"spikes = Concat <axis = 0> ({', '.join(f'spikes_{t}' for t in range(1, steps + 1))})\n"
    words = ("signed" if signed else "", "timed" if timed else "", f"steps{steps}")
    return onnx_function("IntegerFire", words, "steps, signed, timed, comparison, reset", "(current, threshold, start) => (spikes)", body)


def count(steps: int, signed: bool) -> str:
    """``IntegerFire`` of a constant current where only the counts are read: ``floor((start + T x) / theta)`` in float32, clipped.

    ``floor(x f + a)`` with ``f = T / theta`` and ``a = (start + 1/2) / theta``, which is monotone in x like the count itself: the writer
    compares the two on both sides of each step of the staircase, for each channel, and takes this variant where they agree.
    """
    low = -float(steps) if signed else 0.0
    return onnx_function("IntegerFire", ("signed" if signed else "", "count"), "steps, signed, timed, comparison, reset",
        "(current, threshold, start) => (counts)", f"""
    steps_int = Constant <value_int: int = @steps> ()
    steps_real = Cast <to = 1> (steps_int)
    half = Constant <value = float {{0.5}}> ()
    least = Constant <value = float {{{low}}}> ()
    theta = Cast <to = 1> (threshold)
    factor = Div(steps_real, theta)
    start_real = Cast <to = 1> (start)
    start_half = Add(start_real, half)
    offset = Div(start_half, theta)
    x = Cast <to = 1> (current)
    scaled = Mul(x, factor)
    level = Add(scaled, offset)
    {"whole = Floor(level)" if signed else "whole = Identity(level)"}
    clipped = Clip(whole, least, steps_real)
    counts = Cast <to = 6> (clipped)
    """)  # fmt: skip


def decode() -> str:
    """``Decode`` of an integer train: the sum, in int32."""
    return onnx_function("Decode", ("count", "integer"), "code", "(train) => (value)", """
    time = Constant <value_ints = [0]> ()
    wide = Cast <to = 6> (train)
    value = ReduceSum <keepdims = 0> (wide, time)
    """)  # fmt: skip


def from_integer() -> str:
    """``FromInteger``."""
    return onnx_function("FromInteger", (), "exponent", "(x) => (y)", """
    two = Constant <value = double {2.0}> ()
    places = Constant <value_int: int = @exponent> ()
    places_real = Cast <to = 11> (places)
    unit_real = Pow(two, places_real)
    unit = Cast <to = 1> (unit_real)
    values = Cast <to = 1> (x)
    y = Mul(values, unit)
    """)  # fmt: skip


def word(dtype: int) -> str:
    """Name of a dtype."""
    return {1: "float32", 3: "int8", 5: "int16", 6: "int32", 7: "int64", 11: "float64"}[dtype]


def without_comments(text: str) -> str:
    """The text without lines that begin with ``#``, which the parser does not know."""
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
