r"""Orthogonal rotations of channels: a randomised Hadamard matrix where one is known, a random orthogonal one elsewhere.

    Q = diag(s) H / sqrt(n),   s random signs          hadamard      (Ashkboos et al. 2024, QuaRot; Tseng et al. 2024, QuIP#)
    Q = the orthogonal factor of a Gaussian matrix     orthogonal    uniform over all rotations (Mezzadri 2007)

Both have ``Q^T Q = I``. The first spreads one large channel evenly: every entry is ``+-1 / sqrt(n)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ntc.ops.hadamard import hadamard, hadamard_core

__all__ = ["Rotation", "rotation"]


@dataclass(frozen=True)
class Rotation:
    """``x -> x Q`` on the last axis, in blocks of n channels.

    Attributes:
        size: n.
        kind: What Q is made of, as text: equal text, equal rotation.
        signs: s, ``[n]``, of a Hadamard rotation.
        core: A of ``ntc.ops.hadamard``, of a Hadamard rotation.
        doublings: k of it.
        matrix: Q, ``[n, n]``, of any other.
    """

    size: int
    kind: str
    signs: Tensor | None = None
    core: Tensor | None = None
    doublings: int = 0
    matrix: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """``x Q`` for every block, in float64."""
        blocks = x.double().reshape(*x.shape[:-1], -1, self.size)
        if self.matrix is not None:
            turned = blocks @ self.matrix
        else:
            assert self.signs is not None and self.core is not None
            turned = hadamard(blocks * self.signs, self.core, self.doublings) / self.size**0.5
        return turned.reshape(x.shape)


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
        return Rotation(size, f"hadamard {len(core)} x 2^{doublings}, seed {seed}", signs, core, doublings)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return Rotation(size, f"orthogonal {size}, seed {seed}", matrix=q * r.diagonal().sign())
