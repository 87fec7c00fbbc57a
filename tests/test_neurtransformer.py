"""examples/neurtransformer.py on a tiny model of the reference model's shape of folder."""

from __future__ import annotations

import io
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

import ntc
from ntc.loading import load_tokenizer
from ntc.testing import tiny_gpt2
from ntc.text import tokens_from
from ntc.training import record
from ntc.training.prepare import network_from

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPT, REFERENCE = EXAMPLES / "neurtransformer.py", EXAMPLES / "gpt2-books"
WINDOW = 16


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model and short texts; packed tokens stay in this folder too."""
    folder = tmp_path_factory.mktemp("neurtransformer")
    tiny_gpt2(n_layer=1, vocab_size=4096, n_positions=256).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / name, folder / "model")
    text = (EXAMPLES / "data" / "books-sample.txt").read_text(encoding="utf-8")
    (folder / "train.txt").write_text(text[:8000], encoding="utf-8")
    (folder / "test.txt").write_text(text[8000:10000], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield folder


def run(place: Path, *more: object, steps: str = "1,2", out: str = "out") -> None:
    texts = ["--train", place / "train.txt", "--test", place / "test.txt", "--tokens", 4 * WINDOW * 3, "--out", place / out]
    pairs = ("rows=4", f"window={WINDOW}", "validation_windows=2", "validate_every=1", "lr=0.01", "ce=1", "kl=0.1")
    options = [f"--finetune={pair}" for pair in pairs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(x) for x in (SCRIPT, "--model", place / "model", "--steps", steps, *texts, *options, *more)])
        runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture(scope="module")
def done(place):
    """The folder of a run that was stopped when T = 2 was trained and not yet written, and was then begun again."""
    write, errors = record.write_finetuned, io.StringIO()

    def stop_at_second(found, folder, **more):
        if folder.parent.name == "T2":
            raise KeyboardInterrupt
        write(found, folder, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "write_finetuned", stop_at_second)
        with pytest.raises(SystemExit, match="goes on where it was"):
            run(place)
        assert {p.name for p in (place / "out").iterdir()} == {"settings.json", "T1", "T1.json", "T2"}
        patch.setattr(record, "write_finetuned", write)
        patch.setattr(sys, "stderr", errors)
        run(place)
    assert "T = 1, step" not in errors.getvalue()
    assert "going on from step 3" in errors.getvalue()
    return place / "out"


def test_figures_are_those_of_the_programs_in_the_folder(done, place):
    results = json.loads((done / "results.json").read_text(encoding="utf-8"))["results"]
    assert [r["steps"] for r in results] == [1, 2]
    analog = network_from(place / "model")
    tokens = tokens_from(place / "test.txt", load_tokenizer(place / "model"), WINDOW)
    for found in results:
        folder = done / f"T{found['steps']}"
        program, tuned = ntc.load(folder / "finetuned"), ntc.load(folder / "finetuned" / "baseline")
        quality = ntc.evaluate(program, analog, tokens, tuned=tuned)
        energy = ntc.measure_energy(program, analog, tokens).attention()
        tuned_row = found["3: fine-tuned"]
        assert program.steps == found["steps"]
        assert tuned_row["perplexity_change_tuned"] == pytest.approx(quality.perplexity / quality.perplexity_tuned - 1)
        assert (tuned_row["accuracy"], tuned_row["cosine"]) == pytest.approx((quality.accuracy, quality.cosine))
        assert tuned_row["energy"]["reduction"] == pytest.approx(energy["reduction"])
        converted = ntc.evaluate(ntc.load(folder / "converted"), analog, tokens)
        assert found["2: spiking FFN"]["perplexity"] == pytest.approx(converted.perplexity)
        assert found["1: SSA"]["neurons"] < found["2: spiking FFN"]["neurons"]


def test_only_the_attention_was_trained_and_the_original_once(done):
    one, two = ((ntc.load(done / f"T{t}" / "finetuned"), ntc.load(done / f"T{t}" / "finetuned" / "baseline")) for t in (1, 2))
    converted = ntc.load(done / "T2" / "converted")
    moved = [name for name, tensor in converted.tensors.items() if not torch.equal(tensor, two[0].tensors[name])]
    assert moved
    assert [name for name in moved if ".attn." not in name] == []
    assert all(torch.equal(tensor, two[1].tensors[name]) for name, tensor in one[1].tensors.items())
    assert [t for t in (1, 2) if (done / f"T{t}" / "finetuned" / "baseline" / "training.jsonl").is_file()] == [1]
    assert not list(done.glob("*/*.work"))


def test_markdown_has_every_row_and_the_papers_figures(done, place, capsys):
    run(place, "--markdown")
    lines = capsys.readouterr().out.splitlines()
    assert (done / "results.md").read_text(encoding="utf-8").splitlines() == lines
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert [row[:2] for row in cells[2:]] == [
        ["–", "original"], *([t, name] for t in "12" for name in ("1: SSA", "2: spiking FFN", "3: fine-tuned", "original, tuned")),
        ["?", "the paper's"],
    ]  # fmt: skip
    assert cells[-1][4:] == ["0.88 to 0.95", "–", "+9.7%", "–", "-64.7% to -85.3%", "1.8 to 0.75"]
    saved = 1 - float(cells[3][-1]) * 0.9 / 4.6
    assert -float(cells[3][-2].rstrip("%")) / 100 < saved, "products alone save more than with the membrane updates"


def test_what_is_done_is_not_done_again(done, place, capsys):
    path = done / "T1.json"
    kept = path.read_text(encoding="utf-8")
    found = json.loads(kept)
    found["3: fine-tuned"]["perplexity"] = 12345.0
    path.write_text(json.dumps(found), encoding="utf-8")
    run(place, "--json", steps="1")
    run(place, steps="1")
    path.write_text(kept, encoding="utf-8")
    printed = capsys.readouterr()
    assert '"perplexity": 12345.0,' in printed.out
    assert re.search(r"3: fine-tuned .* 12345\.00 ", printed.out)
    assert printed.err == ""


@pytest.mark.parametrize(("more", "message"), [
    (["--group", "all"], "holds figures of a run with group = ssa: give the same again, or another --out"),
    (["--finetune", "lrr=1"], "no option 'lrr'; did you mean lr"),
    (["--test", "missing.txt"], "cannot read the text missing.txt"),
    (["--calibration", "missing.txt"], "cannot read the text missing.txt"),
], ids=["mixed", "unknown", "test", "calibration"])  # fmt: skip
def test_refuses_before_it_works(more, message, done, place, tmp_path):
    out = "out" if "--group" in more else "refused"
    with pytest.raises(SystemExit, match=message):
        run(place, *more, out=out)
    assert not (place / "refused").exists()
