r"""Orthogonal rotations of channels: a randomised Hadamard matrix where one is known, a random orthogonal one elsewhere.

    Q = diag(s) H / sqrt(n),   s random signs          hadamard      (Ashkboos et al. 2024, QuaRot; Tseng et al. 2024, QuIP#)
    Q = the orthogonal factor of a Gaussian matrix     orthogonal    uniform over all rotations (Mezzadri 2007)

Both have ``Q^T Q = I``. The first spreads one large channel evenly: every entry is ``+-1 / sqrt(n)``.

Weights are turned in float64, by matrix products: H is a Kronecker product of small matrices, ``H = A (x) S (x) S'``, and each of them
is one product along its own axis of the block, ``2 (64 + 32)`` operations per weight for n = 2048 and not 4096.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ntc.ops.hadamard import hadamard_core, hadamard_matrix

__all__ = ["Rotation", "hadamard_factors", "kronecker", "rotation"]

_LARGEST_BITS = 6
"""Sylvester's matrices are applied as products with ones of at most 2^6: large enough for a matrix product to be fast."""


@dataclass(frozen=True)
class Rotation:
    """``x -> x Q`` on the last axis, in blocks of n channels, ``Q = diag(s) (F_1 (x) F_2 ...)``.

    Attributes:
        size: n.
        kind: What Q is made of, as text: equal text, equal rotation.
        factors: F, square, in float64; their sizes multiply to n.
        signs: s, ``[n]``, divided by sqrt(n); of a Hadamard rotation.
    """

    size: int
    kind: str
    factors: tuple[Tensor, ...]
    signs: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """``x Q`` for every block of the last axis, in float64."""
        x = x.double()
        if self.signs is not None:
            x = (x.reshape(-1, self.size) * self.signs).reshape(x.shape)
        return kronecker(x, self.factors)

    def from_left(self, w: Tensor) -> Tensor:
        """``Q^T w`` for every block of the first axis, in float64."""
        w = w.double()
        if self.signs is not None:
            w = (w.reshape(-1, self.size, w.shape[-1]) * self.signs[:, None]).reshape(w.shape)
        return kronecker(w, self.factors, trailing=w.shape[-1])


def kronecker(x: Tensor, factors: Sequence[Tensor], trailing: int = 1) -> Tensor:
    """``x (F_1 (x) F_2 ...)`` on blocks of the last axis, or its transpose on those of the one in front of ``trailing`` values.

    Args:
        x: ``[..., C]``, or ``[C, trailing]``; C is a multiple of the product of the sizes of the factors.
        factors: Square matrices, of x's dtype.
        trailing: How many values stand behind each channel.
    """
    shape, inner = x.shape, trailing
    for factor in reversed(factors):
        size = len(factor)
        if inner == 1:
            x = x.reshape(-1, size) @ factor
        else:
            parts = x.reshape(-1, size, inner)
            x = torch.bmm(factor.T.expand(len(parts), size, size), parts)
        inner *= size
    return x.reshape(shape)


def hadamard_factors(core: Tensor, doublings: int) -> tuple[Tensor, ...]:
    """``A (x) S_k`` of ``ntc.ops.hadamard`` as few matrices of which it is the Kronecker product, in float64."""
    count = -(-doublings // _LARGEST_BITS)
    bits = [doublings // count + (i < doublings % count) for i in range(count)]
    return tuple(f.double() for f in (core, *(hadamard_matrix(1 << b) for b in bits)) if len(f) > 1)


def rotation(size: int, kind: str, seed: int) -> Rotation:
    """A rotation of so many channels.

    Args:
        size: n.
        kind: ``hadamard``, where a Hadamard matrix of that size is known, or ``orthogonal``.
        seed: Of the signs or the Gaussian matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    found = hadamard_core(size) if kind == "hadamard" else None
    if found is not None:
        core, doublings = found
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        text = f"hadamard {len(core)} x 2^{doublings}, seed {seed}"
        return Rotation(size, text, hadamard_factors(core, doublings), signs / size**0.5)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return Rotation(size, f"orthogonal {size}, seed {seed}", (q * r.diagonal().sign(),))
