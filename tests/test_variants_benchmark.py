"""benchmarks/attention_variants.py and its procedures: equal budgets, what is carried from block to block, rows that are kept."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ntc.errors import ConfigError, TrainingError
from ntc.pipeline import Context, run_pipeline
from ntc.program import Program
from ntc.testing import count_ops, tiny_gpt2
from ntc.training.config import TrainingConfig
from ntc_passes.calibrate import Calibrate
from ntc_passes.fold_thresholds import FoldThresholds
from ntc_passes.insert_neurons import InsertNeurons
from ntc_passes.replace_attention import ReplaceAttention
from tests.programs import CALIBRATION, calibrated, canonical

ROOT = Path(__file__).parents[1]
REFERENCE, SAMPLE = ROOT / "examples" / "gpt2-books", ROOT / "examples" / "data" / "books-sample.txt"
WINDOW = 24


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("attention_variants", "procedures")})


@pytest.fixture
def variants(modules):
    return modules.attention_variants


@pytest.fixture
def procedures(modules):
    return modules.procedures


# ------------------------------------------------------------------------------------------------ procedures


def training(procedures, **options):
    config = TrainingConfig(**{"blockwise_tokens": 500, "max_tokens": 700, "lr": 1e-3, "window": 12, **options})
    return procedures.Training("text.txt", None, config, canonical(), None, {"text": "a", "validation": "b"})


def test_every_procedure_trains_on_as_many_tokens(procedures):
    given = training(procedures, target_rate=0.2)
    for name in (*procedures.PROCEDURES, procedures.ORIGINAL):
        config = given.by(name)
        assert config.max_tokens + config.blockwise_tokens == 1200, name
    hidden = given.by(procedures.HIDDEN)
    assert replace(hidden, kl=1.0, hidden=0.0) == given.by(procedures.END_TO_END), "one thing differs"
    original = given.by(procedures.ORIGINAL)
    assert (original.kl, original.ce, original.rate_weight) == (0.0, 1.0, 0.0)


def test_rows_depend_on_what_results_depend_on(procedures):
    about = training(procedures).about(procedures.BOTH)
    assert training(procedures, save_every=7, log_every=3).about(procedures.BOTH) == about
    for option in ({"lr": 2e-3}, {"seed": 1}, {"group": "ssa"}, {"blockwise_lr": 2.5e-3}):
        assert training(procedures, **option).about(procedures.BOTH) != about, option
    assert training(procedures, blockwise_lr=2e-3).about(procedures.BOTH) == about, "which it is without"
    assert procedures.Training("text.txt", None, training(procedures).config, canonical(), None, {"text": "c"}).about(procedures.BOTH) != about


class FakeTraining:
    """In place of ``finetune``: makes every tensor smaller, and keeps what it was given."""

    def __init__(self, fails_at: int = 99) -> None:
        self.given: list[tuple[Program, TrainingConfig, Path]] = []
        self.fails_at = fails_at

    def __call__(self, program, text, *, config, work, **more):
        self.given.append((program, config, work))
        found = SimpleNamespace(program=trained(program))
        if len(self.given) == self.fails_at:
            error = TrainingError("it diverged")
            error.best = found
            raise error
        return found


def trained(program: Program) -> Program:
    """Matrices times 3/4, all else (thresholds, leaks, initial potentials, biases) halved: exact in floats, and legal."""
    values = {name: t.detach() * (0.75 if t.dim() == 2 else 0.5) for name, t in program.tensors.items() if t.is_floating_point()}
    copy = program.copy()
    return copy.with_graph(copy.graph, values)


def convert(program, left):
    passes = [Calibrate(), ReplaceAttention.configure({"normalizer": "leak"}), FoldThresholds(), InsertNeurons()]
    return run_pipeline(program, passes, Context(CALIBRATION, left))


def test_progressive_replacement_carries_what_was_trained(procedures, monkeypatch, tmp_path):
    fake = FakeTraining()
    monkeypatch.setattr(procedures, "finetune", fake)
    found = training(procedures, seed=5).run(procedures.PROGRESSIVE, calibrated(), convert, tmp_path)
    (first, one, place), (second, two, other_place) = fake.given
    assert [count_ops(p)["ntc.spiking_attention"] for p in (first, second, found.program)] == [1, 2, 2]
    assert "h_1_attn_attention" in {n.name for n in first.graph.nodes}, "the first block is converted first"
    assert (one.max_tokens, two.max_tokens, one.blockwise_tokens, two.blockwise_tokens) == (600, 600, 0, 0)
    assert (one.seed, two.seed) == (5, 6)
    assert place != other_place
    after = trained(first)
    around = {name for name in second.tensors if name not in first.tensors} | {
        name for name in second.tensors if re.search(r"\.h\.1\.attn\.c_(attn|proj)", name)
    }
    folded_again = {name for name in second.tensors if re.search(r"\.h\.0\.attn\.(c_attn|[qkv]\.threshold)", name)}
    kept = set(second.tensors) - around - folded_again
    assert "transformer.h.0.attn.ssa.leak" in kept
    assert "transformer.h.1.mlp.c_fc.weight" in kept
    for name in kept:
        torch.testing.assert_close(second.tensors[name], after.tensors[name], rtol=0, atol=0, msg=name)
    for name in ("q", "k", "v"):  # a threshold that was trained is folded into its rows: the same neuron
        prefix = "transformer.h.0.attn"
        weight, theta = f"{prefix}.c_attn.{name}.weight", f"{prefix}.{name}.threshold"
        assert torch.equal(second.tensors[theta], torch.ones_like(second.tensors[theta]))
        torch.testing.assert_close(second.tensors[weight], after.tensors[weight] / after.tensors[theta][:, None])
    # The second block's projection is the trained one, folded: rows over thresholds found on what the first block now gives.
    weight = "transformer.h.1.attn.c_attn.q.weight"
    ratio = second.tensors[weight] / after.tensors[weight]
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=0)
    assert not torch.allclose(ratio, torch.ones_like(ratio))


@pytest.mark.parametrize(("fails_at", "has_best"), [(1, False), (2, True)])
def test_a_program_that_is_partly_analog_is_no_result(procedures, monkeypatch, tmp_path, fails_at, has_best):
    monkeypatch.setattr(procedures, "finetune", FakeTraining(fails_at))
    with pytest.raises(TrainingError) as failed:
        training(procedures).run(procedures.PROGRESSIVE, calibrated(), convert, tmp_path)
    assert (failed.value.best is not None) == has_best


def test_progressive_replacement_needs_blocks(procedures, monkeypatch, tmp_path):
    monkeypatch.setattr(procedures, "block_outputs", lambda program: {})
    with pytest.raises(ConfigError, match="no transformer blocks that could be replaced one after another"):
        training(procedures).run(procedures.PROGRESSIVE, calibrated(), convert, tmp_path)


# ------------------------------------------------------------------------------------------------ rows and tables


def test_rows_that_are_older_than_an_option_are_kept(variants, procedures):
    options = {"steps": 4, "normalizer": "rms"}
    row = {"variant": "rms", "options": options, "measured_on": {"tokens": 1}, "training": training(procedures).about(procedures.BOTH)}
    config = dict(row["training"]["config"])
    assert config.pop("weight_decay") == TrainingConfig().weight_decay
    older = {**row, "training": {**row["training"], "config": config}}
    assert variants.key_of(older) == variants.key_of(row)
    assert variants.key_of({**row, "options": {**options, "convert": True, "percentile": 90.0}}) == variants.key_of(row)
    assert variants.key_of({**row, "options": {**options, "percentile": 91.0}}) != variants.key_of(row)
    assert variants.key_of({**row, "training": None}) != variants.key_of(row)


def test_rows_are_made_once_and_half_lines_again(variants, tmp_path):
    about = {"variant": "rms", "options": {}, "measured_on": {}}
    path = tmp_path / "below" / "rows.jsonl"
    assert variants.Rows(path).get(about, lambda: {"figure": 1})["figure"] == 1
    assert variants.Rows(path).get(about, lambda: {"figure": 2})["figure"] == 1
    path.write_text(path.read_text()[:20])
    assert variants.Rows(path).get(about, lambda: {"figure": 3})["figure"] == 3


def test_a_training_that_failed_is_shown_as_such(variants):
    figures = {"perplexity": 60.0, "cosine": 0.99, "attention_rate": 0.2, "steps_times_rate": 0.5, "energy_reduction": 0.875}
    row = {
        "variant": "rms", "untrained": {"perplexity": 90.0}, "training": {"procedure": "end to end"}, "blockwise": None,
        "end_to_end": {**figures, "energy_reduction_streaming": None}, "failed": None,
    }  # fmt: skip
    columns = variants.trained_columns("variant", {"end_to_end": {"perplexity": 50.0}})
    lines = [[show(r) for show in columns.values()] for r in (row, row | {"failed": "diverged"}, row | {"failed": "x", "end_to_end": None})]
    shown = "rms|90.00|–|–|–|–|{}|{}|{}|{}|{}|{}|–".format
    assert ["|".join(line) for line in lines] == [
        shown("60.00", "+20.0 %", "0.9900", "0.200", "0.50", "87.5 %"), shown("60.00, failed", "+20.0 %", "0.9900", "0.200", "0.50", "87.5 %"),
        shown("–, failed", "–", "–", "–", "–", "–"),
    ]  # fmt: skip
    assert variants.trained_columns("procedure", row)["procedure"](row) == "end to end"
    assert columns["to tuned"](row | {"end_to_end": None}) == "–"


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    tiny_gpt2(n_layer=1, vocab_size=4096).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / name, folder / "model")
    text = SAMPLE.read_text(encoding="utf-8")
    for name, part in {"model/calibration": text[:1500], "train": text[2000:8000], "data": text[12000:13000]}.items():
        (folder / f"{name}.txt").write_text(part, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield folder


def run(variants, place: Path, *more: object, only: tuple[str, ...] = ("position",), train: bool = True) -> None:
    texts = ["--model", place / "model", "--data", place / "data.txt", "--tokens", 4 * WINDOW, "--steps", 2, "--output", place / "rows.jsonl"]
    options = ["--train", place / "train.txt", "--blockwise-tokens", 4 * WINDOW * 2, "--finetune-tokens", 4 * WINDOW * 2]
    pairs = [f"--finetune={p}" for p in ("rows=4", "validation_windows=2", "compile=false", "bf16=false", "lr=3e-3", "warmup=0", "ce=1", "kl=0.1")]
    arguments = [*texts, *((*options, *pairs) if train else ()), *(f"--only={name}" for name in only), *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["attention_variants.py", *map(str, arguments)])
        variants.main()


def test_a_command_that_was_stopped_goes_on(variants, procedures, place, capsys, monkeypatch):
    measure, seen = variants.measure, []

    def stopped(program, *more):
        seen.append(program)
        if len(seen) == 3:  # the variant is trained, and not yet measured
            raise KeyboardInterrupt
        return measure(program, *more)

    monkeypatch.setattr(variants, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(variants, place)
    assert capsys.readouterr().err.splitlines() == [
        "the original network: the original network", "position: not trained", "position: blockwise, then end to end",
    ]  # fmt: skip
    monkeypatch.setattr(variants, "measure", measure)
    run(variants, place, "--markdown", only=("position", procedures.PROGRESSIVE))
    printed = capsys.readouterr()
    assert [line for line in printed.err.splitlines() if not line.startswith(" ")] == [
        "position: blockwise, then end to end", "the recipe's: not trained", "the recipe's: progressive replacement",
    ], "what was there is not done again"  # fmt: skip
    assert "blockwise: going on from step 2 of the run" in printed.err
    assert "  going on from step 2 of the run" in printed.err
    assert not list((place / "rows.work").rglob("*.pt"))
    original, before, position, untrained, progressive = variants.read_rows(place / "rows.jsonl")
    assert [r["training"]["procedure"] for r in (original, position, progressive)] == [
        procedures.ORIGINAL, procedures.BOTH, procedures.PROGRESSIVE,
    ]  # fmt: skip
    between, after = position["blockwise"], position["end_to_end"]
    assert len({f["perplexity"] for f in (before, between, after)}) == 3
    assert before["perplexity_ann"] == between["perplexity_ann"] == after["perplexity_ann"] != original["end_to_end"]["perplexity"]
    assert (before["attention_rate"], original["end_to_end"]["attention_rate"]) == (pytest.approx(np.mean(rates_of(before))), None)
    assert progressive["blockwise"] is None
    assert f"| position | {before['perplexity']:.2f} | {between['perplexity']:.2f} |" in printed.out
    assert f"| progressive replacement | {untrained['perplexity']:.2f} | – |" in printed.out


def rates_of(row):
    """One block: a population each of Q, K and V."""
    return [row["rates"][role] for role in "qkv"]


@pytest.mark.parametrize(("more", "options", "message"), [
    ([], {"train": False, "only": ("end to end",)}, "'end to end' is a way to train, and there is no text to train on: give --train TEXT"),
    (["--finetune", "lrr=1"], {}, "no option 'lrr'; did you mean lr"),
    (["--target-rate", "1.5"], {}, "target_rate is in spikes per neuron and step"),
])  # fmt: skip
def test_refuses_before_it_works(variants, place, more, options, message):
    with pytest.raises(ConfigError, match=message):
        run(variants, place, *more, **options)
