r"""Neurons and decodes in plain torch operations: what training runs in place of the kernels.

The kernels of the ops are opaque to ``torch.compile``; these forms are not, so that the T steps of a population, the rate
regulariser and the casts around them become one loop over the data. Same arithmetic, with the membrane in units of the
threshold (``v / theta``): spikes agree with the kernel's up to rounding at a threshold tie, gradients up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ntc.surrogate import surrogate as find_surrogate

__all__ = ["decode", "if_rate", "integrate_fire", "leaky_integrate_fire"]


class _Fire(torch.autograd.Function):
    """``1[u >= at]``, and backward the surrogate derivative of ``u - at``."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, at: float, name: str, width: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.at, ctx.derivative, ctx.width = at, find_surrogate(name), width
        return (u >= at).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (u,) = ctx.saved_tensors
        return grads[0] * ctx.derivative(u - ctx.at, ctx.width), None, None, None


def _fire(u: Tensor, at: float, name: str, width: float) -> Tensor:
    result: Tensor = _Fire.apply(u, at, name, width)  # type: ignore[no-untyped-call]
    return result


def _spike_dtype(current: Tensor) -> torch.dtype:
    """Spikes are exact in any dtype; under autocast they take half the memory."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else current.dtype


def integrate_fire(
    current: Tensor, threshold: Tensor, v0: Tensor, steps: int, signed: bool, timed: bool, surrogate: str, width: float
) -> Tensor:
    """IF neurons with soft reset; arguments and result as those of ``ntc::integrate_fire``."""
    dtype = _spike_dtype(current)
    z = current.float() / threshold
    v = v0 + torch.zeros_like(z[0] if timed else z)
    spikes: list[Tensor] = []
    for t in range(steps):
        u = v + (z[t] if timed else z)
        s = _fire(u, 1.0, surrogate, width)
        if signed:
            s = s - (1.0 - _fire(u, 0.0, surrogate, width))
        v = u - s
        spikes.append(s.to(dtype))
    return torch.stack(spikes)


def leaky_integrate_fire(
    current: Tensor, threshold: Tensor, tau: Tensor, v0: Tensor, steps: int, hard_reset: bool, timed: bool, surrogate: str, width: float
) -> Tensor:
    """LIF neurons; arguments and result as those of ``ntc::leaky_integrate_fire``."""
    dtype = _spike_dtype(current)
    z = current.float() / threshold
    v = v0 + torch.zeros_like(z[0] if timed else z)
    spikes: list[Tensor] = []
    for t in range(steps):
        u = v + ((z[t] if timed else z) - v) / tau
        s = _fire(u, 1.0, surrogate, width)
        v = u * (1.0 - s) if hard_reset else u - s
        spikes.append(s.to(dtype))
    return torch.stack(spikes)


def if_rate(current: Tensor, threshold: Tensor, signed: bool) -> Tensor:
    """Rate of an IF neuron in the limit of many steps; as ``ntc::if_rate``."""
    return (current / threshold).clamp(-1.0 if signed else 0.0, 1.0)


def decode(train: Tensor, code: str) -> Tensor:
    """Value of a train; as ``ntc::decode``."""
    if code == "rate":
        return train.mean(0)
    if code == "count":
        return train.sum(0)
    weights = torch.exp2(-torch.arange(1, train.shape[0] + 1, device=train.device)).to(train.dtype)
    value: Tensor = torch.tensordot(weights, train, dims=1)
    return value
