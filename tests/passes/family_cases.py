"""Tiny random models of the decoder families that docs/models.md lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import transformers
from programs import CALIBRATION
from transformers import PreTrainedModel

import ntc
from ntc.compiler import Compilation
from ntc.testing import randomize

_SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Family:
    """One family: its classes by the stem of their name, a config, and what becomes of it.

    Attributes:
        stem: ``Llama`` of ``LlamaConfig`` and ``LlamaForCausalLM``.
        config: Fields of the config.
        attention: How many ``ntc.attention`` there are.
        bounds: Window and cap of each ``ntc.windowed_attention``.
        gated: Whether its FFN has a gate, so that the neurtransformer recipe refuses it.
        rotary: Whether queries and keys are rotated, so that neurons do not stand right behind their projections.
    """

    stem: str
    config: Mapping[str, Any] = field(default_factory=lambda: _GROUPED)
    attention: int = 1
    bounds: tuple[tuple[int, float], ...] = ()
    gated: bool = True
    rotary: bool = True


FAMILIES = {
    "mistral": Family("Mistral", {**_GROUPED, "sliding_window": 4}, 0, ((4, 0.0),)),
    "opt": Family(
        "OPT", {**{k: v for k, v in _SIZES.items() if k != "intermediate_size"}, "ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1},
        gated=False, rotary=False,
    ),
}  # fmt: skip


def make(stem: str, config: Mapping[str, Any]) -> PreTrainedModel:
    """A model of random weights whose logits vary, in evaluation mode."""
    model: PreTrainedModel = getattr(transformers, f"{stem}ForCausalLM")(getattr(transformers, f"{stem}Config")(**config))
    randomize(model, seed=0)
    return model.eval()


@cache
def model(name: str) -> PreTrainedModel:
    """The model of a family; nobody changes it."""
    return make(FAMILIES[name].stem, FAMILIES[name].config)


@cache
def compiled(name: str) -> Compilation:
    """A family with spiking attention, its FFN as it is."""
    return ntc.compile(model(name), recipe="ssa-only", calibration=CALIBRATION)
