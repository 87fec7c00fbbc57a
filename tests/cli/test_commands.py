"""Every command for people and with --json, on a tiny model; keys are those of docs/json.md."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Ran, content, run_ntc, start_ntc

DOCS = Path(__file__).parents[2] / "docs" / "json.md"


def documented(command: str) -> set[str]:
    section = re.search(rf"^## ntc {command}\n(.*?)(?=^## |\Z)", DOCS.read_text(encoding="utf-8"), re.M | re.S)
    assert section, f"docs/json.md has no section for ntc {command}"
    return set(re.findall(r"^\| `([^`]+)` \|", section[1], re.M))


def paths(value: Any, at: str = "") -> Iterator[str]:
    """Paths of all leaves; an empty list, object or null is a leaf."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from paths(inner, f"{at}.{key}" if at else key)
    elif isinstance(value, list) and value:
        for inner in value:
            yield from paths(inner, f"{at}[]")
    else:
        yield at


def check_keys(command: str, data: dict[str, Any]) -> None:
    known = documented(command)
    found = set(paths(data))

    def covers(pattern: str, path: str) -> bool:
        expression = re.escape(pattern).replace(r"\*", r"[^.\[\]]+")
        below = r"(?:[.\[].*)?" if pattern.startswith("targets.") else ""
        return re.fullmatch(expression + below, path) is not None

    for path in found:
        parents = [k for k in known if k.startswith((path + "[]", path + "."))]  # an empty list or null of a documented one
        assert parents or any(covers(k, path) for k in known), f"docs/json.md does not know {path} of ntc {command}"
    for key in known:
        head = re.split(r"\[\]|\.", key)[0]
        nothing = any(key.startswith((p + "[]", p + ".")) for p in found)
        assert head in data, f"ntc {command} lacks {key}"
        if not nothing and "*" not in key and key not in ("quality", "energy", "confidence", "baseline"):
            assert any(covers(key, p) for p in found), f"ntc {command} lacks {key}"


def result(*arguments: object) -> dict[str, Any]:
    ran = run_ntc(*arguments, "--json")
    assert ran.code == 0, ran.err
    data: dict[str, Any] = ran.json  # fails if anything else is on standard output
    return data


def shown(*arguments: object) -> str:
    ran = run_ntc(*arguments)
    assert ran.code == 0, ran.err
    assert "Traceback" not in ran.err
    return ran.out


# ------------------------------------------------------------------------------------------------ the program itself


def test_version_help_and_module() -> None:
    assert shown("--version").startswith("ntc ")
    process = start_ntc("--version")
    out, _ = process.communicate(timeout=60)
    assert out.startswith("ntc ")
    assert process.returncode == 0


COMMANDS = (
    "compile", "check", "finetune", "quantize", "evaluate", "generate", "energy", "export", "sweep", "verify", "explain", "passes", "backends",
    "recipes", "inspect", "simulate", "plan",
)  # fmt: skip


def test_the_commands_are_those() -> None:
    """What ``ntc --help`` lists, those of plug-ins included; only so the next test sees them all."""
    import typer

    from ntc.cli.app import app

    group = typer.main.get_command(app)
    assert set(group.list_commands(typer.Context(group))) == set(COMMANDS)


@pytest.mark.parametrize("command", [*COMMANDS, "recipes show"])
def test_every_help_has_an_example(command: str) -> None:
    text = shown(*command.split(), "--help")
    assert re.search(rf"Examples?:\s+ntc {command}", text), text


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.argv = ['ntc', '--help']\ntry:\n from ntc.cli import main; main()\nfinally:\n assert 'torch' not in sys.modules"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
    assert time.perf_counter() - started < 5  # 0.3 s on an idle machine


def test_public_names_are_lazy_and_complete() -> None:
    code = (
        "import sys, ntc; assert 'torch' not in sys.modules\n"
        "from ntc import ConfigError; assert 'torch' not in sys.modules\n"
        "import ntc.quality, ntc.check; from ntc import capture, evaluate\n"
        "missing = [n for n in ntc.__all__ if not callable(getattr(ntc, n))]\n"
        "assert not missing, missing; assert set(ntc.__all__) <= set(dir(ntc)); assert ntc.compile is ntc.compiler.compile_model\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ------------------------------------------------------------------------------------------------ check


def test_check(model: Path) -> None:
    data = result("check", model)
    check_keys("check", data)
    assert data["ok"]
    assert data["counts"]["spiking"] == 2 * 3  # per block: attention, the FFN's activation and its second layer
    assert data["counts"]["unsupported"] == 0
    assert sum(data["dense_macs_share"].values()) == pytest.approx(1)
    attention = [n for n in data["nodes"] if n["op"] == "ntc.attention"]
    assert [n["becomes"] for n in attention] == ["spiking", "spiking"]
    assert all(n["module"] and n["source"] for n in attention)
    text = shown("check", model)
    assert "Every required site can be converted" in text
    assert "transformer.h.*.attn" in text


def test_check_recipe_that_leaves_attention(model: Path) -> None:
    data = result("check", model, "--recipe", "ffn-only")
    assert data["ok"]
    assert {n["becomes"] for n in data["nodes"] if n["op"] == "ntc.attention"} == {"analog"}


def test_check_tells_what_cannot_be_converted(tmp_path: Path) -> None:
    from ntc.testing import tiny_gpt2

    tiny_gpt2(activation_function="silu").save_pretrained(tmp_path / "silu")
    ran = run_ntc("check", tmp_path / "silu", "--json")
    assert ran.code == 1
    data = ran.json
    check_keys("check", data)
    assert not data["ok"]
    required = [f for f in data["findings"] if f["required"]]
    assert [(f["stage"], f["node"]) for f in required] == [("convert-ffn", f"h_{block}_mlp_act") for block in (0, 1)]
    assert {n["becomes"] for n in data["nodes"] if n["op"] == "ntc.attention"} == {"spiking"}  # the rest goes on
    human = run_ntc("check", tmp_path / "silu")
    assert human.code == 1
    assert "required" in human.out


def test_check_reports_attention_that_is_not_causal() -> None:
    from ntc.check import check_model
    from ntc.testing import NanoGPT, example_ids

    report = check_model(NanoGPT(mask="none"), example=example_ids())
    assert not report.ok
    findings = [f for f in report.findings if f.required]
    assert findings
    assert all(f.node and f.module is not None and f.reason for f in findings)
    assert any(n.becomes == "unsupported" and n.reason for n in report.nodes)


# ------------------------------------------------------------------------------------------------ compile


def test_compile_json(model: Path, tmp_path: Path) -> None:
    data = result("compile", model, "-o", tmp_path / "out", "--steps", 3, "--emit", "netlist,energy")
    check_keys("compile", data)
    assert data["steps"] == 3
    assert data["quality"]["on_calibration_text"]
    assert {"manifest.json", "program.json", "netlist.json", "netlist.safetensors", "energy.json"} <= {f["name"] for f in data["files"]}
    assert all((tmp_path / "out" / f["name"]).stat().st_mode & 0o044 for f in data["files"])
    report = json.loads((tmp_path / "out" / "energy.json").read_text())
    assert report["total"]["snn_pj"] == data["energy"]["total"]["snn_pj"]


def test_compile_table(model: Path, text: Path, tmp_path: Path) -> None:
    out = shown("compile", model, "-o", tmp_path / "out", "--evaluate", text)
    for part in ("Passes", "replace-attention", "Neurons", "feed-forward", "Quality", "held-out.txt", "perplexity", "Energy", "45 nm",
                 "Files in", "Done in", "Next: ntc evaluate"):  # fmt: skip
        assert part in out, part
    assert "thresholds came from" not in out  # it is held-out text


def test_compile_says_that_calibration_text_flatters(model: Path, tmp_path: Path) -> None:
    assert "the text that thresholds came from" in shown("compile", model, "-o", tmp_path / "out")


def test_compile_without_measuring(model: Path, tmp_path: Path) -> None:
    data = result("compile", model, "-o", tmp_path / "out", "--no-measure")
    check_keys("compile", data)
    assert data["quality"] is None
    assert data["energy"] is None
    assert data["neurons"] is None


def test_compile_is_deterministic(model: Path, compiled: Path, tmp_path: Path) -> None:
    result("compile", model, "-o", tmp_path / "again", "--emit", "netlist,energy")
    assert content(tmp_path / "again") == content(compiled)


def test_compile_without_any_text_warns(model: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(model, tmp_path / "bare"))
    (bare / "calibration.txt").unlink()
    ran = run_ntc("compile", bare, "-o", tmp_path / "out", "--json")
    assert ran.code == 0
    assert "random tokens" in ran.json["warnings"][0]
    assert "warning: " in ran.err


def test_overwrite_replaces_a_program_of_ours(model: Path, copied: Path) -> None:
    (copied / "left-over.txt").write_text("from the first run")
    result("compile", model, "-o", copied, "--overwrite", "--no-measure")
    assert not (copied / "left-over.txt").exists()
    assert [p.name for p in copied.parent.iterdir()] == [copied.name]


# ------------------------------------------------------------------------------------------------ evaluate, energy, export


def test_evaluate(model: Path, compiled: Path, text: Path) -> None:
    data = result("evaluate", compiled, "--data", text, "--against", model)
    check_keys("evaluate", data)
    assert 0 < data["top1_agreement"] <= 1
    assert data["perplexity"] > 1
    assert data["perplexity_ann"] > 1
    out = shown("evaluate", compiled, "--data", text)  # the original is found through the manifest
    assert "KL divergence [nats]" in out


def test_evaluate_window_and_tokens(compiled: Path, text: Path) -> None:
    data = result("evaluate", compiled, "--data", text, "--window", 8, "--max-tokens", 40)
    assert (data["window"], data["tokens"]) == (8, 40)


def test_energy(compiled: Path, text: Path) -> None:
    data = result("energy", compiled, "--data", text, "--max-tokens", 48)
    check_keys("energy", data)
    assert data["tokens"] == 48
    attention = data["attention"]
    assert attention["reduction"] == pytest.approx(1 - attention["ssa_pj"] / attention["asa_pj"])
    out = shown("energy", compiled)
    for part in ("calibration.txt", "By kind", "By block", "transformer.h.1", "ASA", "Horowitz"):
        assert part in out, part


def test_energy_with_own_constants(compiled: Path, tmp_path: Path) -> None:
    from importlib.resources import files

    standard = (files("ntc") / "data" / "energy" / "horowitz-45nm-fp32.toml").read_text("utf-8")
    own = tmp_path / "own.toml"
    own.write_text(re.sub(r"(?m)^mac = .*", "mac = 9.2", standard))
    before, after = result("energy", compiled), result("energy", compiled, "--constants", own)
    assert after["total"]["ann_pj"] == pytest.approx(2 * before["total"]["ann_pj"])


def test_export_can_be_repeated(model: Path, compiled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result("compile", model, "-o", folder, "--no-measure")
    data = result("export", folder, "--emit", "netlist,energy")
    check_keys("export", data)
    assert {f["name"] for f in data["files"]} == {"netlist.json", "netlist.safetensors", "energy.json"}
    once = content(folder)
    assert {k: v for k, v in once.items() if k.startswith("netlist")} == {k: v for k, v in content(compiled).items() if k.startswith("netlist")}
    assert "netlist.json" in shown("export", folder, "--emit", "netlist", "--emit", "energy")
    assert content(folder) == once
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("command", "stage", "says"),
    [
        (("energy",), "ntc.energy.measure_energy", "firing rates are those of random tokens"),
        (("export", "--emit", "netlist"), "ntc.compiler.export", "files are checked and measured on random tokens"),
        (("verify",), "ntc.proof.prove", "spikes are compared on random tokens"),
        (("quantize", "-o", "nowhere/q"), "ntc.compiler.quantize_folder", "scales are those of random tokens"),
    ],
)  # fmt: skip
def test_without_a_text_each_command_says_what_that_means(
    copied: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], stage: str, says: str
) -> None:
    from ntc.errors import ConfigError

    def stop(*args: Any, **options: Any) -> None:
        raise ConfigError("far enough")

    shutil.rmtree(copied / "tokenizer")
    monkeypatch.setattr(stage, stop)
    ran = run_ntc(command[0], copied, *command[1:])
    assert (ran.code, " ".join(ran.err.split())) == (2, f"warning: there is no text to run on, so {says}: give --data FILE error: far enough")


# ------------------------------------------------------------------------------------------------ explain, and what all have


def test_explain(compiled: Path) -> None:
    data = result("explain", compiled, "%h_1_mlp_act_spikes")
    check_keys("explain", data)
    (node,) = data["nodes"]
    assert node["module"] == "transformer.h.1.mlp.act"
    assert node["made_by"][0] == "capture"
    assert node["made_by"][-1] in ("insert-neurons", "fold-thresholds")
    assert re.fullmatch(r"\w+\.py:\d+ in \w+", node["source"])
    out = shown("explain", compiled, "h_1_mlp_act_spikes")
    assert "capture > canonicalize > convert-ffn" in out
    assert "[4, B, L, 128]" in out


def test_explain_tensors_netlist_elements_and_captured_nodes(compiled: Path) -> None:
    netlist = json.loads((compiled / "netlist.json").read_text())
    island = netlist["host"][0]
    tensor = result("explain", compiled, "transformer.h.0.mlp.c_fc.weight")
    assert tensor["kind"] == "tensor"
    element = result("explain", compiled, island["name"])
    assert element["kind"] == "element of netlist.json"
    assert [n["node"] for n in element["nodes"]] == [op["name"] for op in island["ops"]]
    assert shown("explain", compiled, island["name"])
    origin = result("explain", compiled, "h_1_mlp_act_spikes")["nodes"][0]["origin"][0]
    assert result("explain", compiled, origin)["nodes"]


def test_every_element_of_the_netlist_can_be_explained(compiled: Path) -> None:
    from ntc import load
    from ntc.cli.explain_command import _find, _netlist_elements

    program = load(compiled)
    for name in _netlist_elements(compiled):
        assert _find(compiled, program, name)[1], name


def test_verbose_logs_each_pass(model: Path, tmp_path: Path) -> None:
    ran: Ran = run_ntc("compile", model, "-o", tmp_path / "out", "--no-measure", "-v", "--json")
    assert "convert-ffn sites=2" in ran.err
    assert ran.json["folder"]


def test_progress_is_shown_on_a_terminal_only() -> None:
    import io

    from rich.console import Console

    from ntc.cli.output import Output

    for terminal in (True, False):
        stream = io.StringIO()
        output = Output(False, 0, Console(file=io.StringIO()), Console(file=stream, force_terminal=terminal, width=80), io.StringIO())
        with output.progress() as report:
            report("calibrate", 0, 7)
            report("calibrate", 3, 7)
            report("calibrate", 7, 7)
        assert ("calibrate" in stream.getvalue() and "7/7" in stream.getvalue()) is terminal


def test_explain_nodes_of_onnx(copied: Path) -> None:
    """The ONNX writer names its nodes as the program's, and their parts ``node.part``."""
    import onnx
    from onnx import TensorProto, helper

    names = ("h_0_mlp_act_spikes", "h_0_mlp_c_fc.transposed.1", "constant_0")
    nodes = [helper.make_node("Identity", ["x"], [f"y{i}"], name=name) for i, name in enumerate(names)]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [value], [helper.make_tensor_value_info("y0", TensorProto.FLOAT, [1])])),
              str(copied / "model.onnx"))  # fmt: skip
    part = result("explain", copied, names[1])
    assert part["kind"] == "node of model.onnx"
    assert [n["node"] for n in part["nodes"]] == ["h_0_mlp_c_fc"]
    assert "a constant that the back end made" in shown("explain", copied, names[2])
    (copied / "model.onnx").write_bytes(b"no protobuf at all")
    ran = run_ntc("explain", copied, "unheard-of")
    assert (ran.code, ran.out) == (2, "")
    assert "model.onnx is damaged" in ran.err
