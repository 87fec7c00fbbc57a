r"""Norms: LayerNorm or RMSNorm on the residual stream, its result straight in a few bits.

The norm's weight and bias, divided by the scale s of the result, become ``gain`` and ``offset`` of ``integer_norm``:

    y / s = n / 2**16 * w / s + b / s = (n gain + offset) / 2**shift,    gain = w / s 2**(shift - 16),   offset = b / s 2**shift

``guard`` is the number of places that the root has more than the stream: as many, up to eight, as the intermediates leave room
for in 64 bits.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from ntc.errors import PassError
from ntc.meta import module_of, where
from ntc.ops import aten
from ntc_passes.quantize.activations import best_scale, gram_behind, relative_error, sample_rows
from ntc_passes.quantize.fixed_point import MULTIPLIER_BITS, nearest, shift_for
from ntc_passes.quantize.stream import as_stream
from ntc_passes.quantize.walk import Constant, Value, Work, rows_of

__all__ = ["norm"]

_PLACES = 16
"""Binary places of the normalised value, of ``integer_norm``."""

_GUARD = 8


def norm(work: Work, node: Node) -> Value:
    """Gain, offset and result scale of one norm."""
    centre = node.target is aten.layer_norm.default
    source, sizes = node.args[:2]
    assert isinstance(source, Node) and isinstance(sizes, list | tuple)
    x = as_stream(work, work[source], source)
    channels = int(x.data[0].shape[-1])
    if list(sizes) != [channels]:
        raise PassError(f"the integer grade normalises over the last axis only, and {where(node)} over {list(sizes)}")
    given = [*node.args[2:], *[None] * 3]
    weight = torch.ones(channels, dtype=torch.float64) if given[0] is None else work.constant(node, given[0], "the weight of a norm")
    bias, eps = torch.zeros(channels, dtype=torch.float64), given[1]
    if centre:
        bias = bias if given[1] is None else work.constant(node, given[1], "the bias of a norm")
        eps = 1e-5 if given[2] is None else given[2]
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    assert isinstance(eps, float)
    rows = rows_of(x)
    deviation = rows - rows.mean(1, keepdim=True) if centre else rows
    wanted = deviation * torch.rsqrt(deviation.square().mean(1, keepdim=True) + eps) * weight + bias
    options = work.at(node)
    limit = options.activation_limit
    most = sample_rows(channels)
    sample = wanted[torch.linspace(0, len(wanted) - 1, min(most, len(wanted))).round().long()]
    scale = best_scale(sample, gram_behind(work, node, sample), limit)
    largest = max(float(weight.abs().max()) / scale / 2**_PLACES, float(bias.abs().max()) / scale)
    shift = shift_for(largest, MULTIPLIER_BITS)
    if shift < 0:
        raise PassError(f"weight and bias of {where(node)} span too wide a range for 31 bits at the scale {scale:g} of its result")
    prefix = module_of(node) or node.name
    gain = Constant(f"{prefix}.weight", nearest(weight / scale * 2.0 ** (shift - _PLACES)).to(torch.int32))
    offset = Constant(f"{prefix}.bias", nearest(bias / scale * 2.0**shift).to(torch.int32))
    epsilon = int(eps / work.unit**2 + 0.5)
    result, data = work.emit(
        node, torch.ops.ntc.integer_norm.default, x, gain, offset, epsilon, _guard(x.bound, centre), shift, -limit, limit, centre
    )
    made = Value(result, "activation", torch.tensor([scale], dtype=torch.float64), data, bound=limit)
    work.notes[node.name] = {
        "bits": options.activation_bits, "scale": scale, "relative_squared_error": relative_error(rows_of(made), wanted),
    }  # fmt: skip
    return work.noted(made)


def _guard(bound: int, centre: bool) -> int:
    """Most places, at most eight, with ``v 4**guard < 2**61`` and ``d 2**(guard + 16) < 2**61``."""
    d = (2 * bound + 1) if centre else bound
    return max(0, min(_GUARD, (61 - 2 * d.bit_length()) // 2, 61 - _PLACES - d.bit_length()))
