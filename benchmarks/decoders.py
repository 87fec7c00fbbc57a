"""Every causal decoder of transformers: captured with its own logits, or refused with the module or op that is in the way.

    python benchmarks/decoders.py --output decoders.jsonl
    python benchmarks/decoders.py --only llama,gemma3_text --markdown
    python benchmarks/decoders.py --stored --output decoders.jsonl --page docs/models.md

For each model type of ``MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`` a tiny network of random weights is made, captured and canonicalized as ``ntc
check`` does, and compared with the model's own logits for several batches and lengths up to the context. The config is the default one with
its sizes made small (``SIZES``), one layer of every kind that it has, and what ``EXCEPTIONS`` says. What then holds:

==================  ==================================================================================================
``captured``        the largest difference of logits, how many attention ops there are, what ``canonicalize`` missed
``refused``         the sentence of ntc
``not configured``  this benchmark cannot make a tiny network of it, or the network itself gives no logits: the reason
``bug``             an error that is not ntc's, logits off by more than the limit, no answer in time, a crash
==================  ==================================================================================================

Each runs in a process of its own with a time limit. Each result is a line of --output; a second run tries only what is missing.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from recipes import write_between
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ntc.errors import NtcError
from ntc.frontend import CAPTURE_TOLERANCE, capture
from ntc.ops import SOFTMAX_ATTENTION
from ntc.pipeline import run_pipeline
from ntc.registry import find_pass
from ntc.testing import example_ids, randomize

OUTCOMES = ("captured", "refused", "not configured", "bug")
CONTEXT, VOCABULARY, WINDOW = 24, 61, 4
MEMORY = 6 << 30
"""Address space of a process, bytes."""
WAIT = 10
"""How many times its limit of processor time a process may take by the clock: others use the machine, too."""
SHAPES = ((1, 1), (3, 7), (1, 17), (2, CONTEXT))
"""Batch and length of the texts that logits are compared on; the last is all that the network takes, and six windows."""


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
    "prophetnet": {"max_position_embeddings": CONTEXT + 2},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_shape": [4, 6], "axial_pos_embds_dim": [16, 16], "num_hidden_layers": 2, "attn_layers": ["local", "lsh"]},
    "roberta": _FROM_PAD,
    "roberta-prelayernorm": _FROM_PAD,
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


# ------------------------------------------------------------------------------------------------ a tiny network


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


# ------------------------------------------------------------------------------------------------ one model type


@dataclass(frozen=True)
class Outcome:
    """What became of one model type.

    Attributes:
        model_type: Its name in transformers.
        model: The class that is loaded for it.
        outcome: One of ``OUTCOMES``.
        reason: Of what is not captured; the sentence of ntc if it is refused.
        error: Largest difference of logits over all of ``SHAPES``.
        limit: What the difference may be.
        attention: How many of ``ntc.attention`` and its kin there are.
        layers: Layers of the network.
        missed: What ``canonicalize`` did not recognize: reason and number.
        version: Of transformers.
    """

    model_type: str
    model: str
    outcome: str
    reason: str = ""
    error: float | None = None
    limit: float | None = None
    attention: int = 0
    layers: int = 0
    missed: Mapping[str, int] = field(default_factory=dict)
    version: str = transformers.__version__


def own_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """What the network itself says, with transformers' plainest attention."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def outcome(model_type: str) -> Outcome:
    """Make, capture and compare one model type."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    try:
        model = tiny_model(model_type)
        name = type(model).__name__
        texts = [example_ids(VOCABULARY, batch, length, seed=batch) for batch, length in SHAPES]
        own = [] if model_type in NOT_ALONE else [own_logits(model, ids) for ids in texts]
    except Exception as error:  # noqa: BLE001 - any error of a config or of a network
        return Outcome(model_type, name, "not configured", _said(error))
    layers = layers_of(model.config.get_text_config(decoder=True))
    try:
        program = run_pipeline(capture(model), [find_pass("canonicalize")()])
    except NtcError as error:
        return Outcome(model_type, name, "refused", str(error), layers=layers)
    except Exception:  # noqa: BLE001 - this is what the benchmark looks for
        return Outcome(model_type, name, "bug", traceback.format_exc(limit=-3), layers=layers)
    if model_type in NOT_ALONE:
        return Outcome(model_type, name, "bug", "it was captured, and has no logits of its own for token ids alone", layers=layers)
    error, limit = 0.0, 0.0
    for ids, expected in zip(texts, own, strict=True):
        try:
            with torch.no_grad():
                got = program(ids)
        except Exception:  # noqa: BLE001 - likewise
            return Outcome(model_type, name, "bug", f"at {list(ids.shape)} tokens: {traceback.format_exc(limit=-3)}", layers=layers)
        error = max(error, float((got - expected).abs().max()))
        limit = CAPTURE_TOLERANCE * max(1.0, float(expected.abs().max()) / 10)
        if not error <= limit:
            reason = f"logits of {list(ids.shape)} tokens are off by {error:.3g} (limit {limit:.2g})"
            return Outcome(model_type, name, "bug", reason, error, limit, layers=layers)
    attention = sum(n.target in SOFTMAX_ATTENTION for n in program.graph.nodes)
    missed = Counter(reason for _, reason in program.history[-1].missed)
    return Outcome(model_type, name, "captured", "", error, limit, attention, layers, dict(missed))


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


# ------------------------------------------------------------------------------------------------ all of them


def _answer(model_type: str, pipe: Connection) -> None:
    """In the child: send the outcome."""
    with open(os.devnull, "w") as nowhere:  # what transformers says of a config whose sizes are odd
        os.dup2(nowhere.fileno(), 2)
    try:
        pipe.send(outcome(model_type))
    except MemoryError:
        pipe.send(Outcome(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], "bug", "it needs more memory than a tiny network may"))


def _limited(answer: Callable[[str, Connection], None], model_type: str, pipe: Connection, seconds: float) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 1))
    answer(model_type, pipe)


def isolated(model_type: str, seconds: float, answer: Callable[[str, Connection], None] = _answer) -> Outcome:
    """The outcome of one model type, from a process of its own, whatever becomes of that."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_limited, args=(answer, model_type, theirs, seconds), daemon=True)
    process.start()
    theirs.close()
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    try:
        if not ours.poll(WAIT * seconds):
            return Outcome(model_type, name, "bug", f"no answer within {WAIT * seconds:g} s")
        found: Outcome = ours.recv()
        return found
    except EOFError:
        process.join()
        slow = process.exitcode == -signal.SIGXCPU
        why = f"it takes more than {seconds:g} s of processor time" if slow else f"its process ends with exit code {process.exitcode}"
        return Outcome(model_type, name, "bug", why)
    finally:
        process.kill()
        process.join()


def line(found: Outcome) -> str:
    """One outcome for the terminal."""
    head = f"{found.model_type:24} {found.model:34} {found.outcome:15}"
    if found.outcome != "captured":
        return f"{head} {found.reason.strip().splitlines()[-1]}"
    missed = "".join(f"; {n} x {reason}" for reason, n in found.missed.items())
    return f"{head} error {found.error:.1e} of {found.limit:.1e}, {found.attention} attention ops in {found.layers} layers{missed}"


# ------------------------------------------------------------------------------------------------ the page


def general(found: Outcome) -> str:
    """The sentence of a refusal without what differs from family to family: class, module, line."""
    text = " ".join(found.reason.split())
    text = re.sub(r"(?<= at )[\w.]+ \([\w.]+:\d+ in [^)]*\)(?=: )", "...", text)
    text = re.sub(r"(node %\w+) \([^)]*\)", r"\1", text)
    text = re.sub(r"\b[A-Z]\w*(ForCausalLM|ForConditionalGeneration|LMHeadModel|Attention|ModelWithLMHead)\b", "...", text)
    return re.sub(r"\d[\d.e-]*", "N", text) if "differs from the model" in text or "tokens that an indexer" in text else text


def section(outcomes: Sequence[Outcome], untried: Sequence[str] = ()) -> str:
    """What became of all model types, grouped by outcome, and those of which there is no line.

    Raises:
        SystemExit: If the outcomes are of several versions of transformers.
    """
    versions = sorted({o.version for o in outcomes})
    if len(versions) != 1:
        raise SystemExit(f"a section of the page has one version of transformers, and these lines have {', '.join(versions) or 'none'}")
    groups = {name: [o for o in outcomes if o.outcome == name] for name in OUTCOMES}
    captured = groups["captured"]
    whole = [o for o in captured if o.attention and not o.missed]
    worst = max((o.error or 0.0 for o in captured), default=0.0)
    counts = ", ".join(f"{len(group)} {name}" for name, group in groups.items() if group)
    parts = [
        f"transformers {versions[0]}, {len(outcomes)} of {len(outcomes) + len(untried)} model types tried: {counts}.",
        f"**Captured** ({len(captured)}; the largest difference of logits is {worst:.1e}). Every attention is one op, and `canonicalize` "
        f"misses nothing ({len(whole)}): {_names(whole)}.",
    ]
    rest = [o for o in captured if o not in whole]
    if rest:
        parts += [f"With something left as it is ({len(rest)}):", _table(("model types", "attention ops", "missed"), _left(rest))]
    titles = {
        "refused": "**Refused**", "bug": "**Not as they should be**",
        "not configured": "**Not configured**: the benchmark makes no tiny network of it",
    }  # fmt: skip
    for name, title in titles.items():
        if groups[name]:
            sentences: dict[str, list[Outcome]] = {}
            for o in groups[name]:
                sentences.setdefault(general(o), []).append(o)
            rows = sorted(sentences.items(), key=lambda item: -len(item[1]))
            parts += [f"{title} ({len(groups[name])}):", _table(("model types", "sentence"), ((_names(g), f"`{s}`") for s, g in rows))]
    if untried:
        parts.append(f"**Not tried yet** ({len(untried)}): {', '.join(f'`{name}`' for name in sorted(untried))}.")
    return "\n\n".join(parts)


def _left(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, str, str]]:
    """Rows of what is captured and not all recognized; types with the same are one row."""
    rows: dict[tuple[bool, str], list[Outcome]] = {}
    for o in outcomes:
        rows.setdefault((bool(o.attention), "; ".join(sorted(o.missed)) or "nothing: it has no softmax attention"), []).append(o)
    for (some, missed), group in sorted(rows.items(), key=lambda item: -len(item[1])):
        yield _names(group), "yes" if some else "none", missed


def _names(outcomes: Sequence[Outcome]) -> str:
    return ", ".join(f"`{o.model_type}`" for o in sorted(outcomes, key=lambda o: o.model_type))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ------------------------------------------------------------------------------------------------ the command


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="model types, several with a comma")
    parser.add_argument("--seconds", type=float, default=60, help="processor time that each may take")
    parser.add_argument("--output", type=Path, default=Path("decoders.jsonl"))
    parser.add_argument("--stored", action="store_true", help="try nothing: the lines that --output has")
    parser.add_argument("--markdown", action="store_true", help="print the tables")
    parser.add_argument("--page", type=Path, help="put the tables of all lines of --output between this page's marks")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    wanted = args.only.split(",") if args.only else list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    unknown = [w for w in wanted if w not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    if unknown:
        raise SystemExit(f"transformers {transformers.__version__} has no causal decoder of type {', '.join(unknown)}")
    stored = map(json.loads, args.output.read_text().splitlines()) if args.output.exists() else ()
    done = {d["model_type"]: Outcome(**d) for d in stored}  # the last line of a type holds
    warm = False
    for name in () if args.stored else wanted:
        if name not in done:
            if not warm:
                outcome("gpt2")  # what torch.export loads when it is first used is then there in every child
                gc.freeze()
                warm = True
            done[name] = isolated(name, args.seconds)
            with args.output.open("a") as lines:
                lines.write(json.dumps(asdict(done[name])) + "\n")
            print(line(done[name]), flush=True)
    tables = section([done[name] for name in wanted if name in done], [name for name in wanted if name not in done])
    if args.markdown:
        print(tables)
    if args.page:
        write_between(args.page, "decoders", tables)


if __name__ == "__main__":
    main()
