r"""The linear layer behind spikes, fitted again to what it gave before there were spikes: ridge regression in closed form.

Spikes code an activation coarsely, and each channel's error is not independent of the others'. The layer that reads them can make up for
part of it. With the values f that the spikes stand for, the layer's old weights W and its old results y, all less their means,

    dW = argmin  sum over tokens |y - f (W + dW)'|^2  +  lambda sum_c G_cc |dW_c|^2,      G = f' f

so a channel that hardly fires keeps its weights, and with ``lambda`` to infinity all do. Of the candidates for lambda the one is taken that
errs least on each half of the tokens when fitted to the other half; if none errs less than W itself, nothing is changed. This is the
layer-wise reconstruction of quantization (Nagel et al. 2020, arXiv 2004.10568, eq. 12; Frantar et al. 2023, arXiv 2210.17323, eq. 1),
with the spikes of T steps in place of rounded activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LAMBDAS", "Refit", "refit"]

LAMBDAS = (0.03, 0.1, 0.3, 1.0, 3.0)
_ROUNDING = 1e-12  # of the variance: so much float32 loses where nothing is lost


@dataclass(frozen=True)
class Refit:
    """A layer fitted again.

    Attributes:
        weight: ``[O, C]``.
        bias: ``[O]``.
        before: Squared error with the old weights, on tokens that it was not fitted to, as a share of the variance of its old results.
        after: The same with new weights.
    """

    weight: Tensor
    bias: Tensor
    before: float
    after: float


@torch.no_grad()
def refit(values: Tensor, weight: Tensor, target: Tensor) -> Refit | None:
    """Weights and bias with which a linear layer on ``values`` is nearest to ``target``; see the module's docstring.

    Args:
        values: What the spikes of each token stand for, ``[N, C]``.
        weight: W, ``[O, C]``.
        target: y, ``[N, O]``, a bias included.

    Returns:
        In the dtype of ``weight``; None if nothing is nearer than ``weight`` with the best bias, or there are fewer than two tokens.
    """
    f, w, y = values.double(), weight.detach().double(), target.double()
    halves = [(f[0::2], y[0::2]), (f[1::2], y[1::2])]
    if len(halves[1][0]) == 0:
        return None
    errors = torch.zeros(1 + len(LAMBDAS), dtype=torch.float64)
    for (fitted, fitted_y), (held, held_y) in zip(halves, reversed(halves), strict=True):
        means = fitted.mean(0), fitted_y.mean(0)
        found = [torch.zeros_like(w), *_changes(fitted - means[0], w, fitted_y - means[1], LAMBDAS)]
        for i, change in enumerate(found):
            errors[i] += (held_y - means[1] - (held - means[0]) @ (w + change).T).square().sum()
    best, mean_f, mean_y = int(errors.argmin()), f.mean(0), y.mean(0)
    power = float((y - mean_y).square().sum())
    if best == 0 or float(errors[0]) <= _ROUNDING * power:
        return None
    # G of all tokens is about twice that of a half, and so would be the penalty.
    (change,) = _changes(f - mean_f, w, y - mean_y, [LAMBDAS[best - 1] / 2])
    new = w + change
    return Refit(
        new.to(weight.dtype), (mean_y - new @ mean_f).to(weight.dtype), before=float(errors[0]) / power, after=float(errors[best]) / power,
    )  # fmt: skip


def _changes(f: Tensor, w: Tensor, y: Tensor, lambdas: list[float] | tuple[float, ...]) -> list[Tensor]:
    """Change of W for each lambda, ``[O, C]``; values and results have mean 0. Solved over channels or over tokens, whichever are fewer."""
    scale = f.square().sum(0).sqrt()
    silent = scale == 0  # such a channel has nothing to be fitted to
    inverse = torch.where(silent, 0.0, 1.0 / scale.clamp(min=1e-300))
    unit = f * inverse  # columns of length 1: the penalty becomes lambda I
    rest = y - f @ w.T
    over_channels = f.shape[1] <= f.shape[0]
    gram = unit.T @ unit if over_channels else unit @ unit.T
    right = unit.T @ rest if over_channels else rest
    diagonal = gram.diagonal().clone()
    found = []
    for value in lambdas:
        gram.diagonal().copy_(diagonal + value)
        solved = torch.cholesky_solve(right, torch.linalg.cholesky(gram))
        found.append(((solved if over_channels else unit.T @ solved) * inverse.unsqueeze(1)).T)
    return found
