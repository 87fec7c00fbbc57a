r"""Few-spikes neurons for a function of one value: intervals, thresholds, resets and weights in closed form, and how far off they are.

On an interval ``[a, b]`` a neuron of T steps is an A/D converter whose first step always fires and whose others are binary:

    lsb = (b - a) / N,   N = 2^(T-1) - 1,   w(t) = 2^(T-1-t)              t = 1 .. T-1
    theta(0) below a,               h(0) = 0,          d(0) = y_0
    theta(t) = a + (w(t) - 1/2) lsb,   h(t) = w(t) lsb,   d(t) = s w(t) lsb

so it codes x by the nearest of N + 1 places ``x_k = a + k lsb`` and says ``y_k = y_0 + s k lsb``: a line of slope s. Of all lines the one
is taken whose largest distance to f is smallest (a search over s; y_0 follows). With ``f'`` and ``f''`` of the interval it is off by

    |f''| (b - a)^2 / 16  +  |f'| (b - a) / (2 N)                          curvature, and half a place

and the intervals are laid so that this is the same part of what is allowed, ``a(x)``, in all of them. What is allowed is ``1 + |f|`` for
functions that pass through small and large values, ``|f|`` for those of which the relative error matters (1/x, square root and its
reciprocal), ``sqrt(|f|)`` for exp, whose values are added up over many keys, and 1 for the sigmoid. In an interval where the nearest
constant is zero the neurons are silent.

**The bound is not a sample.** A neuron's value is constant between two places, so the largest distance to a function that is monotone
there is at one of its ends; both ends of all ``G 2^(T-1)`` pieces are computed in float64. The few pieces where f turns are cut into
256, and ``|f''| / 8`` times the square of their width is added for what lies between. Outside of its interval x is clamped, and below
that of exp nothing fires.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["FUNCTIONS", "MOST_STEPS", "Fit", "Function", "fit"]

MOST_STEPS = 16
"""Most time steps: places are told apart in float32."""

_POINTS = 4096  # on which the intervals are laid
_INSIDE = 129  # on which the line of an interval is chosen
_SEARCHES = 48  # halvings of an interval of slopes
_CUTS = 256  # of a piece where f is not monotone


@dataclass(frozen=True)
class Function:
    """A function that neurons can be fitted to.

    Attributes:
        name: Its name.
        value: The function, differentiable twice.
        allowed: The unit a(x) of its error, from f(x).
        positive: Whether it is defined for positive x only; intervals are then laid on a logarithmic scale.
        silent_below: Whether it is zero below its interval, where others keep the value at its end.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    allowed: Callable[[Tensor], Tensor]
    positive: bool = False
    silent_below: bool = False


def _one(y: Tensor) -> Tensor:
    return torch.ones_like(y)


def _mixed(y: Tensor) -> Tensor:
    return 1 + y.abs()


FUNCTIONS = {
    f.name: f
    for f in (
        Function("exp", torch.exp, lambda y: y.sqrt(), silent_below=True),
        Function("reciprocal", torch.reciprocal, torch.abs, positive=True),
        Function("rsqrt", torch.rsqrt, torch.abs, positive=True),
        Function("sqrt", torch.sqrt, torch.abs, positive=True),
        Function("square", torch.square, _mixed),
        Function("silu", functional.silu, _mixed),
        Function("gelu", functional.gelu, _mixed),
        Function("gelu_tanh", lambda x: functional.gelu(x, approximate="tanh"), _mixed),
        Function("sigmoid", torch.sigmoid, _one),
        Function("tanh", torch.tanh, _one),
    )
}


@dataclass(frozen=True)
class Fit:
    """Few-spikes neurons for one function: what ``ntc::fs_neuron`` and ``ntc::fs_synapse`` take, in float32.

    Attributes:
        function: Name of the function.
        low: Lowest x; below it x is clamped, or nothing fires (``Function.silent_below``).
        high: Highest x, where x is clamped.
        steps: T.
        intervals: ``[G, 2]``.
        theta: ``[G, T]``.
        reset: h, ``[G, T]``.
        weight: d, ``[G, T]``.
        bound: Largest ``|f(x) - y| / a(x)`` for low <= x <= high.
        bound_absolute: Largest ``|f(x) - y|`` there.
    """

    function: str
    low: float
    high: float
    steps: int
    intervals: Tensor
    theta: Tensor
    reset: Tensor
    weight: Tensor
    bound: float
    bound_absolute: float


def fit(name: str, low: float, high: float, steps: int, most: int = 16) -> Fit:
    """Neurons for a function on an interval.

    Args:
        name: Of ``FUNCTIONS``.
        low: Lowest x.
        high: Highest x.
        steps: T, 2 to 16.
        most: G, the number of intervals; fewer where the function needs no more.

    Raises:
        ValueError: If the function is unknown or not defined on the interval, or a number is out of range.
    """
    if name not in FUNCTIONS:
        raise ValueError(f"neurons can be fitted to {', '.join(FUNCTIONS)}, and not to {name!r}")
    if not 2 <= steps <= MOST_STEPS:
        raise ValueError(f"few-spikes neurons have 2 to {MOST_STEPS} time steps, got {steps}")
    if most < 1:
        raise ValueError(f"there is at least one interval, got {most}")
    low, high = float(torch.tensor(low)), float(torch.tensor(high))  # as float32 has them
    if not low < high or not abs(low) + abs(high) < float("inf"):
        raise ValueError(f"an interval has two finite ends, the lower one first, got [{low:g}, {high:g}]")
    if FUNCTIONS[name].positive and low <= 0:
        raise ValueError(f"{name} is defined for x > 0, and the interval is [{low:g}, {high:g}]")
    return _fitted(name, low, high, steps, most)


@cache
def _fitted(name: str, low: float, high: float, steps: int, most: int) -> Fit:
    function, places = FUNCTIONS[name], 2 ** (steps - 1) - 1
    with torch.enable_grad():
        ends = _laid(function, low, high, places, most)
    a, b = ends[:-1, None], ends[1:, None]
    slope, start = _lines(function, a, b)
    silent = (slope == 0) & (start == 0)
    lsb = ((b - a) / places).squeeze(1)
    binary = torch.exp2(torch.arange(steps - 2, -1, -1, dtype=torch.float64))
    always = a - (b - a)  # x is never below a when its neuron is asked
    theta = torch.cat([torch.where(silent[:, None], b + (b - a), always), a + (binary - 0.5) * lsb[:, None]], 1)
    reset = torch.cat([torch.zeros_like(a), binary * lsb[:, None]], 1)
    weight = torch.cat([start[:, None], slope[:, None] * reset[:, 1:]], 1)
    theta[silent] = theta[silent, :1].expand(-1, steps)
    reset[silent] = 0.0
    tables = [torch.cat([a, b], 1), theta, reset, weight]
    if function.silent_below:
        nothing = torch.zeros(1, steps, dtype=torch.float64)
        tables = [
            torch.cat([torch.tensor([[low - 1, low]], dtype=torch.float64), tables[0]]), torch.cat([nothing + low + 1, theta]),
            torch.cat([nothing, reset]), torch.cat([nothing, weight]),
        ]  # fmt: skip
    intervals, theta, reset, weight = (t.float().contiguous() for t in tables)
    bound, absolute = _bounds(function, ends, slope, start, places)
    return Fit(name, low, high, steps, intervals, theta, reset, weight, bound, absolute)


def _derivatives(function: Function, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = function.value(x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    return y.detach(), first.detach(), second.detach()


def _laid(function: Function, low: float, high: float, places: int, most: int) -> Tensor:
    """Ends of the intervals, ``[G + 1]`` in float64 and exact in float32."""
    if function.positive:
        x = torch.linspace(0, 1, _POINTS, dtype=torch.float64) * torch.log(torch.tensor(high / low, dtype=torch.float64))
        x = low * x.exp()
    else:
        x = torch.linspace(low, high, _POINTS, dtype=torch.float64)
    y, first, second = _derivatives(function, x)
    bend, tilt = second.abs() / 16, first.abs() / (2 * places)
    allowed = function.allowed(y)

    def crossed(error: float) -> Tensor:
        """Number of intervals from low to x if each may be off by ``error a(x)``."""
        room = error * allowed
        width = 2 * room / (tilt + (tilt * tilt + 4 * bend * room).sqrt()).clamp(min=1e-30)
        each = 1 / width.clamp(max=high - low)
        return torch.cat([torch.zeros(1, dtype=torch.float64), ((each[1:] + each[:-1]) / 2 * x.diff()).cumsum(0)])

    least, largest = 1e-12, 1e6
    for _ in range(80):
        error = (least * largest) ** 0.5
        least, largest = (error, largest) if float(crossed(error)[-1]) > most else (least, error)
    reached = crossed(largest)
    count = max(1, min(most, int(torch.ceil(reached[-1] - 1e-9))))
    wanted = torch.arange(1, count, dtype=torch.float64) * float(reached[-1]) / count
    right = torch.searchsorted(reached, wanted).clamp(1, _POINTS - 1)
    share = (wanted - reached[right - 1]) / (reached[right] - reached[right - 1]).clamp(min=1e-30)
    inner = x[right - 1] + share * (x[right] - x[right - 1])
    found: Tensor = torch.cat([torch.tensor([low]), inner.float(), torch.tensor([high])]).unique()  # type: ignore[no-untyped-call]
    return found.double()


def _lines(function: Function, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and value at a, ``[G]``, of the line that is nearest to f in each interval; both 0 where f is within rounding of it."""
    x = a + (b - a) * torch.linspace(0, 1, _INSIDE, dtype=torch.float64)
    y, first, _ = _derivatives_of(function, x)

    def spread(slope: Tensor) -> Tensor:
        rest = y - slope * (x - a)
        return rest.amax(1, keepdim=True) - rest.amin(1, keepdim=True)

    lower, upper = first.amin(1, keepdim=True), first.amax(1, keepdim=True)
    golden = (5**0.5 - 1) / 2
    for _ in range(_SEARCHES):  # spread is convex in the slope
        left, right = upper - golden * (upper - lower), lower + golden * (upper - lower)
        smaller = spread(left) <= spread(right)
        lower, upper = torch.where(smaller, lower, left), torch.where(smaller, right, upper)
    slope = (lower + upper) / 2
    rest = y - slope * (x - a)
    start = (rest.amax(1, keepdim=True) + rest.amin(1, keepdim=True)) / 2
    flat = y.abs().amax(1, keepdim=True) <= spread(slope) / 2  # zero is as near as the line
    return torch.where(flat, 0.0, slope).squeeze(1), torch.where(flat, 0.0, start).squeeze(1)


def _derivatives_of(function: Function, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        return _derivatives(function, x)


def _bounds(function: Function, ends: Tensor, slope: Tensor, start: Tensor, places: int) -> tuple[float, float]:
    """Largest distance to f, in units of what is allowed and absolute, from both ends of all pieces."""
    relative = absolute = 0.0
    k = torch.arange(places + 1, dtype=torch.float64)
    for a, b, s, y_0 in zip(ends[:-1], ends[1:], slope, start, strict=True):
        lsb = (b - a) / places
        value = y_0 + s * k * lsb
        edges = torch.cat([a.reshape(1), a + (k[1:] - 0.5) * lsb, b.reshape(1)])  # of the pieces
        y, first, _ = _derivatives_of(function, edges)
        largest = _distances(function, y[:-1], y[1:], value)
        turning = (first[1:].sign() != first[:-1].sign()).nonzero().flatten()  # few: their inside is cut into _CUTS pieces
        if len(turning):
            left, right = edges[turning, None], edges[turning + 1, None]
            x = left + (right - left) * torch.linspace(0, 1, _CUTS + 1, dtype=torch.float64)
            y, _, second = _derivatives_of(function, x)
            between = float((second.abs().amax(1) * ((right - left).squeeze(1) / _CUTS) ** 2).max()) / 8
            inside = _distances(function, y, y, value[turning, None])
            unit = float(function.allowed(y).min())
            largest = (max(largest[0], inside[0] + between / unit), max(largest[1], inside[1] + between))
        relative, absolute = max(relative, largest[0]), max(absolute, largest[1])
    return relative, absolute


def _distances(function: Function, left: Tensor, right: Tensor, value: Tensor) -> tuple[float, float]:
    """From the values of f at two ends: to a value in between, relative to what is allowed there, and absolute."""
    crosses = left * right < 0  # then least is allowed at zero
    zero = function.allowed(torch.zeros_like(left))
    relative = absolute = 0.0
    for y in (left, right):
        off = (y - value).abs()
        relative = max(relative, float((off / torch.where(crosses, zero, function.allowed(y))).max()))
        absolute = max(absolute, float(off.max()))
    return relative, absolute
