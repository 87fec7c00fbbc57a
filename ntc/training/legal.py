r"""Neuron parameters that stay legal while they are trained.

An optimizer moves any number to any number; a threshold has to stay positive, a leak between 0 and 1. Instead of clipping
after a step, which kills the momentum, the optimizer moves an unconstrained number ``r`` and the program sees

    threshold, position table     x = exp(r)                 x > 0
    leak, initial potential                           x = 1 / (1 + exp(-r))      0 < x < 1
    time constant tau of a LIF neuron                 x = 1 + exp(r)             x > 1

``exp`` also makes a step relative to the size of the threshold, which differs by orders of magnitude from channel to channel.
A value on the border (a leak of 1, say) is first moved inside by 2**-12: the border has no ``r``.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["Domain", "from_raw", "to_raw"]

Domain: TypeAlias = Literal["any", "positive", "unit", "above-one"]

_EDGE = 2.0**-12


def to_raw(value: Tensor, domain: Domain) -> Tensor:
    """The unconstrained number of a legal value, same shape, float32."""
    x = value.detach().float()
    if domain == "positive":
        return x.clamp(min=1e-30).log()
    if domain == "unit":
        return torch.logit(x.clamp(_EDGE, 1.0 - _EDGE))
    if domain == "above-one":
        return (x - 1.0).clamp(min=_EDGE).log()
    return x.clone()


def from_raw(raw: Tensor, domain: Domain) -> Tensor:
    """The legal value of an unconstrained number; differentiable."""
    if domain == "positive":
        return raw.exp()
    if domain == "unit":
        return raw.sigmoid()
    if domain == "above-one":
        return 1.0 + raw.exp()
    return raw
