"""Everything in examples/ runs, and so does every Python block of docs/writing-*.md.

The scripts run on a tiny model of the reference model's shape of folder; with the reference model itself they are slow tests.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from argparse import Namespace
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

import ntc
from ntc import artifact
from ntc.compiler import write
from ntc.testing import tiny_gpt2

ROOT = Path(__file__).parents[1]
EXAMPLES, DOCS = ROOT / "examples", ROOT / "docs"
REFERENCE = EXAMPLES / "gpt2-books"
GUIDES = sorted(DOCS.glob("writing-*.md"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}


def blocks_of(guide: Path) -> str:
    """The Python blocks of a guide, each at its own line number; all other lines are empty."""
    lines, language = [], ""
    for line in guide.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            language = "" if language else line.removeprefix("```") or "text"
            lines.append("")
        else:
            lines.append(line if language == "python" else "")
    assert not language, f"{guide.name} ends inside a block"
    return "\n".join(lines)


def python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    env = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)


# ------------------------------------------------------------------------------------------------ guides


def test_there_are_three_guides():
    assert [g.stem for g in GUIDES] == ["writing-backends", "writing-ops", "writing-passes"]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda g: g.stem)
def test_guide_runs(guide):
    # In a process of its own: the guide on ops registers one.
    code = f"import sys; sys.argv = ['guide']; exec(compile({blocks_of(guide)!r}, {guide.name!r}, 'exec'), {{'__name__': 'guide'}})"
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_pass_is_the_same_in_script_package_and_guide():
    script = (EXAMPLES / "custom_pass.py").read_text(encoding="utf-8")
    the_pass = script[script.index("@dataclass(frozen=True)\nclass Options") : script.index("# --- its tests")].strip()
    assert "class ShareThresholds(Pass)" in the_pass
    assert the_pass in (EXAMPLES / "ntc-share-thresholds" / "ntc_share_thresholds.py").read_text(encoding="utf-8")
    assert the_pass in blocks_of(DOCS / "writing-passes.md")


def test_back_end_is_the_same_in_script_and_guide():
    script = (EXAMPLES / "custom_backend.py").read_text(encoding="utf-8")
    the_class = script[script.index("class CoresBackend") : script.index("def main")].strip()
    assert the_class in blocks_of(DOCS / "writing-backends.md")


@pytest.mark.parametrize("page", [*GUIDES, EXAMPLES / "README.md", EXAMPLES / "ntc-share-thresholds" / "README.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert targets
    assert [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()] == []


def test_readme_lists_every_example():
    ours = subprocess.run(["git", "ls-files", "examples"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    names = {Path(p).parts[1] for p in ours} or {p.name for p in EXAMPLES.iterdir() if p.name != "__pycache__"}
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [n for n in names - {"README.md"} if f"({n})" not in text] == []


# ------------------------------------------------------------------------------------------------ scripts


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The scripts beside a tiny model that is called like the reference model: they look for it next to themselves."""
    folder = tmp_path_factory.mktemp("examples")
    for script in EXAMPLES.glob("*.py"):
        shutil.copy(script, folder)
    (folder / "data").mkdir()
    shutil.copy(EXAMPLES / "data" / "books-sample.txt", folder / "data")
    tiny_gpt2(n_layer=1, vocab_size=4096, n_positions=256).save_pretrained(folder / "gpt2-books")
    for name in ("tokenizer.json", "tokenizer_config.json", "calibration.txt"):
        shutil.copy(REFERENCE / name, folder / "gpt2-books")
    return folder


def test_quickstart(scripts, capsys):
    runpy.run_path(str(scripts / "quickstart.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(r"perplexity +[\d.]+ -> [\d.]+", printed)
    assert printed.count("energy") == 2
    assert "spikes" in printed


def test_progressive(scripts, tmp_path, capsys, monkeypatch):
    compiled = ntc.compile(scripts / "gpt2-books", recipe="ssa-only")
    write(compiled, tmp_path / "ssa")
    half = {n.name for n in ntc.load(tmp_path / "ssa").graph.nodes if "spikes" in n.name}
    monkeypatch.setattr(sys, "argv", ["progressive.py", str(tmp_path / "ssa"), str(tmp_path / "full"), "--data",
                                      str(scripts / "data" / "books-sample.txt"), "--tokens", "1024"])  # fmt: skip
    runpy.run_path(str(scripts / "progressive.py"), run_name="__main__")
    full = ntc.load(tmp_path / "full")
    assert {n.name for n in full.graph.nodes if "spikes" in n.name} - half == {"h_0_mlp_act_spikes"}
    kept = "transformer.h.0.attn.q.threshold"
    assert torch.equal(full.tensor(kept), ntc.load(tmp_path / "ssa").tensor(kept))
    assert artifact.load_analog(tmp_path / "full") is not None
    assert "->" in capsys.readouterr().out


def test_custom_backend(scripts, capsys):
    runpy.run_path(str(scripts / "custom_backend.py"), run_name="__main__")
    fits, does_not = capsys.readouterr().out.splitlines()
    assert fits == "output = current: {'populations': 4, 'cores': 4}"
    assert does_not.startswith("output = spikes: does not fit: a core has one threshold")


def test_custom_pass(scripts, capsys):
    runpy.run_path(str(scripts / "custom_pass.py"), run_name="__main__")
    heading, plain, mean, largest = capsys.readouterr().out.splitlines()
    assert "2,048 tokens" in heading
    rates = [float(row.split()[-1]) for row in (plain, mean, largest)]
    assert rates[2] < rates[0], "the largest threshold of all gives fewer spikes"


def test_custom_pass_has_tests_that_pass_and_can_fail(tmp_path):
    source = (EXAMPLES / "custom_pass.py").read_text(encoding="utf-8")
    module = runpy.run_path(str(EXAMPLES / "custom_pass.py"))
    tests = [f for name, f in module.items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        test()
    assert "* shared / theta" in source
    wrong = tmp_path / "wrong.py"
    wrong.write_text(source.replace("* shared / theta", "* 1.01 * shared / theta"), encoding="utf-8")
    with pytest.raises(AssertionError, match="moved the logits"):
        runpy.run_path(str(wrong))["test_is_exact_where_nothing_clips"]()


# ------------------------------------------------------------------------------------------------ a package


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The example package, built and installed offline into a folder of its own."""
    if not any(d.name == "hatchling" for d in distributions()):
        pytest.skip("hatchling is not installed, and without a network pip cannot fetch it")
    source = tmp_path_factory.mktemp("source") / "package"  # a build may write beside its sources
    shutil.copytree(EXAMPLES / "ntc-share-thresholds", source, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", str(target), str(source)], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr
    return target


def test_package_is_listed_and_used_by_name(installed):
    code = """
import json
import ntc
from ntc.registry import listed, recipe
from ntc.testing import example_ids, tiny_gpt2

rows = {row.name: row for kind in ("pass", "recipe") for row in listed(kind)}
compiled = ntc.compile(
    tiny_gpt2(n_layer=1), recipe="neurtransformer-shared", steps=2, calibration=ntc.Calibration((example_ids(),), "random", ""),
    settings=ntc.Settings({"shared_threshold": "max"}),
)
thresholds = {name: t.unique().numel() for name, t in compiled.program.tensors.items() if name.endswith(".threshold")}
record = next(r for r in compiled.program.history if r.name == "share-thresholds")
print(json.dumps({
    "distributions": [rows[name].distribution for name in ("share-thresholds", "neurtransformer-shared")],
    "errors": [row.error for row in rows.values() if row.error], "options": dict(record.options), "thresholds": thresholds,
}))
"""
    done = python(code, installed)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["distributions"] == ["ntc-share-thresholds"] * 2
    assert result["options"] == {"shared_threshold": "max"}
    assert set(result["thresholds"].values()) == {1}
    assert len(result["thresholds"]) == 5


@pytest.mark.skipif(any(d.name == "ntc-share-thresholds" for d in distributions()), reason="the example package is installed")
def test_package_is_unknown_where_it_is_not_installed():
    done = python("from ntc.registry import find_pass; find_pass('share-thresholds')")
    assert "there is no pass called 'share-thresholds'" in done.stderr


def test_tests_of_the_package(installed):
    code = f"import sys, pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', {str(EXAMPLES / 'ntc-share-thresholds')!r}]))"
    done = python(code, installed)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def trainer():
    return runpy.run_path(str(EXAMPLES / "train_gpt2.py"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    sample = (EXAMPLES / "data" / "books-sample.txt").read_text(encoding="utf-8")
    (folder / "train.txt").write_text(sample[:12000] + "<|endoftext|>" + sample[12000:24000], encoding="utf-8")
    (folder / "valid.txt").write_text(sample[24000:27000], encoding="utf-8")
    (folder / "test.txt").write_text(sample[27000:30000], encoding="utf-8")
    return folder


TINY = {
    "layers": 1, "width": 16, "heads": 2, "vocab": 300, "context": 16, "steps": 8, "batch": 2, "warmup": 2, "valid_windows": 2,
    "every": 2, "calibration_chars": 500,
}  # fmt: skip


def command(texts: Path, out: Path, **other: object) -> list[str]:
    options = {"text": texts / "train.txt", "valid": texts / "valid.txt", "test": texts / "test.txt", "out": out, **TINY, **other}
    return ["train_gpt2.py", "--no-compile", *(str(x) for k, v in options.items() for x in (f"--{k.replace('_', '-')}", v))]


def train(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(EXAMPLES / "train_gpt2.py"), run_name="__main__")


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "model"
    with pytest.MonkeyPatch.context() as patch:
        train(command(texts, out, about="a stretch of Walden"), patch)
    return out


def losses(out: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (out.with_name("model.work") / "training.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def test_training_writes_a_model_folder(trained, texts):
    assert {p.name for p in REFERENCE.iterdir()} <= {p.name for p in trained.iterdir()}
    assert {str(t.dtype) for t in load_file(trained / "model.safetensors").values()} == {"torch.float16"}
    PreTrainedTokenizerFast.from_pretrained(trained)
    card = (trained / "README.md").read_text(encoding="utf-8")
    assert "`train.txt` (a stretch of Walden);" in card
    assert "license:" not in card.split("---")[1]
    calibration = (trained / "calibration.txt").read_text(encoding="utf-8")
    lines = (texts / "train.txt").read_text(encoding="utf-8").splitlines()
    assert calibration.strip()
    assert all(any(part in line for line in lines) for part in calibration.splitlines())
    assert [row["step"] for row in losses(trained)] == [2, 4, 6, 8]
    assert not trained.with_name("model.tmp").exists()
    assert not trained.with_name("model.old").exists()


def test_curve_is_an_image(trained, trainer):
    import xml.etree.ElementTree as ET

    tree = ET.fromstring((trained.with_name("model.work") / "curve.svg").read_text())
    points = tree.find("{http://www.w3.org/2000/svg}polyline").get("points").split()
    assert len(points) == 4
    assert all(0 <= float(v) <= 640 for point in points for v in point.split(","))
    ET.fromstring(trainer["curve_svg"]([{"tokens": 32, "valid_perplexity": 300.0}]))  # one point has no range


def test_killed_while_it_writes_a_checkpoint_it_goes_on_with_the_same_losses(trained, texts, tmp_path, monkeypatch, capsys):
    out = tmp_path / "model"
    killer = f"""
import os, signal, sys
sys.path.insert(0, {str(EXAMPLES)!r})
import torch
torch.set_num_threads(1)
import train_gpt2
save, count = torch.save, 0
def half_a_checkpoint(state, file):
    global count
    count += 1
    if count == 3:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file)
torch.save = half_a_checkpoint
sys.argv = {command(texts, out)!r}
train_gpt2.main()
"""
    assert python(killer).returncode == -9
    assert not out.exists()
    assert len(losses(out)) == 2
    train(command(texts, out), monkeypatch)
    assert "resuming at step 4" in capsys.readouterr().out
    assert losses(out) == losses(trained)
    assert (out / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("other", "message"), [
    ({"text": "missing.txt"}, "no such file: missing.txt"),
    ({"batch": 10_000}, "too few for one step of 10000 x 16"),
    ({"context": 8192}, "too few for one"),
])  # fmt: skip
def test_training_refuses_before_it_starts(other, message, texts, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=message):
        train(command(texts, tmp_path / "model", **other), monkeypatch)
    assert not (tmp_path / "model").exists()


def test_a_folder_that_is_no_model_is_not_replaced(texts, tmp_path, monkeypatch):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match="is no model folder and will not be replaced"):
        train(command(texts, tmp_path), monkeypatch)
    assert (tmp_path / "thesis.tex").exists()


def test_a_checkpoint_of_another_run_is_refused(trained, texts, monkeypatch):
    with pytest.raises(SystemExit, match=r"was made with --steps 8; use the same"):
        train(command(texts, trained, steps=10), monkeypatch)


def test_help_shows_defaults(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        train(["train_gpt2.py", "--help"], monkeypatch)
    printed = " ".join(capsys.readouterr().out.split())
    assert "optimizer steps [default: 7400]" in printed


def test_batches_of_an_epoch_are_windows_that_do_not_overlap(trainer):
    import numpy as np

    data = np.arange(1000, dtype=np.uint16)
    per_epoch = trainer["steps_per_epoch"](len(data), 4, 16)
    for epoch in range(3):
        rows = np.concatenate([trainer["batch_at"](data, epoch * per_epoch + i, 4, 16, 0).numpy() for i in range(per_epoch)])
        assert rows.shape == (per_epoch * 4, 16)
        assert len(np.unique(rows)) == rows.size


def test_shipped_card_is_what_the_script_writes(trainer, monkeypatch):
    shipped = (REFERENCE / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| [\d.]+ M \| ([\d.]+) \| ([\d.]+) \|$", shipped, flags=re.MULTILINE)
    log = [{"step": int(s), "tokens": int(s) * 16 * 256, "loss": float(a), "valid_perplexity": float(b)} for s, a, b in rows]
    figures = {k: float(v) for k, v in re.findall(r"^\| (books-\w+) \| ([\d.]+) \|$", shipped, flags=re.MULTILINE)}
    monkeypatch.setattr(sys, "argv", [
        "train_gpt2.py", "--text", "books-train.txt.xz", "--valid", "books-valid.txt", "--test", "books-test.txt", "--out", "x",
        "--about", "36 MB of public-domain English books: Standard Ebooks productions, CC0", "--license", "cc0-1.0",
    ])  # fmt: skip
    args: Namespace = trainer["parse"]()
    parameters = round(float(re.search(r"([\d.]+) M parameters", shipped)[1]) * 1e6)
    assert trainer["model_card"](args, log, figures, parameters) == shipped


# ------------------------------------------------------------------------------------------------ the reference model itself


@pytest.mark.slow
@pytest.mark.parametrize("script", ["quickstart", "custom_backend"])
def test_script_on_the_reference_model(script, capsys):
    runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) in (2, 4)


@pytest.mark.slow
def test_effect_of_the_example_pass_is_what_the_guide_says(capsys):
    runpy.run_path(str(EXAMPLES / "custom_pass.py"), run_name="__main__")
    measured = [[float(x) for x in row.split()[-3:]] for row in capsys.readouterr().out.splitlines()[1:]]
    guide = (DOCS / "writing-passes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]*(?:neurtransformer|share-thresholds)[^|]* \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", guide, flags=re.MULTILINE)
    assert len(rows) == 3
    for ours, theirs in zip(measured, rows, strict=True):
        assert ours == pytest.approx([float(x) for x in theirs], rel=0.02)
