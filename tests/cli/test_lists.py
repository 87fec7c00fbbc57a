"""``ntc passes``, ``ntc backends`` and ``ntc recipes``: what is installed, and what is broken."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ntc import registry
from tests.cli.test_commands import check_keys, result, shown


def test_passes() -> None:
    data = result("passes")
    check_keys("passes", data)
    names = [p["name"] for p in data["passes"]]
    assert {"canonicalize", "calibrate", "replace-attention", "convert-ffn", "fold-thresholds", "insert-neurons"} <= set(names)
    steps = next(o for p in data["passes"] if p["name"] == "convert-ffn" for o in p["options"] if o["name"] == "steps")
    assert steps["default"] == 4
    assert "time steps" in steps["meaning"]
    assert "convert-ffn" in shown("passes")


def test_a_broken_pass_is_listed_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = registry.Listed("broken", "nowhere:Nothing", "a-package", None, "No module named 'nowhere'")
    monkeypatch.setattr(registry, "listed", lambda kind: [broken])
    assert result("passes")["passes"][0]["error"] == "No module named 'nowhere'"
    assert "cannot be imported" in shown("passes")


def test_recipes() -> None:
    data = result("recipes")
    check_keys("recipes", data)
    assert {"neurtransformer", "ffn-only"} <= {r["name"] for r in data["recipes"]}
    assert "neurtransformer" in shown("recipes")
    one = result("recipes", "show", "neurtransformer")
    check_keys("recipes show", one)
    assert "the attention that won the comparison in docs/results.md" in " ".join(shown("recipes", "show", "neurtransformer").split())
    text = shown("recipes", "show", "ffn-only")
    assert "percentile" in text
    assert "convert-ffn" in text
    assert "--set PASS.KEY=VALUE for one" in text


def test_backends() -> None:
    data = result("backends")
    check_keys("backends", data)
    found = {b["name"]: b for b in data["backends"]}
    assert found.keys() == set(registry.names_of("backend")) >= {"onnx", "onnx-streaming", "netlist", "energy", "nir"}
    assert {b["error"] for b in found.values()} == {None}
    assert found["netlist"]["files"] == ["netlist.json", "netlist.safetensors"]
    assert found["onnx-streaming"]["passes"] == ["to-streaming"]
    assert (found["netlist"]["verified"], found["energy"]["verified"]) == (True, False)
    assert [(o["name"], o["default"]) for o in found["nir"]["options"]] == [("reset", "explicit"), ("compat", "1.0.6")]
    assert all(o["meaning"] for o in found["nir"]["options"])
    text = " ".join(shown("backends").split())
    for part in ("--nir-reset (default explicit): How a soft reset is said", "of the program after to-streaming", "energy.json"):
        assert part in text, part


class Needy:
    """A back end of a stranger's that lacks what it needs on this machine."""

    name, files, summary = "needy", ("a.bin",), "cores of a chip"

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Options.

        Attributes:
            core_size: Neurons of a core.
        """

        core_size: int = 256

    def __init__(self, options: Any = None) -> None:
        raise RuntimeError("the package chips is not installed")


def test_a_backend_that_cannot_be_used_is_listed_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        registry.Listed("broken", "nowhere:Nothing", "a-package", None, "No module named 'nowhere'"),
        registry.Listed("needy", "chips:Needy", "another", Needy),
    ]
    monkeypatch.setattr(registry, "listed", lambda kind: rows)
    monkeypatch.setattr(registry, "_load", lambda kind, name: Needy)
    broken, needy = result("backends")["backends"]
    assert (broken["error"], broken["files"], broken["options"]) == ("No module named 'nowhere'", [], [])
    assert needy["error"] == "backend needy cannot be made: RuntimeError: the package chips is not installed"
    assert needy["files"] == ["a.bin"]
    assert needy["options"] == [{"name": "core_size", "default": 256, "meaning": "Neurons of a core."}]
    text = " ".join(shown("backends").split())
    assert "cannot be used: No module named 'nowhere'" in text
    assert "--needy-core-size (default 256): Neurons of a core." in text
