"""The benchmarks of fine-tuning: what they compute, and that they run; the speeds are nobody's promise."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ntc.figures import write_scatter
from ntc.testing import tiny_gpt2
from ntc.training.config import TrainingConfig
from tests.programs import canonical
from tests.training.training_cases import WINDOW, chain, config

ROOT = Path(__file__).parents[1]
REFERENCE, SAMPLE = ROOT / "examples" / "gpt2-books", ROOT / "examples" / "data" / "books-sample.txt"


def run(name: str, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        limit = torch._dynamo.config.recompile_limit
        try:
            runpy.run_path(str(ROOT / "benchmarks" / name), run_name="__main__")
        finally:
            torch._dynamo.config.recompile_limit = limit


# ------------------------------------------------------------------------------------------------ throughput


@pytest.fixture(scope="module")
def throughput():
    return runpy.run_path(str(ROOT / "benchmarks" / "finetune_throughput.py"))


@pytest.fixture(scope="module")
def windows():
    return torch.from_numpy(chain(count=8 * WINDOW)).view(8, WINDOW)


def test_a_step_in_pieces_is_the_same_step(throughput, windows):
    # The original network and plain gradient descent: rounding then stays rounding, where thresholds and Adam would amplify it.
    whole, pieces = (throughput["Run"](canonical(), canonical(), config(accumulate=n, clip=1e6), windows) for n in (1, 4))
    pieces.form.load_state_dict(whole.form.state_dict())
    before = {name: parameter.detach().clone() for name, parameter in whole.form.raw.items()}
    for run in (whole, pieces):
        run.optimizer = torch.optim.SGD(run.form.raw.values(), lr=1.0)
        run.step()
    moved = {name: parameter.detach() - before[name] for name, parameter in whole.form.raw.items()}
    for name, parameter in pieces.form.raw.items():
        torch.testing.assert_close(parameter.detach() - before[name], moved[name], rtol=1e-3, atol=1e-5)


def test_variants_change_one_option_each(throughput):
    base = TrainingConfig(bf16=True, compile=True)
    changed = throughput["variants"](base)
    assert list(changed) == [
        "bf16 off", "compile off", "checkpointing on", "rows 4", "rows 16", "accumulate 2", "accumulate 4",
    ]  # fmt: skip
    for name, other in changed.items():
        option = name.split()[0]
        assert getattr(other, option) != getattr(base, option)
        assert replace(other, **{option: getattr(base, option)}) == base


def test_ratio_is_the_median_of_the_rounds(throughput):
    class Fake:
        peak_mib, first_seconds = None, 0.0

        def __init__(self, speeds):
            self.speeds = iter(speeds)

        def tokens_per_second(self, steps):
            return next(self.speeds)

    found = throughput["in_turns"](Fake([1.0, 8.0, 3.0]), Fake([2.0, 4.0, 3.0]), 3, 1)
    assert found["ratios"] == [0.5, 2.0, 1.0]
    assert [found[k] for k in ("ratio", "ratio_lowest", "ratio_highest")] == [1.0, 0.5, 2.0]
    assert [found[k] for k in ("tokens_per_second", "against_tokens_per_second")] == [3.0, 3.0]


def test_throughput_runs(tmp_path, capsys):
    tiny_gpt2(n_layer=1, vocab_size=4096).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / name, tmp_path / "model")
    (tmp_path / "model" / "calibration.txt").write_text(SAMPLE.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    pairs = [f"--finetune={p}" for p in ("compile=false", "bf16=false", "rows=2", "group=ssa")]
    only = ["--only", "original", "--only", "checkpointing"]
    run("finetune_throughput.py", "--model", tmp_path / "model", "--rounds", 1, "--turn", 1, "--steps", 2, "--json", *only, *pairs)
    found = json.loads(capsys.readouterr().out)
    assert [(r["run"], r["against"]) for r in found["rows"]] == [
        ("spiking, T = 2", "original"), ("spiking, checkpointing on", "default"),
    ]  # fmt: skip
    assert found["setup"]["config"]["window"] == 24
    assert all(r["ratio"] == pytest.approx(r["tokens_per_second"] / r["against_tokens_per_second"]) for r in found["rows"])


# ------------------------------------------------------------------------------------------------ depth


@pytest.fixture(scope="module")
def depth():
    return runpy.run_path(str(ROOT / "benchmarks" / "finetune_depth.py"))


def result(layers: int, converted: float, tuned: float) -> dict[str, object]:
    return {
        "layers": layers, "converted": {"perplexity_change": converted}, "finetuned": {"perplexity_change_tuned": tuned},
    }  # fmt: skip


@pytest.mark.parametrize(("losses", "said"), [
    ({2: 0.01, 4: 0.02, 12: 0.05}, "12 layers: +5.0%, 2.50 times the +2.0% of 4 layers"),
    ({2: 0.02, 8: 0.01}, "8 layers: +1.0%, 0.50 times the +2.0% of 2 layers"),
    ({4: -0.01, 12: 0.01}, "12 layers: +1.0%, not to be compared with the -1.0% of 4 layers"),
])  # fmt: skip
def test_depth_is_compared_with_four_layers(depth, losses, said):
    assert depth["verdict"]([result(n, 1.0, loss) for n, loss in losses.items()]) == f"{said}; the aim is at most 2 times"


def test_curve_over_depth_takes_gains_too(depth, tmp_path, monkeypatch):
    drawn = []

    def write(points, path, **options):
        drawn.extend(points)
        return write_scatter(points, path, **options)

    monkeypatch.setitem(depth["draw"].__globals__, "write_scatter", write)
    depth["draw"]([result(12, 1.5, 0.25), result(4, 0.75, -0.5)], tmp_path / "depth")
    assert [(p.group, p.x, p.y, p.label) for p in drawn] == [
        ("converted", 4.0, 1.75, "+75.0%"), ("converted", 12.0, 2.5, "+150.0%"),
        ("fine-tuned", 4.0, 0.5, "-50.0%"), ("fine-tuned", 12.0, 1.25, "+25.0%"),
    ]  # fmt: skip
    assert {p.name for p in tmp_path.iterdir()} == {"depth.png", "depth.svg"}


@pytest.mark.slow
def test_depth_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = SAMPLE.read_text(encoding="utf-8")
    for name, part in {"train": text[:30000], "valid": text[30000:36000], "test": text[36000:44000]}.items():
        (tmp_path / f"{name}.txt").write_text(part, encoding="utf-8")
    texts = [x for name in ("train", "valid", "test") for x in (f"--{name}", tmp_path / f"{name}.txt")]
    sizes = ["--width", 16, "--heads", 2, "--context", 32, "--batch", 8, "--pretrain-tokens", 2000, "--finetune-tokens", 1000]
    options = [*texts, *sizes, "--work", tmp_path / "work", "--no-compile", "--finetune=rows=8", "--finetune=validation_windows=8"]
    run("finetune_depth.py", *options, "--layers", "1")
    first = capsys.readouterr()
    assert "1 layers: measuring" in first.err
    run("finetune_depth.py", *options, "--layers", "1,2", "--json")
    second = capsys.readouterr()
    assert "1 layers: measuring" not in second.err
    results = json.loads(second.out)["results"]
    assert [r["layers"] for r in results] == [1, 2]
    assert re.search(rf"\| 1 \| .* \| {results[0]['finetuned']['perplexity']:.2f} \|", first.out)
    tokens = [(tmp_path / "work" / f"L{n}.work" / "train-tokens.npy").read_bytes() for n in (1, 2)]
    assert tokens[0] == tokens[1]
    with pytest.raises(SystemExit, match="holds figures of a run with width = 16: give the same again"):
        run("finetune_depth.py", *options, "--layers", "1", "--width", 32)
