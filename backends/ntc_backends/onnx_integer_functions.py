"""Bodies of the ONNX functions of the integer grade, in the text syntax of ``onnx.parser``.

Each op has a body for every arithmetic that its proven widths may allow (float32 or float64, in which integers are exact up to a limit;
else int64), so the bodies stand here and not with the ops. How they stay exact:

- *floor(a / 2^k)* of int64 with ``|a| < 2^62``: division in ONNX Runtime truncates, so a is made positive first:
  ``(a + 2^62) / 2^k - 2^(62-k)``.
- *floor(a / 2^k)* of float64 with ``|a| < 2^53``: multiplication by ``2^-k`` is exact, and so is ``floor``.
- *floor(a / b)* of float64 with ``|a| < 2^53``, b > 0: a quotient that is no integer is at least ``1 / b`` below the next one, which is
  more than its rounding error ``|a / b| 2^-53``.

No ``Min``, ``Max`` or ``Clip`` of int64: in ONNX Runtime up to 1.31 they compare wrongly on x86 beyond 2^31 (microsoft/onnxruntime#25280).
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "DOUBLE", "ENDS", "FLOAT", "FLOOR_INT64", "FLOOR_REAL", "INT32", "INT64", "UINT8", "clamped", "count", "decode",
    "factor_by_position", "fire", "from_integer", "lookup", "onnx_function", "requantize", "rescale", "scale", "without_comments", "word",
]

FLOAT, UINT8, INT32, INT64, DOUBLE = 1, 2, 6, 7, 11
"""ONNX's numbers of dtypes."""


def onnx_function(name: str, overload: Iterable[str], attributes: str, signature: str, body: str) -> str:
    """The text of a function of domain ``ntc``; empty words are left out of its overload."""
    words, given = ".".join(filter(None, overload)), f"<{attributes}> " if attributes else ""
    return f'<domain: "ntc", overload: "{words}", opset_import: ["": 20]> {name} {given}{signature} {{{body}}}'


ENDS = """
    two = Constant <value = double {2.0}> ()
    half = Constant <value = double {0.5}> ()
    places = Constant <value_int: int = @shift> ()
    places_real = Cast <to = 11> (places)
    whole = Pow(two, places_real)
    least_int = Constant <value_int: int = @low> ()
    most_int = Constant <value_int: int = @high> ()
"""

FLOOR_REAL = """
    fraction = Reciprocal(whole)
    least = Cast <to = 11> (least_int)
    most = Cast <to = 11> (most_int)
"""

FLOOR_INT64 = """
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


_WITH_BIAS = """
    bias_real = Cast <to = 11> (bias)
    bias_scaled = Mul(bias_real, factor)
    added = Add(bias_scaled, half_raised)
"""


def clamped(product: str, half: str, to: int) -> str:
    """``narrow`` of a scaled value and what is added to it, the half with it; where nothing is negative, being cast rounds it down."""
    if to == UINT8:
        return f"""
    zero_int = Constant <value_int: int = @zero> ()
    zero_real = Cast <to = 11> (zero_int)
    raised_half = Add({half}, zero_real)
    raised = Add({product}, raised_half)
    raised_least = Add(least, zero_real)
    raised_most = Add(most, zero_real)
    clamped = Clip(raised, raised_least, raised_most)
    narrow = Cast <to = {to}> (clamped)
    """
    return f"""
    halved = Add({product}, {half})
    rounded = Floor(halved)
    clamped = Clip(rounded, least, most)
    narrow = Cast <to = {to}> (clamped)
    """


def factor_by_position(start: str = "") -> str:
    """The row of ``table`` for each token of x, as ``factor``: that of its position in a period, from ``start`` if given."""
    positions = "positions = Range(zero, length, step)"
    if start:
        positions = f"numbers = Range(zero, length, step)  positions = Add(numbers, {start})"
    return f"""
    length_row = Shape <start = -2, end = -1> (x)
    length = Squeeze(length_row)
    zero = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    {positions}
    period = Shape <start = 0, end = 1> (multiplier)
    rows = Mod(positions, period)
    factor = Gather <axis = 0> (table, rows)
    """


def requantize(by_position: bool, real: bool, to: int, raised: bool = False, biased: bool = False) -> str:
    """``Requantize``; ``real`` needs products with their half below 2^53.

    Args:
        by_position: One row of the multiplier for each token.
        real: In float64.
        to: Dtype of the result; uint8: with ``zero`` added, an attribute then.
        raised: Values are raised by ``-low`` while they are rounded, so that being cast to int32 rounds them down: for results of int32
            and float32 whose products, without their binary places and raised, fit into it.
        biased: x lacks a bias, which is an input.
    """
    body = ENDS
    if real:
        body += (
            FLOOR_REAL
            + """
    multiplier_real = Cast <to = 11> (multiplier)
    table = Mul(multiplier_real, fraction)
    values = Cast <to = 11> (x)
    """
        )
    else:
        body += "table = Cast <to = 7> (multiplier)  values = Cast <to = 7> (x)\n"
    if by_position:
        body += factor_by_position()
    else:
        body += "factor = Identity(table)\n"
    body += "scaled = Mul(values, factor)\n"
    if not real:
        body += FLOOR_INT64 + f"y = Cast <to = {to}> (clamped)\n"
    elif raised:
        body += "half_raised = Sub(half, least)\n"
        body += _WITH_BIAS if biased else "added = Identity(half_raised)\n"
        body += f"""
    high = Add(scaled, added)
    whole_high = Cast <to = 6> (high)
    {"kind_high = Identity(whole_high)" if to == INT32 else f"kind_high = Cast <to = {to}> (whole_high)"}
    bottom = Cast <to = {to}> (least)
    top = Cast <to = {to}> (most)
    back = Add(kind_high, bottom)
    y = Clip(back, bottom, top)
    """
    else:
        body += clamped("scaled", "half", to) + "y = Identity(narrow)\n"
    words = ("position" if by_position else "", "float64" if real else "int64", word(to), "raised" * raised, "biased" * biased)
    attributes = "shift, low, high" + (", zero" if to == UINT8 else "")
    return onnx_function("Requantize", words, attributes, f"(x, multiplier{', bias' if biased else ''}) => (y)", body)


def rescale(rounded: bool, clipped: bool, biased: bool, logits: bool) -> str:
    """``Requantize`` of a layer's sums in float32, given as float32: sums times multipliers and halves are below 2^24, so all is exact.

    Args:
        rounded: There is a shift; without one there is nothing to round.
        clipped: Results can be outside of ``low ... high``.
        biased: The sums lack a bias, which is an input.
        logits: The result is times ``2^exponent``, as ``FromInteger`` makes it of it; nothing is rounded or clipped then.
    """
    body = f"""
    two = Constant <value = double {{2.0}}> ()
    shift = Constant <value_int: int = @shift> ()
    {"exponent = Constant <value_int: int = @exponent> ()  places = Sub(exponent, shift)" if logits else "places = Neg(shift)"}
    places_real = Cast <to = 11> (places)
    fraction_wide = Pow(two, places_real)
    fraction = Cast <to = 1> (fraction_wide)
    multiplier_real = Cast <to = 1> (multiplier)
    factor = Mul(multiplier_real, fraction)
    {scale("factor")}
    """
    value = "scaled"
    half = "half = Constant <value = float {0.5}> ()\n" if rounded else ""
    if biased:
        body += half + "bias_real = Cast <to = 1> (bias)  bias_scaled = Mul(bias_real, factor)\n"
        body += "offset = Add(bias_scaled, half)\n" if rounded else "offset = Identity(bias_scaled)\n"
        body, value = body + "moved = Add(scaled, offset)\n", "moved"
    elif rounded:
        body, value = body + half + "moved = Add(scaled, half)\n", "moved"
    if rounded:
        body, value = body + f"whole = Floor({value})\n", "whole"
    if clipped:
        body += "least_int = Constant <value_int: int = @low> ()  most_int = Constant <value_int: int = @high> ()\n"
        body += "least = Cast <to = 1> (least_int)  most = Cast <to = 1> (most_int)\n"
        body, value = body + f"inside = Clip({value}, least, most)\n", "inside"
    words = ("float32", "rounded" * rounded, "clipped" * clipped, "biased" * biased, "logits" * logits)
    signature = f"(current, multiplier{', bias' if biased else ''}, unity) => (y)"
    return onnx_function("Requantize", words, "shift, low, high" + ", exponent" * logits, signature, body + f"y = Identity({value})\n")


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


def scale(factor: str) -> str:
    """``scaled``, the current times ``factor``, as what ONNX Runtime makes one op with the product of the layer (MatMulIntegerToFloat).

    It does so where the product of a layer, cast, meets the product of two scales, and finds that only if the latter is not a constant:
    so ``unity``, which is 1, comes from the length of the text.
    """
    return f"""
    scales = Mul(unity, {factor})
    x = Cast <to = 1> (current)
    scaled = Mul(x, scales)
    """


def count(steps: int, signed: bool, biased: bool, to: int) -> str:
    """``IntegerFire`` of a constant current where only the counts are read: ``floor((start + T x) / theta)`` in float32, clipped.

    ``floor(x f + a)`` with ``f = T / theta`` and ``a = (start + T b + 1/2) / theta``, b the bias that x lacks if ``biased``. This is
    monotone in x like the count itself: the writer compares the two on both sides of each step of the staircase, for each channel, and
    takes this variant where they agree. What is not negative is rounded down by being cast.
    """
    low = -float(steps) if signed else 0.0
    return onnx_function("IntegerFire", ("signed" if signed else "", "count", "biased" if biased else "", word(to)),
        "steps, signed, timed, comparison, reset", f"(current, threshold, start{', bias' if biased else ''}, unity) => (counts)", f"""
    steps_int = Constant <value_int: int = @steps> ()
    steps_real = Cast <to = 1> (steps_int)
    half = Constant <value = float {{0.5}}> ()
    least = Constant <value = float {{{low}}}> ()
    theta = Cast <to = 1> (threshold)
    theta_twice = Add(theta, theta)
    steps_twice = Add(steps_real, steps_real)
    factor = Div(steps_twice, theta_twice)
    {scale("factor")}
    start_real = Cast <to = 1> (start)
    start_half = Add(start_real, half)
    {"bias_real = Cast <to = 1> (bias)  bias_sum = Mul(bias_real, steps_real)  raised = Add(start_half, bias_sum)" if biased
     else "raised = Identity(start_half)"}
    offset = Div(raised, theta)
    level = Add(scaled, offset)
    {"whole = Floor(level)" if signed else "whole = Identity(level)"}
    clipped = Clip(whole, least, steps_real)
    counts = Cast <to = {to}> (clipped)
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
    return {1: "float32", 2: "uint8", 3: "int8", 5: "int16", 6: "int32", 7: "int64", 11: "float64"}[dtype]


def without_comments(text: str) -> str:
    """The text without lines that begin with ``#``, which the parser does not know."""
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
