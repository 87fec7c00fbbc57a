"""Tiny networks of every model type that transformers loads as a causal decoder.

The config is the default one of its type with its sizes made small (``SIZES``), one layer of every kind that it has, and what
``EXCEPTIONS`` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ntc.testing import randomize

CONTEXT, VOCABULARY, WINDOW = 24, 61, 4


def _each(value: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


SIZES = {
    **_each(VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size"),
    **_each(CONTEXT, "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length max_target_positions"),
    **_each(32, "hidden_size d_model n_embd embedding_size emb_dim embedding_dim input_embedding_size output_embedding_size lru_width"),
    **_each(32, "word_embed_proj_dim attention_hidden_size backbone_hidden_size hidden_size_global adapter_in_dim adapter_out_dim"),
    **_each(48, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size expert_ffn_hidden_size dff d_inner dim_ff"),
    **_each(48, "feed_forward_size moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size n_inner"),
    **_each(48, "shared_intermediate_size dense_intermediate_size intermediate_size_mlp moe_shared_expert_intermediate_size"),
    **_each(4, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads"),
    **_each(4, "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads linear_num_value_heads linear_num_heads"),
    **_each(2, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads"),
    **_each(8, "head_dim d_head swa_head_dim kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim linear_head_dim dim_head"),
    **_each(8, "linear_key_head_dim linear_value_head_dim attention_head_size rotary_dim global_head_dim query_pre_attn_scalar"),
    **_each(16, "qk_head_dim kv_lora_rank q_lora_rank"),
    **_each(4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    **_each(2, "num_experts_per_tok num_experts_per_token moe_topk moe_k"),
    **_each(1, "n_group topk_group num_expert_group first_k_dense_replace n_shared_experts num_dense_layers"),
    **_each(8, "state_size mamba_d_state ssm_state_size mamba_dt_rank time_step_rank mamba_d_head mamba_head_dim mamba_headdim"),
    **_each(8, "chunk_size mamba_chunk_size"),
    **_each(WINDOW, "sliding_window window_size attention_window_size local_attention sliding_window_size"),
    **_each(8, "hidden_size_per_layer_input laurel_rank indexer_head_dim index_head_dim swa_v_head_dim"),
    # What begins at some length begins within the text.
    **_each(WINDOW, "index_topk index_topk_blocks index_block_size keep_window_size attention_chunk_size local_attn_chunk_length"),
    **_each(WINDOW, "lsh_attn_chunk_length floor_scale log_scaling_n_floor rel_extent local_attention_window_len"),
    **_each(2, "block_size num_random_blocks patch_size index_n_heads"),
    **_each(16, "position_bias_max_distance relative_max_distance clamp_len"),
}  # fmt: skip
"""The size of a field, where the default config has one."""

_LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers", "encoder_layers",
    "num_encoder_layers", "num_blocks",
)  # fmt: skip
_ALWAYS = ("head_dim", "num_key_value_heads", "n_routed_experts")  # also where the default is that another field tells

_FROM_PAD = {"max_position_embeddings": CONTEXT + 2}  # positions begin behind the padding token's id, 1
_INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2}
# All layers of an assistant share keys and values, and transformers 5.23.0 makes no Gemma 4 of which all do: neither can be made.
_ASSISTANT = {"num_hidden_layers": 2, "num_kv_shared_layers": 2}
_CONVOLUTION = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA,
    "blt": {
        "encoder_hash_byte_group_vocab": VOCABULARY, "encoder_hash_byte_group_size": [3],
        **{f"{part}_config": {"vocab_size": 260} for part in ("patcher", "encoder", "decoder")},
    },
    "camembert": _FROM_PAD,
    "cohere_compass_text": {
        "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}, "full_attention": None,
        },
    },
    "data2vec-text": _FROM_PAD,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots3_note": {"audio_config": {"adapter_input_size": 32}},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0], "num_hidden_layers": 2},
    "gemma4_assistant": {"text_config": {**_ASSISTANT, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gemma4_unified_assistant": {"text_config": _ASSISTANT},
    "granitemoehybrid": _MAMBA,
    "lfm2": _CONVOLUTION,
    "lfm2_moe": _CONVOLUTION,
    "mamba2": {"num_heads": 8},
    "prophetnet": {"max_position_embeddings": CONTEXT + 2, "num_buckets": 8},  # less than twice the largest distance
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_shape": [4, 6], "axial_pos_embds_dim": [16, 16], "num_hidden_layers": 2, "attn_layers": ["local", "lsh"]},
    "roberta": _FROM_PAD,
    "roberta-prelayernorm": _FROM_PAD,
    "rwkv": {"num_hidden_layers": 2},  # it divides by their number less one
    "xlm-roberta": _FROM_PAD,
    "xlm-roberta-xl": _FROM_PAD,
    "xmod": {**_FROM_PAD, "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5, "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 64, "attention_head_dim": 16,
    },
    "zamba2": {
        "mamba_headdim": 8, "n_mamba_heads": 8, "attention_hidden_size": 64, "attention_head_dim": 16, "num_query_groups": 4,
        "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""Fields of single model types over those of ``SIZES``."""

PART = {"musicgen": "decoder", "musicgen_melody": "decoder"}
"""Of which config inside of the type's config the decoder is made."""

NOT_ALONE = ("musicgen", "musicgen_melody")
"""What has no logits for token ids ``[B, L]`` alone: here the ids of several codebooks."""


def small_fields(default: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a config that make its network tiny: sizes, one layer of every kind, token ids of the vocabulary."""
    plain = default.to_dict()
    layers = layers_of(default)
    lists = {k: v for k, v in plain.items() if isinstance(v, list) and len(v) == layers and layers > 2}
    count = max([1, *(len(_kinds(v)) for v in lists.values())])
    fields: dict[str, Any] = {}
    for name, value in plain.items():
        if name in default.sub_configs:
            continue
        if name in lists:
            kinds = _kinds(value)
            fields[name] = [kinds[min(i, len(kinds) - 1)] for i in range(count)]
        elif name in _LAYERS:
            fields[name] = count
        elif name in SIZES and (name in _ALWAYS or (isinstance(value, int) and not isinstance(value, bool))):
            fields[name] = SIZES[name]
        elif name == "is_decoder":  # an encoder, unless it is told otherwise
            fields[name] = True
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCABULARY:
            fields[name] = 0 if name.startswith(("bos", "eos", "pad")) else VOCABULARY - 1
        elif name == "eos_token_id" and isinstance(value, list):
            fields[name] = 0
    if plain.get("kv_lora_rank"):
        fields["num_key_value_heads"] = SIZES["num_attention_heads"]  # keys and values of all heads come from one latent value
    for name, kind in default.sub_configs.items():
        inner = getattr(default, name, None)
        if isinstance(inner, PreTrainedConfig):
            fields[name] = small_fields(inner)
        elif isinstance(kind, type) and issubclass(kind, PreTrainedConfig) and kind is not PreTrainedConfig:
            fields[name] = small_fields(kind())
    return fields


def layers_of(config: PreTrainedConfig) -> int:
    """How many layers a config tells of; 0 if it does not."""
    return next((v for k in _LAYERS if isinstance(v := getattr(config, k, None), int)), 0)


def _kinds(values: Sequence[Any]) -> list[Any]:
    """What a list has, each once."""
    return [v for i, v in enumerate(values) if v not in values[:i]]


def tiny_model(model_type: str) -> PreTrainedModel:
    """The network that transformers loads for a config of that type, tiny, of random weights whose logits vary, in evaluation mode."""
    kind = CONFIG_MAPPING[model_type]
    part = PART.get(model_type)
    kind = kind.sub_configs[part] if part else kind
    config = kind(**merged(small_fields(kind()), EXCEPTIONS.get(model_type, {})))
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    model: PreTrainedModel = getattr(transformers, name)(config) if part else AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed=0)
    return model.eval()


def merged(fields: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with others over them, configs inside of configs likewise."""
    both = {k: merged(fields[k], v) if isinstance(v, Mapping) and isinstance(fields.get(k), Mapping) else v for k, v in over.items()}
    return {**fields, **both}
