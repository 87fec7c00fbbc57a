r"""Weights to integers so that the layer's result, not the weight, is nearest.

A layer computes ``W n`` on integer inputs n whose second moments on calibration text are ``H = sum n n^T``. Rounding every weight by
itself leaves the error ``tr(D H D^T)``, D = Wq - W. Here columns are rounded one after the other, and what one column's rounding did to
the result is made up for by the columns that are still real (optimal brain surgeon, Hassibi and Stork 1993; for layers of language
models Frantar et al. 2022, GPTQ, arXiv 2210.17323). With ``H^-1 = U^T U``, U upper triangular, and columns in the order in which
they are rounded:

    e_i = (w_i - round(w_i)) / U_ii,        w_j <- w_j - e_i U_ij  for j > i

Rows do not depend on each other: with one scale per row all rows are rounded at once. Columns with large inputs come first, so that
most others are left to make up for them. Errors are carried on inside of a block of columns at once and behind it block by
block, which gives the same numbers with fewer passes over memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ntc_passes.quantize.fixed_point import nearest

__all__ = ["compensated", "rounded", "weight_scales"]

_DAMPING = 0.01
"""Of the mean of the diagonal of H, added to it: calibration text is a sample."""

_BLOCK = 128
_ROWS = 4096
"""Rows that are worked on at once, for memory."""

_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Of the largest weight of a row to the largest that is still represented."""


def rounded(weight: Tensor, limit: int) -> Tensor:
    """Weights in units of their scale, each rounded by itself."""
    return nearest(weight).clamp(-limit, limit)


def weight_scales(weight: Tensor, hessian: Tensor, limit: int, least: Tensor) -> Tensor:
    """A scale per row: of several ratios of clipping the one with the least squared error of the layer's result.

    Args:
        weight: ``[O, I]`` float64.
        hessian: H, ``[I, I]`` float64.
        limit: Largest weight as an integer.
        least: Smallest scale that each row may have, ``[O]``: see ``ntc_passes.quantize.linear``.

    Returns:
        ``[O]``, positive.
    """
    scales = []
    for rows, floor in zip(torch.split(weight, _ROWS), torch.split(least, _ROWS), strict=True):
        top = rows.abs().amax(1) / limit
        best, error = torch.maximum(top, floor), torch.full_like(top, torch.inf)
        for ratio in _RATIOS:
            scale = torch.maximum(top * ratio, floor)
            wrong = rounded(rows / scale[:, None], limit) * scale[:, None] - rows
            loss = ((wrong @ hessian) * wrong).sum(1)
            best, error = torch.where(loss < error, scale, best), torch.minimum(loss, error)
        scales.append(best)
    return torch.cat(scales)


def compensated(weight: Tensor, hessian: Tensor, limit: int) -> Tensor:
    """Integers nearest in the result (see the module's docstring).

    Args:
        weight: In units of the scale of its row, ``[O, I]`` float64.
        hessian: H, ``[I, I]`` float64.
        limit: Largest weight.

    Returns:
        ``[O, I]``, whole numbers in float64.
    """
    unseen = hessian.diagonal() == 0
    damped = hessian + torch.diag(unseen.to(hessian.dtype))
    damped = damped + torch.eye(len(damped), dtype=damped.dtype) * (_DAMPING * float(hessian.diagonal().mean()))
    order = torch.argsort(damped.diagonal(), descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)
    back = torch.argsort(order)
    return torch.cat([_in_order(rows[:, order].clone(), upper, limit)[:, back] for rows in torch.split(weight, _ROWS)])


def _in_order(weight: Tensor, upper: Tensor, limit: int) -> Tensor:
    """Columns from left to right; ``weight`` is written over."""
    result = torch.empty_like(weight)
    columns = weight.shape[1]
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.empty_like(weight[:, start:stop])
        for i in range(start, stop):
            result[:, i] = rounded(weight[:, i], limit)
            error = (weight[:, i] - result[:, i]) / upper[i, i]
            weight[:, i + 1 : stop].addr_(error, upper[i, i + 1 : stop], alpha=-1)
            errors[:, i - start] = error
        weight[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    return result
