r"""How much the network's answer minds an error at a site: Fisher information of what digit neurons tell.

A site is a population of digit neurons (``ntc.ops.digit_neuron``) that tells ``d n``, ``n = sum_t w(t) s(t)``, ``[B, L, C]``. An error e of
n, independent of everything and small, moves the answer of the network by

    E KL(p || p_e) = 1/2 sum_c E[gamma_c^2] E[e_c^2],      gamma = d log p(y | x) / d n,   y ~ p(. | x)

nats per token: the diagonal of the Fisher information, with labels that the network draws itself (Amari 1998; with those of the text it
would be the empirical one, Kunstner et al. 2019). All that is needed is a run backwards per window, on unlabelled text. Measured is
``F_c``, the mean of ``gamma_c^2`` over tokens, on the program as it is, straight through its neurons, and the largest ``|x_c| / d``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.digit_neuron import spread
from ntc.pipeline import Calibration
from ntc.program import Program, check_ids, interpret

__all__ = ["Sensitivity", "sensitivities"]

_WINDOW = 256
"""Tokens that are run backwards at once: what a run keeps for the way back grows with them."""


@dataclass
class Sensitivity:
    """What is known of a site.

    Attributes:
        fisher: F, ``[C]``, in float64: errors e lose ``sum_c F_c E[e_c^2] / 2`` nats per token.
        largest: Largest ``|x| / d`` of the text, ``[C]``.
        sample: ``x / d`` of some tokens, ``[rows, C]``.
    """

    fisher: Tensor
    largest: Tensor
    sample: Tensor


def sensitivities(
    program: Program, sites: Sequence[Node], calibration: Calibration, tokens: int, rows: int, progress: Callable[..., None]
) -> dict[Node, Sensitivity]:
    """F, the largest number and some numbers of every site, on the first ``tokens`` tokens of a text.

    Args:
        program: As it is; parameters get no gradients.
        sites: ``ntc::digit_neuron`` nodes.
        calibration: Text.
        tokens: How many of it, at least one window.
        rows: Tokens whose numbers are kept, at random.
        progress: Called with a title, a number and how many there are.
    """
    widths = {site: int(site.meta["val"].shape[-1]) for site in sites}
    found = {s: Sensitivity(torch.zeros(n, dtype=torch.float64), torch.zeros(n), torch.zeros(0, n)) for s, n in widths.items()}
    frozen = {name: tensor.detach() for name, tensor in program.tensors.items()}
    windows = list(_windows(program, calibration, tokens))
    seen = 0
    draw = torch.Generator().manual_seed(0)
    for number, ids in enumerate(windows):
        progress("measure sensitivities", number, len(windows))
        kept = torch.randperm(ids.numel(), generator=draw)[: -(-rows // len(windows))]

        def visit(node: Node, args: tuple[Any, ...], value: Any, kept: Tensor = kept) -> Tensor | None:
            if node not in found:
                return None
            x, step, weights = args[:3]
            site = found[node]
            numbers = (x.detach() / spread(step.detach(), x)).flatten(0, -2)
            site.largest = torch.maximum(site.largest, numbers.abs().amax(0))
            site.sample = torch.cat([site.sample, numbers[kept]])
            train: Tensor = value if value.requires_grad else value.detach().requires_grad_()
            last = float(weights[-1])

            def take(grad: Tensor) -> None:  # gamma: what one more step of n does, and the last spike is worth w(T-1) of them
                site.fisher += (grad[-1] / last).double().square().flatten(0, -2).sum(0)

            train.register_hook(take)  # type: ignore[no-untyped-call]
            return train

        packer = _Packer()
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(packer.pack, packer.unpack):
            logits = interpret(program, ids, visit, tensors=frozen).flatten(0, 1)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw).squeeze(1)
            torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]
        seen += ids.numel()
    for site in found.values():
        site.fisher /= max(seen, 1)
    return found


def _windows(program: Program, calibration: Calibration, tokens: int) -> Iterator[Tensor]:
    left = tokens
    for batch in calibration.batches:
        check_ids(batch, program.info)
        for row in batch:
            for part in row.split(_WINDOW):
                if left <= 0:
                    return
                yield part.unsqueeze(0)
                left -= part.numel()


class _Packer:
    """Keeps trains for the way back in a byte per spike, once for all layers that read one: they are most of what is kept."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None  # the train itself, too: its address is nobody else's as long as it is here

    def pack(self, saved: Tensor) -> Tensor | tuple[Tensor, torch.dtype]:
        """What is kept of a tensor."""
        if saved.dim() <= 3 or not saved.is_floating_point():
            return saved
        if self._last is None or saved.data_ptr() != self._last[0].data_ptr() or saved.shape != self._last[0].shape:
            small = saved.detach().to(torch.int8)
            if not torch.equal(small.to(saved.dtype), saved):
                return saved
            self._last = saved.detach(), small
        return self._last[1], saved.dtype

    def unpack(self, kept: Tensor | tuple[Tensor, torch.dtype]) -> Tensor:
        """The tensor again."""
        return kept if isinstance(kept, Tensor) else kept[0].to(kept[1])
