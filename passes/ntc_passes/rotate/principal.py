r"""Rotations to principal axes: where values gather in few channels, so that most of the others are small and their neurons silent.

    Q = eigenvectors of  C = sum over norms of E[x x^T]        the residual stream, in one basis for all layers
    R_h = eigenvectors of  sum over query heads of group h of E[y y^T]        what attention makes of the values of key head h, ``[D, D]``

largest first, on calibration text: the Karhunen-Loeve transform, as far as weights can take it. A Hadamard rotation makes all channels
alike, which is best where T steps must reach the largest of them, and costs events: a value's digits cost spikes as the logarithm of
its size, and the mean of the logarithms is largest where all sizes are equal. The difference is the coding gain of a transform (Jayant
and Noll, Digital Coding of Waveforms, 1984): half of log2 of the arithmetic over the geometric mean of the channels' powers, in binary
digits per value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import PassError
from ntc.pipeline import Context
from ntc.program import Program, check_ids, interpret
from ntc_passes.residual import Stream, is_norm_of_stream
from ntc_passes.rotate.rotations import Rotation

__all__ = ["HeadRotation", "PrincipalAxes", "principal_axes"]


@dataclass(frozen=True)
class HeadRotation:
    """``y_h -> y_h R_g(h)``: a rotation of the channels of each head, that of its group.

    Attributes:
        matrices: R, ``[Hk, D, D]``, in float64.
        kind: What they are, as text: equal text, equal rotation.
    """

    matrices: Tensor
    kind: str

    def __call__(self, x: Tensor) -> Tensor:
        """On the last axis, ``[..., H D]``, H a multiple of Hk."""
        width = self.matrices.shape[-1]
        parts = x.double().reshape(*x.shape[:-1], len(self.matrices), -1, width)
        return torch.einsum("...hgd,hde->...hge", parts, self.matrices).reshape(x.shape)

    def from_left(self, w: Tensor) -> Tensor:
        """``R^T w`` on the rows, ``[Hk D, N]``."""
        parts = w.double().reshape(len(self.matrices), -1, w.shape[-1])
        return (self.matrices.transpose(-1, -2) @ parts).reshape(w.shape)


@dataclass(frozen=True)
class PrincipalAxes:
    """Rotations of a program.

    Attributes:
        stream: Of its residual stream.
        values: Of the values of each attention.
    """

    stream: Rotation
    values: Mapping[Node, HeadRotation]


def principal_axes(program: Program, stream: Stream, attentions: list[Node], context: Context) -> PrincipalAxes:
    """Measure them on all of the calibration text.

    Args:
        program: Canonical, norms folded.
        stream: Its residual stream; what is measured are the norms that read it, or itself where none does.
        attentions: Those whose values are turned.
        context: With the text.

    Raises:
        PassError: If there is no text.
    """
    calibration = context.calibration
    if calibration is None or calibration.tokens == 0:
        raise PassError(
            "rotate finds principal axes on calibration text: give --calibration FILE or a Calibration in the context, or choose "
            "kind = hadamard"
        )
    norms = [reader for reader, _ in stream.readers if is_norm_of_stream(reader)] or [stream.members[-1]]
    total = torch.zeros(stream.width, stream.width, dtype=torch.float64)
    heads = {a: torch.zeros(()) for a in attentions}
    last = max([*norms, *attentions], key=list(program.graph.nodes).index)

    seen = set(norms)

    def visit(node: Node, args: tuple[Any, ...], value: Any) -> None:
        if node in seen:
            x = value.flatten(0, -2)
            total.add_((x.T @ x).double())
        elif node in heads:
            count, groups = node.args[3:5]
            y = value.reshape(-1, groups, count // groups, value.shape[-1] // count)  # type: ignore[operator]
            heads[node] = heads[node] + torch.einsum("nghd,nghe->gde", y, y).double()

    with torch.no_grad():
        for number, batch in enumerate(calibration.batches):
            check_ids(batch, program.info)
            context.progress("find principal axes", number, len(calibration.batches))
            interpret(program, batch, visit, last=last)
    name = f"principal, {calibration.tokens} tokens"
    turned = {a: HeadRotation(_axes(c), f"{name}, %{a.name}") for a, c in heads.items()}
    return PrincipalAxes(Rotation(stream.width, name, (_axes(total),)), turned)


def _axes(covariance: Tensor) -> Tensor:
    """Eigenvectors as columns, largest first."""
    vectors: Tensor = torch.linalg.eigh(covariance)[1]
    return vectors.flip(-1)
