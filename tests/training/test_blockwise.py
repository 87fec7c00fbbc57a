"""Every layer fitted by itself, then end to end."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from ntc.errors import ConfigError
from ntc.pipeline import run_pipeline
from ntc.text import tokens_from
from ntc.training.blockwise import BlockwiseObjective, fitted_tensors, layer_loss, with_first_stage
from ntc.training.config import TrainingConfig
from ntc.training.form import TrainingForm
from ntc.training.run import finetune
from ntc.training.validation import validate
from ntc_passes.fold_thresholds import FoldThresholds
from ntc_passes.insert_neurons import InsertNeurons
from ntc_passes.replace_attention import ReplaceAttention
from tests.programs import CONTEXT, calibrated, canonical
from tests.training.training_cases import WINDOW, chain, config, without_ties


def test_layer_loss_is_the_unexplained_share_of_power():
    target = [torch.randn(2, 5, 8), 100 * torch.randn(2, 5, 8)]
    assert float(layer_loss(target, target)) == 0
    torch.testing.assert_close(layer_loss([0 * t for t in target], target), torch.tensor(2.0))
    torch.testing.assert_close(layer_loss([1.1 * t for t in target], target), torch.tensor(2 * 0.01))


def test_blockwise_stage_brings_layers_nearer_and_is_part_of_the_run(tmp_path):
    text, held_out = tmp_path / "ids.txt", tmp_path / "held-out.txt"
    text.write_text(" ".join(map(str, chain())))
    held_out.write_text(" ".join(map(str, chain(count=8 * WINDOW))))
    tokens = 4 * WINDOW * 10
    found = finetune(
        without_ties(), text, teacher=canonical(), tokenizer=numbers(), validation=held_out, cache_dir=tmp_path,
        config=config(max_tokens=4 * WINDOW * 5, blockwise_tokens=tokens, group="ssa", lr=2e-3), baseline=canonical(),
    )  # fmt: skip
    assert found.outcome.blockwise_steps == 10
    assert found.outcome.steps == 15
    assert found.outcome.tokens == tokens + 4 * WINDOW * 5
    stages = [row.get("stage") for row in found.log]
    assert stages.count("blockwise") >= 3
    assert all(("ce" in row) == (row.get("stage") != "blockwise") for row in found.log if "loss" in row)  # there it is not computed
    errors = [row["hidden"] for row in found.log if row.get("stage") == "blockwise" and "hidden" in row]
    assert errors[-1] < 0.95 * errors[0]
    assert [row["step"] for row in found.log] == sorted(row["step"] for row in found.log)
    assert found.baseline_log[-1]["tokens"] == found.outcome.tokens  # the original saw as much
    between = [r["valid_perplexity"] for r in found.log if r.get("stage") == "blockwise" and "valid_perplexity" in r][-1]
    tokens_held_out = tokens_from(held_out, numbers(), WINDOW)
    assert found.blockwise is not None
    assert validate(found.blockwise, tokens_held_out).perplexity == pytest.approx(between)
    assert validate(found.program, tokens_held_out).perplexity == pytest.approx(found.outcome.after["valid_perplexity"])


def test_the_stage_is_there_by_default_where_it_is_possible():
    program, names = without_ties(), without_ties().tensors
    left_open = TrainingConfig(window=WINDOW, max_tokens=960)
    assert with_first_stage(left_open, program, canonical(), names).blockwise_tokens == 960
    assert with_first_stage(TrainingConfig(window=WINDOW, max_tokens=960, blockwise_tokens=0), program, canonical(), names).blockwise_tokens == 0
    for teacher, trained in ((None, names), (canonical(n_layer=1), names), (canonical(), ["transformer.wte.weight"])):
        assert with_first_stage(left_open, program, teacher, trained).blockwise_tokens == 0
    assert with_first_stage(left_open, canonical(), canonical(), names).blockwise_tokens == 0  # no neurons
    timed = with_first_stage(TrainingConfig(window=WINDOW, max_minutes=3), program, canonical(), names)
    assert (timed.blockwise_tokens, timed.for_blockwise().max_minutes, timed.for_blockwise().max_tokens) == (None, 1.5, None)


def test_layers_have_to_be_the_same():
    form, settings = TrainingForm(without_ties(), by_layer=True, forced=True), config(blockwise_tokens=48)
    with pytest.raises(ConfigError, match="give a teacher"):
        BlockwiseObjective(form, None, settings)
    with pytest.raises(ConfigError, match="has 4 attentions and FFNs where the original network has 2"):
        BlockwiseObjective(form, TrainingForm(canonical(n_layer=1), by_layer=True), settings)


def test_only_layers_with_neurons_are_fitted(tmp_path):
    policy = [ReplaceAttention.configure({"output": "current"}), FoldThresholds(), InsertNeurons()]
    ssa_only = run_pipeline(calibrated(), policy, CONTEXT)
    fitted = fitted_tensors(ssa_only)
    assert not any(".mlp." in n or ".ln_2." in n or not n.startswith("transformer.h.") for n in fitted)  # embeddings serve the head too
    for name in ("ln_1.weight", "attn.c_proj.bias", "attn.q.threshold"):
        assert {f"transformer.h.{block}.{name}" for block in (0, 1)} <= fitted
    assert any(".mlp.c_proj." in n for n in fitted_tensors(without_ties()))
    text = tmp_path / "ids.txt"
    text.write_text(" ".join(map(str, chain())))
    common = {"teacher": canonical(), "tokenizer": numbers(), "cache_dir": tmp_path}
    tokens = {"max_tokens": 4 * WINDOW, "blockwise_tokens": 4 * WINDOW * 3}
    found = finetune(ssa_only, text, config=config(**tokens, group="all"), **common)
    assert found.blockwise is not None
    assert {n for n, t in found.blockwise.tensors.items() if not torch.equal(t, ssa_only.tensor(n))} == fitted
    with pytest.raises(ConfigError, match="'ffn' has no tensor in a layer that holds neurons"):
        finetune(ssa_only, text, config=config(**tokens, group="ffn"), **common)


def numbers() -> PreTrainedTokenizerFast:
    """A tokenizer of texts of numbers: number n is token n."""
    words = Tokenizer(WordLevel({str(n): n for n in range(61)}, unk_token="0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)
