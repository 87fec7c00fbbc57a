r"""What ``encode-linears`` and ``spike-products`` share: number systems of sites, ranges on calibration text, tables of a program.

A site is a value that becomes digits (``ntc.ops.digit_neuron``). Its base is one of the method's, or learned: the one of ``BASES`` with the
least

    sum over calibration values of (x - d sum_t w(t) s(t))^2

at the site's own range and number of steps. For values that are spread evenly over the range that is base 3; for values that gather
around zero, with few far out, a smaller base may lose less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import PassError
from ntc.ops.digit_neuron import LARGEST_BASE, check_base, digit_neuron, digit_thresholds, digit_weights
from ntc.ops.spike_linear import weighted
from ntc.pipeline import Calibration, Context
from ntc.program import Program, check_ids, interpret
from ntc_passes.calibrate import percentile_of, positive_threshold

__all__ = [
    "BASES", "Base", "Digits", "Scale", "check_base_option", "check_price", "check_ratio", "check_scale", "check_steps", "learned_base",
    "range_of", "sampled",
]  # fmt: skip

Base: TypeAlias = float | Literal["learned"]
Scale: TypeAlias = Literal["token", "channel", "static"]

BASES = (2.0, 2.2, 2.4, 2.6, 2.8, 3.0)
"""What a learned base is chosen from."""


@dataclass(frozen=True)
class Digits:
    """A number system: base, time steps, price of a spike.

    Attributes:
        base: b, in (1, 3].
        steps: T.
        price: lambda of ``digit_thresholds``.
    """

    base: float
    steps: int
    price: float = 0.0

    @property
    def weights(self) -> list[float]:
        """w(t)."""
        return digit_weights(self.base, self.steps)

    @property
    def most(self) -> float:
        """N, the largest number."""
        return sum(self.weights)

    def tables(self, program: Program) -> tuple[str, str]:
        """Names of w and theta in a program; sites with one number system share them."""
        stem = f"digits.base_{self.base:g}.steps_{self.steps}".replace("2.", "2_").replace("1.", "1_")
        if self.price:
            stem += f".price_{self.price:g}".replace("0.", "0_")
        names = (f"{stem}.weights", f"{stem}.thresholds")
        for name, values in zip(names, (self.weights, digit_thresholds(self.weights, self.price)), strict=True):
            if program.tensor_or_none(name) is None:
                program.add_tensor(name, torch.tensor(values), trainable=False)
        return names

    def error(self, x: Tensor, step: Tensor) -> float:
        """Sum of the squared errors of x."""
        w = torch.tensor(self.weights, dtype=x.dtype)
        theta = torch.tensor(digit_thresholds(self.weights, self.price), dtype=x.dtype)
        coded = weighted(digit_neuron(x, step, w, theta, step.dim() > 1), w) * step
        return float((coded - x).square().sum(dtype=torch.float64))


def learned_base(samples: Sequence[tuple[Tensor, Tensor]], steps: int, price: float) -> float:
    """The base with the least error on calibration values, as a share of what they are; of several values, the least sum of shares.

    Args:
        samples: Values ``[rows, C]`` and the ends of their ranges, ``[1]``, ``[C]`` or ``[rows, 1]``.
        steps: T.
        price: lambda.
    """
    powers = [float(x.square().sum(dtype=torch.float64)) or 1.0 for x, _ in samples]

    def loss(system: Digits) -> float:
        return sum(system.error(x, top / system.most) / power for (x, top), power in zip(samples, powers, strict=True))

    return min((Digits(base, steps, price) for base in BASES), key=loss).base


def range_of(rows: Tensor, scale: Scale, percentile: float, ratio: float) -> Tensor:
    """End of the range of a site: ``[C]`` (``channel``), ``[1]`` (``static``) or ``[rows, 1]`` (``token``: the largest channel)."""
    size = rows.abs()
    if scale == "token":
        return size.amax(-1, keepdim=True).clamp(min=1e-20) * ratio
    (top,) = percentile_of(size if scale == "channel" else size.reshape(-1, 1), percentile)
    return positive_threshold(top) * ratio


def sampled(program: Program, wanted: Mapping[Node, int], context: Context, by: str, remedy: str) -> dict[Node, Tensor]:
    """Activations ``[rows, C]`` of some calibration tokens: of each node as many as it wants, or all there are.

    Raises:
        PassError: If something is wanted and there is no calibration text; ``remedy`` says what else could be done.
    """
    if not wanted:
        return {}
    calibration = context.calibration
    if calibration is None or calibration.tokens == 0:
        raise PassError(f"{by} measures on calibration text: give --calibration FILE or a Calibration in the context, or choose {remedy}")
    return _run(program, wanted, calibration, context.progress)


def _run(program: Program, wanted: Mapping[Node, int], calibration: Calibration, progress: Callable[..., None]) -> dict[Node, Tensor]:
    for batch in calibration.batches:
        check_ids(batch, program.info)
    order = torch.randperm(calibration.tokens, generator=torch.Generator().manual_seed(0))
    keep, first = order[: max(wanted.values())].sort().values, 0
    parts: dict[Node, list[Tensor]] = {source: [] for source in wanted}
    last = max(wanted, key=list(program.graph.nodes).index)
    with torch.no_grad():
        for number, batch in enumerate(calibration.batches):
            progress("measure ranges", number, len(calibration.batches))
            rows = keep[(keep >= first) & (keep < first + batch.numel())] - first
            first += batch.numel()
            if not len(rows):
                continue

            def visit(node: Node, args: tuple[Any, ...], value: Any, rows: Tensor = rows) -> None:
                if node in parts:
                    parts[node].append(value.flatten(0, -2)[rows])

            interpret(program, batch, visit, last=last)
    return {source: torch.cat(found)[: wanted[source]] for source, found in parts.items()}


def check_steps(name: str, value: object) -> None:
    """Refuse anything but whole numbers of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_base_option(base: object, steps: int) -> None:
    """Refuse what is neither a base nor ``learned``."""
    if base != "learned" and (isinstance(base, bool) or not isinstance(base, int | float)):
        raise ValueError(f"base must be a number larger than 1 and at most {LARGEST_BASE:g}, or 'learned', got {base!r}")
    check_base(LARGEST_BASE if base == "learned" else float(base), steps)


def check_price(price: object) -> None:
    """Refuse what is no price of a spike."""
    if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < float("inf"):
        raise ValueError(f"price must be a number of at least 0, got {price!r}")


def check_ratio(ratio: object) -> None:
    """Refuse what is no share of a range."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < float("inf"):
        raise ValueError(f"ratio must be a positive number, got {ratio!r}")


def check_scale(scale: object) -> None:
    """Refuse scales that no site has."""
    if scale not in ("token", "channel", "static"):
        raise ValueError(f"scale must be 'token', 'channel' or 'static', got {scale!r}")
