r"""What training makes small.

With the logits z of the program and z' of its teacher ``[B, L, V]`` and token ids x ``[B, L]``:

    ce      = mean over i < L - 1 of -log softmax(z_i)[x_{i+1}]                        [nats per token]
    kl      = mean over i of KL(softmax z'_i || softmax z_i)                           [nats per token]
    hidden  = sum over blocks b of  mean over i of |h_bi - h'_bi|^2 / |h'_bi|^2
    rate    = max(0, r / r* - 1)^2,  r = mean over the populations of Q, K and V of their spikes per neuron and step

and the loss is ``w_ce ce + w_kl kl + w_hidden hidden + w_rate rate``. KL to a teacher at temperature 1 is distillation (Hinton
et al. 2015, arXiv 1503.02531). Hidden states are compared position by position, relative to their own size: in GPT-2 the
first position is a hundred times as large as the others and would hide them. A program without spiking attention has
its rate taken over all its populations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ntc.errors import ConfigError
from ntc.training.config import TrainingConfig
from ntc.training.form import Outputs, Population, TrainingForm

__all__ = ["ATTENTION_ROLES", "PARTS", "Losses", "Objective", "attention_rate", "hidden_loss", "logit_losses", "rate_loss"]

PARTS = ("ce", "kl", "hidden", "rate")

ATTENTION_ROLES = ("q", "k", "v")


def logit_losses(logits: Tensor, teacher: Tensor | None, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of the next token and KL divergence from the teacher, both in nats per token, as scalars.

    Under ``torch.compile`` the two softmaxes, both sums and their gradients are a few passes over the logits; no other tensor
    of their size is kept than the two log-softmaxes.

    Args:
        logits: z, ``[B, L, V]``.
        teacher: z', likewise; None = the divergence is 0.
        input_ids: x, ``[B, L]``.
    """
    log_q = logits.float().log_softmax(-1)
    # Every position gathers, and the last one, which has no next token, is dropped afterwards: slicing log_q itself would cost
    # a copy of it in the backward pass.
    ce = -log_q.gather(-1, input_ids.roll(-1, 1).unsqueeze(-1)).squeeze(-1)[:, :-1].mean()
    if teacher is None:
        return ce, torch.zeros_like(ce)
    log_p = teacher.float().log_softmax(-1)
    return ce, (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def hidden_loss(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Squared distance of hidden states ``[B, L, C]`` per block relative to the teacher's, summed over blocks, as a scalar."""
    total = torch.zeros(())
    for h, target in zip(ours, theirs, strict=True):
        reference = target.detach().float()
        # The floor only matters for a stream of zeros, which no network has.
        total = total + ((h.float() - reference).square().sum(-1) / reference.square().sum(-1).clamp(min=1e-12)).mean()
    return total


def rate_loss(mean_rate: Tensor, target: float) -> Tensor:
    """Penalty on a firing rate above its budget: ``max(0, r / r* - 1)^2``, zero below."""
    return (mean_rate / target - 1.0).relu().square()


def attention_rate(rates: Sequence[Tensor], populations: Sequence[Population]) -> Tensor:
    """Mean over the populations of Q, K and V (over all of them if there are none) of their spikes per neuron and step.

    Args:
        rates: ``[C]`` per population.
        populations: What they are.
    """
    chosen = [r for r, p in zip(rates, populations, strict=True) if p.role in ATTENTION_ROLES] or list(rates)
    return torch.stack([r.mean() for r in chosen]).mean()


class Losses(NamedTuple):
    """What one forward pass of training gives.

    Attributes:
        total: The weighted sum, differentiable.
        parts: The four losses in the order of ``PARTS``, ``[4]``, detached.
        rates: Mean firing rate of every population, ``[P]``, detached.
    """

    total: Tensor
    parts: Tensor
    rates: Tensor


class Objective(nn.Module):
    """Program, teacher and losses as one function of the token ids, so that they are compiled as one.

    Args:
        form: The program as it is trained.
        teacher: The original network; needed when the weight of ``kl`` or ``hidden`` is not 0.
        config: Weights of the losses.
        compile: Use ``torch.compile``; shapes must then be the same at every step.

    Raises:
        ConfigError: If a teacher is needed and missing, has another vocabulary, or has other blocks; if rates are to be kept
            down and nothing fires.
    """

    measured: ClassVar[tuple[str, ...]] = PARTS  # the others are 0 because nobody looked, and stay out of the log

    def __init__(self, form: TrainingForm, teacher: TrainingForm | None, config: TrainingConfig, *, compile: bool = False) -> None:
        super().__init__()
        if config.needs_teacher and teacher is None:
            raise ConfigError("KL divergence and hidden states are measured against the original network: give a teacher, or weigh both 0")
        if teacher is not None:
            _check_teacher(form, teacher, config)
        if config.rate_weight and not form.populations:
            raise ConfigError("nothing fires in this program, so there is no rate to keep down: leave target_rate out")
        self.form = form
        self.config = config
        # In a tuple and so no submodule: neither the optimizer nor the exchange between processes has to do with the teacher.
        self._teacher = (teacher if config.needs_teacher else None,)
        self._run: Any = torch.compile(self._losses, dynamic=False) if compile else self._losses

    def forward(self, input_ids: Tensor) -> Losses:
        """Losses of token ids ``[B, L]``."""
        return Losses(*self._run(input_ids))

    def _losses(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config, (teacher,) = self.config, self._teacher
        ours = self.form(input_ids)
        reference = None
        if teacher is not None:
            with torch.no_grad():
                reference = teacher(input_ids)
        ce, kl = logit_losses(ours.logits, reference.logits if reference is not None and config.kl else None, input_ids)
        hidden = hidden_loss(ours.hidden, reference.hidden) if reference is not None and config.hidden else torch.zeros_like(ce)
        return self._weighted(ce, kl, hidden, ours)

    def _weighted(self, ce: Tensor, kl: Tensor, hidden: Tensor, ours: Outputs) -> tuple[Tensor, Tensor, Tensor]:
        """The total, the parts with the rate penalty, and the mean firing rates."""
        config, rate = self.config, torch.zeros_like(hidden)
        if config.rate_weight and config.target_rate is not None:
            rate = rate_loss(attention_rate(ours.rates, self.form.populations), config.target_rate)
        total = config.ce * ce + config.kl * kl + config.hidden * hidden + config.rate_weight * rate
        means = torch.stack([r.mean() for r in ours.rates]) if ours.rates else torch.zeros(0)
        return total, torch.stack([ce, kl, hidden, rate]).detach(), means.detach()


def _check_teacher(form: TrainingForm, teacher: TrainingForm, config: TrainingConfig) -> None:
    mine, its = form.program.info, teacher.program.info
    if mine.vocab_size != its.vocab_size:
        raise ConfigError(
            f"the program has {mine.vocab_size} tokens in its vocabulary and the teacher {its.source} has {its.vocab_size}: "
            "they are not the same network"
        )
    if config.hidden and (form.blocks != teacher.blocks or not form.blocks):
        names = [", ".join(blocks) or "none" for blocks in (form.blocks, teacher.blocks)]
        raise ConfigError(
            f"hidden states are matched block by block, and the program has the blocks {names[0]} where the teacher has {names[1]}: "
            "weigh hidden 0, or give the network that the program was compiled from"
        )
