"""Surrogate gradients: what stands for the derivative of the firing step when a spiking network is trained.

The forward pass fires with the exact step ``s = 1[v >= theta]``; its derivative is zero almost everywhere, so the
backward pass uses one of the functions below of ``u = (v - theta) / theta``. Each integrates to 1 over u (the
straight-through one over its window), so that a change of shape does not change the size of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ntc.errors import ConfigError

__all__ = ["SURROGATES", "surrogate"]


def triangular(u: Tensor, width: float) -> Tensor:
    """``max(0, width - |u|) / width**2`` (Bellec et al. 2018, arXiv 1803.09574, with unit area)."""
    return (width - u.abs()).clamp(min=0) / width**2


def sigmoid(u: Tensor, width: float) -> Tensor:
    """Derivative of ``sigmoid(4 u / width)``: ``(4 / width) p (1 - p)`` (SpikingJelly's default has alpha = 4)."""
    p = torch.sigmoid(4.0 * u / width)
    return (4.0 / width) * p * (1.0 - p)


def atan(u: Tensor, width: float) -> Tensor:
    """``1 / (pi w (1 + (u / w)**2))`` (Fang et al. 2021, arXiv 2007.05785)."""
    return 1.0 / (torch.pi * width * (1.0 + (u / width) ** 2))


def straight_through(u: Tensor, width: float) -> Tensor:
    """``1 / (2 width)`` inside ``|u| <= width``, zero outside (Bengio et al. 2013, arXiv 1308.3432)."""
    return (u.abs() <= width).to(u.dtype) / (2.0 * width)


SURROGATES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "triangular": triangular,
    "sigmoid": sigmoid,
    "atan": atan,
    "straight-through": straight_through,
}


def surrogate(name: str) -> Callable[[Tensor, float], Tensor]:
    """The surrogate derivative of that name.

    Raises:
        ConfigError: If there is none; lists those that there are.
    """
    if name not in SURROGATES:
        raise ConfigError(f"no surrogate gradient is called {name!r}; there are {', '.join(SURROGATES)}")
    return SURROGATES[name]
