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
from ntc.pipeline import run_pipeline
from ntc.program import Program
from ntc.testing import randomize
from ntc_passes.canonicalize import Canonicalize

_SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_WIDE_HEADS = {**_GROUPED, "head_dim": 12}  # H D = 48 is not the width of the stream


@dataclass(frozen=True)
class Family:
    """One family: its classes by the stem of their name, a config, and what becomes of it.

    Attributes:
        stem: ``Llama`` of ``LlamaConfig`` and ``LlamaForCausalLM``.
        config: Fields of the config.
        attention: How many ``ntc.attention`` there are.
        bounds: Window and cap of each ``ntc.windowed_attention``.
        norm: The op that its norms are.
        norms: How many there are.
        activation: The op of its FFN.
        gated: Whether its FFN has a gate, so that the neurtransformer recipe refuses it.
        rotary: Whether queries and keys are rotated, so that neurons do not stand right behind their projections.
        config_stem: Of its config, where that is named otherwise.
    """

    stem: str
    config: Mapping[str, Any] = field(default_factory=lambda: _GROUPED)
    attention: int = 1
    bounds: tuple[tuple[int, float], ...] = ()
    norm: str = "rms_norm"
    norms: int = 3
    activation: str = "silu"
    gated: bool = True
    rotary: bool = True
    config_stem: str = ""


FAMILIES = {
    "llama": Family("Llama", {**_GROUPED, "num_hidden_layers": 2}, attention=2, norms=5),
    "qwen2 with windows": Family(
        "Qwen2", {**_GROUPED, "num_hidden_layers": 2, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, 1, ((4, 0.0),),
        norms=5,
    ),
    "mistral": Family("Mistral", {**_GROUPED, "sliding_window": 4}, 0, ((4, 0.0),)),
    "qwen3": Family("Qwen3", _WIDE_HEADS, norms=5),
    "smollm3": Family("SmolLM3", {**_GROUPED, "num_hidden_layers": 2, "no_rope_layers": [0, 1]}, attention=2, norms=5),
    "gemma": Family("Gemma", _WIDE_HEADS, activation="gelu"),
    "gemma2": Family(
        "Gemma2", {**_WIDE_HEADS, "sliding_window": 4, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}, 0, ((4, 2.0),), norms=5,
        activation="gelu",
    ),
    "gemma3": Family(
        "Gemma3", {
            **_WIDE_HEADS, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4,
            "query_pre_attn_scalar": 8,
        }, 1, ((4, 0.0),), norms=13, activation="gelu", config_stem="Gemma3Text",
    ),
    "olmo": Family("Olmo", norm="layer_norm"),
    "olmo2": Family("Olmo2", norms=5),
    "cohere": Family("Cohere", {**_GROUPED, "pad_token_id": 0}, norm="layer_norm", norms=2),
    "stablelm": Family("StableLm", norm="layer_norm"),
    "starcoder2": Family(
        "Starcoder2", {**_GROUPED, "sliding_window": 4}, 0, ((4, 0.0),), norm="layer_norm", activation="gelu", gated=False,
    ),
    "phi": Family("Phi", _GROUPED, norm="layer_norm", norms=2, activation="gelu", gated=False),
    "phi3": Family("Phi3", {**_GROUPED, "pad_token_id": 0}),
    "gpt-neox": Family("GPTNeoX", _SIZES, norm="layer_norm", activation="gelu", gated=False),
    "falcon": Family(
        "Falcon", {**_SIZES, "ffn_hidden_size": 48, "num_key_value_heads": 1}, norm="layer_norm", norms=2, activation="gelu", gated=False,
    ),
    "gptj": Family("GPTJ", {**_SIZES, "n_inner": 48, "rotary_dim": 4}, norm="layer_norm", norms=2, activation="gelu", gated=False),
    "xglm": Family("XGLM", {**_SIZES, "ffn_dim": 48, "pad_token_id": 1}, norm="layer_norm", activation="gelu", gated=False, rotary=False),
    "opt": Family(
        "OPT", {**{k: v for k, v in _SIZES.items() if k != "intermediate_size"}, "ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1},
        norm="layer_norm", activation="relu", gated=False, rotary=False,
    ),
}  # fmt: skip
CONVERTED = ("mistral", "opt")
"""Families that are also converted, saved and exported: a gated FFN with a window, and a plain one. The others differ in front of that."""


@cache
def model(name: str) -> PreTrainedModel:
    """The model of a family, of random weights whose logits vary, in evaluation mode; nobody changes it."""
    family = FAMILIES[name]
    config = getattr(transformers, f"{family.config_stem or family.stem}Config")(**family.config)
    made: PreTrainedModel = getattr(transformers, f"{family.stem}ForCausalLM")(config)
    randomize(made, seed=0)
    return made.eval()


@cache
def analog(name: str) -> Program:
    """A family, canonical."""
    return compiled(name).analog if name in CONVERTED else run_pipeline(ntc.capture(model(name)), [Canonicalize()])


@cache
def compiled(name: str) -> Compilation:
    """A family with spiking attention, its FFN as it is."""
    return ntc.compile(model(name), recipe="ssa-only", calibration=CALIBRATION)
