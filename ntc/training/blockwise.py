r"""Every layer by itself: what precedes end-to-end training.

After conversion each attention computes something else than before, and every layer behind it reads what those before it
got wrong. Blockwise reconstruction (Li et al. 2021, BRECQ, arXiv 2102.05426, for quantization; Bu et al. 2022 for spiking
networks) mends the layers one by one: each gets the residual stream of the original network and is fitted to what the original
adds to it,

    loss = sum over attentions and FFNs l of  sum |a_l - a'_l|^2 / sum |a'_l|^2

the share of the layer's power that is not explained, summed over the tokens of a step. No gradient crosses a layer, all are
fitted at once, and neither logits nor head are computed, so a step costs less than one end to end. Only layers that hold neurons are
fitted: a layer that is still the original's has nothing to learn, and embeddings, which the first layer reads, serve others too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from ntc.blocks import layer_outputs
from ntc.errors import ConfigError
from ntc.meta import block_of
from ntc.ops import aten, spec_of
from ntc.program import Program
from ntc.training.config import TrainingConfig
from ntc.training.form import TrainingForm
from ntc.training.losses import Objective

__all__ = ["BlockwiseObjective", "fitted_tensors", "layer_loss", "with_first_stage"]


def fitted_tensors(program: Program) -> frozenset[str]:
    """Names of the tensors of those attentions and FFNs that hold neurons, their norms included."""
    layers = [layer for layer in layer_outputs(program) if layer.where != "block"]
    sums = {user for layer in layers for user in layer.node.users if user.target is aten.add.Tensor}
    found: set[str] = set()
    for layer in layers:
        seen: set[Node] = set()
        frontier = [layer.node]
        while frontier:
            node = frontier.pop()
            if node.op != "get_attr" and (node in seen or node in sums or block_of(node) != layer.block):
                continue
            seen.add(node)
            frontier.extend(node.all_input_nodes)
        specs = [spec_of(node) for node in seen]
        if any(spec is not None and spec.element == "population" for spec in specs):
            found |= {str(node.target) for node in seen if node.op == "get_attr"}
    return frozenset(found)


def with_first_stage(config: TrainingConfig, program: Program, original: Program | None, names: Collection[str]) -> TrainingConfig:
    """The options with ``blockwise_tokens`` decided, where that was left open: the stage pays wherever it is possible.

    Measured on the reference GPT-2 with spiking attention: 1.2 million tokens layer by layer bring the perplexity from 103.7 to
    66.4, as many end to end not below 70, at half the tokens per second.

    Args:
        config: With a budget (``TrainingConfig.fitting``).
        program: What is trained.
        original: Its teacher, if there is one.
        names: The tensors that are trained.
    """
    if config.blockwise_tokens is not None:
        return config
    if original is None or not fitted_tensors(program) & set(names) or _layers(program) != _layers(original):
        return replace(config, blockwise_tokens=0)
    return config if config.max_tokens is None else replace(config, blockwise_tokens=config.max_tokens)


def _layers(program: Program) -> list[str]:
    return [f"{layer.block}.{layer.where}" for layer in layer_outputs(program)]


def layer_loss(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Unexplained share of power, ``sum |a - a'|^2 / sum |a'|^2``, summed over layers ``[B, L, C]``, as a scalar."""
    total = torch.zeros(())
    for a, target in zip(ours, theirs, strict=True):
        reference = target.detach().float()
        total = total + (a.float() - reference).square().sum() / reference.square().sum().clamp(min=1e-12)
    return total


class BlockwiseObjective(Objective):
    """Loss of the blockwise stage as a function of the token ids; in the log its value is ``hidden``.

    Args:
        form: A forced form of the program (``TrainingForm(..., by_layer=True, forced=True)``).
        teacher: The original network, ``by_layer``.
        config: Weight and target of the rate penalty.
        compile: Use ``torch.compile``.

    Raises:
        ConfigError: If the two do not have the same layers.
    """

    measured = ("hidden", "rate")

    def __init__(self, form: TrainingForm, teacher: TrainingForm | None, config: TrainingConfig, *, compile: bool = False) -> None:
        if teacher is None:
            raise ConfigError("layers are fitted to those of the original network: give a teacher, or leave blockwise_tokens out")
        if form.blocks != teacher.blocks or not form.blocks:
            raise ConfigError(
                f"layers are fitted one by one, and the program has {len(form.blocks)} attentions and FFNs where the original network "
                f"has {len(teacher.blocks)}: leave blockwise_tokens out, or give the network that the program was compiled from"
            )
        super().__init__(form, teacher, config, compile=compile)

    def _losses(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (teacher,) = self._teacher
        assert teacher is not None
        with torch.no_grad():
            reference = teacher(input_ids)
        ours = self.form(input_ids, reference.stream)
        pairs = [(a, b) for a, b in zip(ours.hidden, reference.hidden, strict=True) if a.requires_grad]  # what is not trained costs nothing
        hidden = layer_loss(*zip(*pairs, strict=True)) if pairs else ours.logits.sum() * 0.0
        zero = torch.zeros_like(hidden)
        return self._weighted(zero, zero, hidden, ours)
