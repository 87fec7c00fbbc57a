"""The optimizer: what decays, and what has a learning rate of its own."""

from __future__ import annotations

import torch
from torch import nn

from ntc.training.config import TrainingConfig
from ntc.training.form import TrainingForm

__all__ = ["optimizer_for"]


def optimizer_for(form: TrainingForm, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over what the form trains, in three groups: matrices (which decay), other weights, constants of neurons."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    neurons: list[nn.Parameter] = []
    for key, parameter in form.raw.items():
        if form.roles[key.replace("/", ".")].role != "weight":
            neurons.append(parameter)
        else:
            (matrices if parameter.dim() >= 2 else others).append(parameter)
    neuron_lr = config.lr if config.neuron_lr is None else config.neuron_lr
    groups = [
        {"params": matrices, "lr": config.lr, "peak": config.lr, "weight_decay": config.weight_decay},
        {"params": others, "lr": config.lr, "peak": config.lr, "weight_decay": 0.0},
        {"params": neurons, "lr": neuron_lr, "peak": neuron_lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=config.betas, fused=True)
