"""Whatever is wrong: one clear sentence, exit code 2 (130 for Ctrl-C), nothing half-written, nothing lost."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import content, run_ntc, save_tokenizer, start_ntc


def refused(*arguments: object, says: str, code: int = 2) -> str:
    """Run a command that must fail well; returns its sentence."""
    ran = run_ntc(*arguments)
    assert ran.code == code, (ran.code, ran.out, ran.err)
    assert ran.out == ""
    return sentence(ran.err, says)


def sentence(err: str, says: str) -> str:
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err  # one sentence, no traceback, no log of a library
    assert lines[0].startswith("error: ")
    assert re.search(says, lines[0]), err
    return lines[0]


def nothing_left(folder: Path, *expected: str) -> None:
    """No temporary folder beside, and only what was there."""
    assert sorted(p.name for p in folder.iterdir()) == sorted(expected)


# ------------------------------------------------------------------------------------------------ models


def test_missing_folder(tmp_path: Path) -> None:
    refused("compile", tmp_path / "nowhere", "-o", tmp_path / "out", says=r"there is no folder .*nowhere")
    nothing_left(tmp_path)


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused("compile", tmp_path / "empty", "-o", tmp_path / "out", says="no config.json")
    nothing_left(tmp_path, "empty")


def config(folder: Path, **fields: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("command", ["compile", "check"])
def test_config_that_is_no_causal_language_model(tmp_path: Path, command: str) -> None:
    model = config(tmp_path / "vit", model_type="vit", architectures=["ViTForImageClassification"])
    extra = ["-o", tmp_path / "out"] if command == "compile" else []
    refused(command, model, *extra, says="ViTForImageClassification, not a causal language model")
    nothing_left(tmp_path, "vit")


def test_encoder_models(tmp_path: Path) -> None:
    bert = config(tmp_path / "bert", model_type="bert", architectures=["BertForMaskedLM"])
    refused("compile", bert, "-o", tmp_path / "out", says="BertForMaskedLM, not a causal language model")
    t5 = config(tmp_path / "t5", model_type="t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True)
    refused("compile", t5, "-o", tmp_path / "out", says="not a causal language model")
    nothing_left(tmp_path, "bert", "t5")


def test_config_that_is_no_json(tmp_path: Path, model: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    (broken / "config.json").write_text("{ not json")
    refused("compile", broken, "-o", tmp_path / "out", says="could not read the model")


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_corrupt_weights(tmp_path: Path, model: Path, damage: str) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes({"truncated": whole[: len(whole) // 2], "garbage": b"\xff" * 100, "empty": b""}[damage])
    refused("compile", broken, "-o", tmp_path / "out", says="could not load the weights of .*broken")
    nothing_left(tmp_path, "broken")


def test_missing_weights(tmp_path: Path, model: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    (broken / "model.safetensors").unlink()
    refused("compile", broken, "-o", tmp_path / "out", says="could not load the weights")


# ------------------------------------------------------------------------------------------------ the hub


def test_hub_name_without_network(tmp_path: Path) -> None:
    started = time.perf_counter()
    refused("compile", "gpt2", "-o", tmp_path / "out", says="there is no folder gpt2, .* cannot be reached: connect .* or give a local folder")
    assert time.perf_counter() - started < 20
    nothing_left(tmp_path)


def test_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listening port that never says a word: one question, a few seconds, no retries."""
    from huggingface_hub import constants

    from ntc.frontend import hub_answers

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.perf_counter()
        assert not hub_answers("someone/model")
        assert time.perf_counter() - started < 15


def test_hub_name_from_the_local_cache(model: Path, tmp_path: Path) -> None:
    """``ntc compile NAME`` and ``ntc compile FOLDER`` share their code: same model, same program."""
    commit = "0" * 40
    cache = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(model, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    process = start_ntc(
        "compile", "someone/tiny", "-o", tmp_path / "out", "--calibration", model / "calibration.txt", "--no-measure", "--json",
        env={"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}, cwd=tmp_path,
    )  # fmt: skip
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out)["model"]["source"] == "someone/tiny"
    run_ntc("compile", model, "-o", tmp_path / "local", "--no-measure")
    hub, local = content(tmp_path / "out"), content(tmp_path / "local")
    assert {k: v for k, v in hub.items() if k.startswith("program")} == {k: v for k, v in local.items() if k.startswith("program")}


# ------------------------------------------------------------------------------------------------ options


def test_steps_0(model: Path, tmp_path: Path) -> None:
    refused("compile", model, "-o", tmp_path / "out", "--steps", 0, says="steps must be .* at least 1, got 0")
    nothing_left(tmp_path)


def test_steps_that_are_no_number(model: Path, tmp_path: Path) -> None:
    refused("compile", model, "-o", tmp_path / "out", "--steps", "four", says=r"--steps.*integer.*ntc compile --help")


def test_percentile_out_of_range(model: Path, tmp_path: Path) -> None:
    refused("compile", model, "-o", tmp_path / "out", "--percentile", 101, says=r"percentile lies in \(0, 100\], got 101")


def test_unknown_recipe(model: Path, tmp_path: Path) -> None:
    refused("compile", model, "-o", tmp_path / "out", "--recipe", "neurtransfomer", says="did you mean neurtransformer")
    refused("check", model, "--recipe", "nothing-like-it", says="no recipe called 'nothing-like-it'; there are")
    refused("recipes", "show", "ffn", says="no recipe called 'ffn'")


def test_unknown_pass(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ntc.compiler
    from ntc import Recipe, Step

    recipe = Recipe("typo", "", "", "", "", (Step("canonicalise"),))
    monkeypatch.setattr(ntc.compiler, "find_recipe", lambda name: recipe)
    refused("compile", model, "-o", tmp_path / "out", "--recipe", "typo", says="no pass called 'canonicalise'; did you mean canonicalize")


def test_unknown_target(model: Path, compiled: Path, tmp_path: Path) -> None:
    refused("compile", model, "-o", tmp_path / "out", "--emit", "netlist,onyx", says="no backend called 'onyx'; did you mean onnx")
    nothing_left(tmp_path)
    before = content(compiled)
    refused("export", compiled, "--emit", "netlst", says="did you mean netlist")
    refused("export", compiled, "--emit", "", says="nothing to export")
    assert content(compiled) == before


def test_unknown_setting(model: Path, tmp_path: Path) -> None:
    refused("compile", model, "-o", tmp_path / "out", "--set", "percentil=90", says="no setting 'percentil'; did you mean percentile")
    refused("compile", model, "-o", tmp_path / "out", "--set", "steps", says="--set takes KEY=VALUE, got 'steps'")
    refused("compile", model, "-o", tmp_path / "out", "--set", "activation=tanh", says="activation must be 'fit' or 'relu', got 'tanh'")


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("steps = ", "is no TOML"),
        ("[recipes]\nsteps = 4\n", r"table \[recipes\]"),
        ("[[override]]\nsteps = 4\n", "no module"),
        ("[recipe]\nstep = 4\n", "no setting 'step'; did you mean steps"),
        ('[[override]]\nmodule = "transformer.h.*"\nsteps = 0\n', "steps must be .* got 0"),
        ('[[override]]\nmodule = "transformer.layer.7.*"\nsteps = 2\n', "matches no module of"),
    ],
)
def test_bad_settings_files(model: Path, tmp_path: Path, toml: str, says: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(toml)
    refused("compile", model, "-o", tmp_path / "out", "--settings", file, says=says)
    nothing_left(tmp_path, "settings.toml")


def test_missing_settings_file(model: Path, tmp_path: Path) -> None:
    refused("compile", model, "-o", tmp_path / "out", "--settings", tmp_path / "none.toml", says="cannot read the settings .*No such file")


def test_unknown_options_and_commands() -> None:
    refused("compile", "x", "-o", "y", "--stps", 4, says="--stps")
    refused("compil", says="compil")
    refused("compile", "x", says="--out")


# ------------------------------------------------------------------------------------------------ texts


def test_bad_texts(model: Path, tmp_path: Path) -> None:
    empty, blank, binary = tmp_path / "empty.txt", tmp_path / "blank.txt", tmp_path / "latin.txt"
    empty.write_text("")
    blank.write_text(" \n\n")
    binary.write_bytes("Fähre".encode("latin-1") * 100)
    out = tmp_path / "out"
    refused("compile", model, "-o", out, "--calibration", empty, says="the text .*empty.txt is empty")
    refused("compile", model, "-o", out, "--calibration", blank, says="the text .*blank.txt is empty")
    refused("compile", model, "-o", out, "--calibration", binary, says="latin.txt is no UTF-8 text")
    refused("compile", model, "-o", out, "--calibration", tmp_path / "none.txt", says="cannot read the text .*No such file")
    refused("compile", model, "-o", out, "--calibration", tmp_path, says="cannot read the text .*Is a directory")
    refused("compile", model, "-o", out, "--evaluate", empty, says="the text .*empty.txt is empty")
    nothing_left(tmp_path, "empty.txt", "blank.txt", "latin.txt")


def test_empty_calibration_text_of_the_model(model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (other / "calibration.txt").write_text("")
    refused("compile", other, "-o", tmp_path / "out", says="calibration.txt is empty")


def test_bad_texts_for_evaluation(compiled: Path, tmp_path: Path, text: Path) -> None:
    binary, damaged = tmp_path / "bin.txt", tmp_path / "bad.txt.xz"
    binary.write_bytes(bytes(range(256)))
    damaged.write_bytes(b"\xfd7zXZ\x00 and then nothing")
    refused("evaluate", compiled, "--data", binary, says="is no UTF-8 text")
    refused("evaluate", compiled, "--data", damaged, says="is no UTF-8 text")
    refused("energy", compiled, "--data", binary, says="is no UTF-8 text")
    refused("evaluate", compiled, "--data", text, "--window", 25, says="window of 25 tokens is longer than the model's context of 24")
    refused("evaluate", compiled, "--data", text, "--window", 1, says="at least 2 tokens")
    refused("evaluate", compiled, "--data", text, "--max-tokens", 0, says="at least 2 tokens")


def test_evaluate_against_another_vocabulary(compiled: Path, text: Path, tmp_path: Path) -> None:
    from ntc.testing import tiny_gpt2

    other = tmp_path / "other"
    tiny_gpt2(vocab_size=40, n_layer=1).save_pretrained(other)
    save_tokenizer(other, 40)
    refused("evaluate", compiled, "--data", text, "--against", other, says="30 tokens in its vocabulary .* 40: they are not the same")


def test_evaluate_when_the_original_is_gone(model: Path, tmp_path: Path, text: Path) -> None:
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    assert run_ntc("compile", moved, "-o", tmp_path / "out", "--no-measure").code == 0
    shutil.rmtree(moved)
    refused("evaluate", tmp_path / "out", "--data", text, says="is not there: give --against MODEL")


def test_bad_constants(compiled: Path, tmp_path: Path) -> None:
    file = tmp_path / "constants.toml"
    file.write_text("mac = 4.6")
    refused("energy", compiled, "--constants", file, says="no table of energy constants")
    refused("energy", compiled, "--constants", tmp_path / "none.toml", says="cannot read the energy constants")


# ------------------------------------------------------------------------------------------------ compiled folders


def test_folder_without_a_program(tmp_path: Path, model: Path) -> None:
    refused("energy", tmp_path / "nowhere", says="there is no folder")
    refused("explain", model, "x", says="holds no compiled program")
    refused("export", model, "--emit", "netlist", says="holds no compiled program")


@pytest.mark.parametrize("name", ["program.safetensors", "program.json", "analog.json"])
def test_damaged_file(copied: Path, name: str) -> None:
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(data)
    refused("energy", copied, says=f"{name} is damaged: its sha256")


@pytest.mark.parametrize(
    ("manifest", "says"),
    [("{", "is damaged"), ("[]", "is damaged"), ('{"ntc_format": "1"}', "not ours"), ('{"ntc_format": 99}', "newer ntc"), ('{"ntc_format": 1}', "older ntc"), ('{"ntc_format": 2}', "is damaged")],
)
def test_damaged_manifest(copied: Path, manifest: str, says: str) -> None:
    (copied / "manifest.json").write_text(manifest)
    refused("explain", copied, "h_0_add", says=says)


def test_incomplete_folder(copied: Path) -> None:
    (copied / "program.safetensors").unlink()
    refused("export", copied, "--emit", "netlist", says="lacks program.safetensors")


def test_explain_unknown_node(compiled: Path) -> None:
    refused("explain", compiled, "h_0_mlp_act_spike", says="did you mean h_0_mlp_act_spikes")
    refused("explain", compiled, "qqqqqqqqqq", says="nothing in .* is called qqqqqqqqqq")


# ------------------------------------------------------------------------------------------------ output folders


def test_output_folder_that_is_not_empty(model: Path, copied: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    before = content(tmp_path)
    refused("compile", model, "-o", foreign, says="is not empty; choose another one, or give --overwrite")
    refused("compile", model, "-o", foreign, "--overwrite", says="something else than a compiled program: it is left as it is")
    refused("compile", model, "-o", copied, says="is not empty")
    refused("compile", model, "-o", foreign / "thesis.txt", says="is a file; give a folder")
    refused("compile", model, "-o", foreign / "thesis.txt" / "out", says="is a file")
    assert content(tmp_path) == before


def test_output_that_cannot_be_written(model: Path) -> None:
    refused("compile", model, "-o", "/proc/ntc/out", says="cannot write /proc/ntc/out")


def test_failed_compile_loses_nothing(model: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A back end that fails in the middle: the program that was there is there, to the byte."""
    from ntc_backends.netlist import NetlistBackend

    def fail(self: Any, program: Any, folder: Path, **more: Any) -> None:
        (folder / "netlist.json").write_text("half")
        raise ValueError("a library gave up")

    monkeypatch.setattr(NetlistBackend, "emit", fail)
    before = content(copied)
    refused("compile", model, "-o", copied, "--overwrite", "--emit", "netlist", "--no-measure", says="back end netlist failed: .*gave up")
    refused("export", copied, "--emit", "netlist", says="back end netlist failed")
    refused("compile", model, "-o", tmp_path / "a" / "b" / "out", "--emit", "netlist", "--no-measure", says="back end netlist failed")
    assert content(copied) == before
    nothing_left(tmp_path, copied.name)  # nor the folders above the output


@contextmanager
def files_of_at_most(limit: int) -> Iterator[None]:
    """Writing more into a file fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "program.json", "program.safetensors", "netlist.json", "netlist.safetensors"])
def test_full_disk(model: Path, copied: Path, tmp_path: Path, name: str) -> None:
    """The disk is full when a file is half written: the largest that still fits are those before it."""
    before = content(copied)
    limit = (copied / name).stat().st_size // 2
    with files_of_at_most(limit):
        ran = run_ntc("compile", model, "-o", copied, "--overwrite", "--emit", "netlist", "--no-measure", "--json")
    assert ran.code == 2, ran.err
    sentence(ran.err, "cannot write .*File too large")
    assert ran.json["error"].startswith("cannot write ")
    assert content(copied) == before
    nothing_left(tmp_path, copied.name)


def test_full_disk_on_export(copied: Path, tmp_path: Path) -> None:
    before = content(copied)
    with files_of_at_most(20_000):
        refused("export", copied, "--emit", "netlist", says="cannot write .*File too large")
    assert content(copied) == before
    nothing_left(tmp_path, copied.name)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_that_is_full() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-m", "ntc", "recipes", "--json"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert "No space left" in ended.stderr
    assert "Traceback" not in ended.stderr


# ------------------------------------------------------------------------------------------------ Ctrl-C


@pytest.mark.parametrize("moment", ["torch", "capture", "replace-attention", "export"])
def test_interrupt(model: Path, copied: Path, tmp_path: Path, moment: str) -> None:
    """SIGINT while torch is imported, in capture, in passes and while the folder is written."""
    before = content(copied)
    process = start_ntc(
        "compile", model, "-o", copied, "--overwrite", "--emit", "netlist", "--no-measure",
        env={"PYTHONPATH": str(slow_at(tmp_path, moment))}, start_new_session=True,
    )  # fmt: skip
    flag = tmp_path / "slow" / "reached"
    deadline = time.monotonic() + 240
    while not flag.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert flag.exists(), process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    shutil.rmtree(tmp_path / "slow", ignore_errors=True)
    assert process.returncode == 130, (process.returncode, err)
    assert "Traceback" not in err
    assert [line for line in err.splitlines() if line.strip()] == ["interrupted"]
    assert out == ""
    assert content(copied) == before
    nothing_left(tmp_path, copied.name)


def slow_at(tmp_path: Path, stage: str) -> Path:
    """A folder for PYTHONPATH that makes the command wait at a stage, or at the import of torch, until the signal comes."""
    folder = tmp_path / "slow"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"""
import builtins, sys, time
def wait():
    open({str(folder / "reached")!r}, "w").close()
    for _ in range(6000):
        time.sleep(0.01)
class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" == {stage!r}:
            sys.meta_path.remove(self)
            wait()
        if name == "ntc.compiler":
            sys.meta_path.remove(self)
            import ntc.cli.output as output
            session = output.Output.progress
            from contextlib import contextmanager
            @contextmanager
            def progress(self):
                yield lambda label, done, total: wait() if label.startswith({stage!r}) else None
            output.Output.progress = progress
sys.meta_path.insert(0, Hook())
""")
    return folder


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the tests were started in the background and ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_while_folders_are_swapped(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the two renames waits until both are done."""
    from ntc import folders

    replace = os.replace
    calls = []

    def interrupted_replace(source: Any, target: Any) -> None:
        calls.append(source)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        replace(source, target)

    monkeypatch.setattr(folders.os, "replace", interrupted_replace)
    with pytest.raises(KeyboardInterrupt), folders.replacing_folder(copied) as beside:
        (beside / "new.txt").write_text("new")
    assert len(calls) == 2
    assert list(content(copied)) == ["new.txt"]
    nothing_left(tmp_path, copied.name)


@pytest.mark.usefixtures("interruptible")
def test_second_interrupt_does_not_disturb_the_clean_up(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntc import folders

    remove = shutil.rmtree
    before = content(copied)

    def interrupted_rmtree(*args: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        remove(*args, **options)

    monkeypatch.setattr(folders.shutil, "rmtree", interrupted_rmtree)

    def interrupted() -> None:
        with folders.replacing_folder(copied) as beside:
            (beside / "new.txt").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert content(copied) == before
    nothing_left(tmp_path, copied.name)


# ------------------------------------------------------------------------------------------------ how errors look


def test_errors_under_json(tmp_path: Path) -> None:
    for arguments in (["compile", tmp_path / "none", "-o", tmp_path / "out"], ["compile", "--nothing"], ["energy", tmp_path / "none"]):
        ran = run_ntc(*arguments, "--json")
        assert ran.code == 2
        assert list(ran.json) == ["error"]
        assert ran.err.startswith("error: ")


def test_verbose_shows_the_traceback(tmp_path: Path) -> None:
    ran = run_ntc("energy", tmp_path / "none", "-v")
    assert ran.code == 2
    assert "Traceback" in ran.err
    assert "error: there is no folder" in ran.err


def test_our_own_mistakes_are_owned(monkeypatch: pytest.MonkeyPatch) -> None:
    from ntc import registry

    def broken(kind: str) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(registry, "listed", broken)
    refused("passes", says="this is a mistake in ntc: ZeroDivisionError: division by zero; please report it", code=3)
