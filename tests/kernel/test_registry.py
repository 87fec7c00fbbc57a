"""The registry: a stranger's package beside ours, duplicates and failures loud."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ntc import registry
from ntc.errors import ConfigError
from ntc.recipe import Settings

CODE = '''
from ntc.pipeline import Pass, PassResult
from ntc.recipe import Recipe, Step

class Polish(Pass):
    """Polish the weights."""
    name = "polish"
    def run(self, program, context):
        return PassResult(False)

class Renamed(Polish):
    name = "shine"

class Shiny:
    name, files, summary = "shiny", ("shiny.txt",), "Write it down."
    def emit(self, program, folder, *, analog, tokens):
        return {}

class NeedsArguments(Shiny):
    def __init__(self, chip):
        self.chip = chip

RECIPE = Recipe("polished", "Polish.", "nobody", "nothing", "all", (Step("polish"),))
ready = Shiny()
NUMBER = 3
'''

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a package of a stranger: a module and a ``.dist-info`` folder on the path."""

    def put(distribution: str, module: str, code: str = CODE, **groups: dict[str, str]) -> None:
        site = tmp_path / distribution
        info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [f"[ntc.{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups.items()]
        (info / "entry_points.txt").write_text("\n".join(lines))
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, module, raising=False)

    return put


def test_ours_are_found_by_name() -> None:
    assert {row.name for row in registry.listed("pass")} >= {
        "canonicalize", "calibrate", "replace-attention", "convert-ffn", "fold-thresholds", "insert-neurons",
    }  # fmt: skip
    for row in registry.listed("pass"):
        assert row.distribution == "ntc-compiler"
        assert registry.find_pass(row.name) is row.loaded
    assert registry.recipe("neurtransformer").name == "neurtransformer"
    assert registry.backend("netlist").name == "netlist"


def test_a_strangers_plug_ins_stand_beside_ours(install: Install) -> None:
    install(
        "ntc-polish", "polish_a", passes={"polish": "polish_a:Polish"}, recipes={"polished": "polish_a:RECIPE"},
        backends={"shiny": "polish_a:Shiny", "ready": "polish_a:ready"},
    )  # fmt: skip
    assert registry.find_pass("polish").summary() == "Polish the weights."
    assert registry.recipe("polished").steps[0].name == "polish"
    assert registry.backend("shiny").files == ("shiny.txt",)
    assert registry.backend("ready").emit is not None
    row = next(r for r in registry.listed("pass") if r.name == "polish")
    assert (row.distribution, row.value, row.error) == ("ntc-polish", "polish_a:Polish", "")
    (built,) = registry.recipe("polished").build(Settings(), registry.find_pass)
    assert built.name == "polish"


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="there is no pass called 'canonicalise'; did you mean canonicalize"):
        registry.find_pass("canonicalise")
    recipes = registry.names_of("recipe")
    assert {"ecmt", "ffn-only", "las", "lossless", "lossless-sparse", "lossless-spiking", "neurtransformer", "phase", "sdllm", "ssa-only"} <= set(recipes)
    with pytest.raises(ConfigError, match=f"there is no recipe called 'qqq'; there are {', '.join(sorted(recipes))}$"):
        registry.recipe("qqq")
    with pytest.raises(ConfigError, match="there is no backend called 'onx'; did you mean onnx"):
        registry.backend("onx")


def test_a_name_that_two_packages_claim_is_an_error_that_names_both(install: Install) -> None:
    install("ntc-first", "polish_b", passes={"polish": "polish_b:Polish"})
    install("ntc-second", "polish_c", passes={"polish": "polish_c:Polish"})
    message = "two packages bring a pass called polish: ntc-(first|second) and ntc-(first|second); remove one"
    for look in (lambda: registry.find_pass("polish"), lambda: registry.find_pass("canonicalize"), lambda: registry.listed("pass")):
        with pytest.raises(ConfigError, match=message):
            look()


def test_a_name_of_ours_cannot_be_taken(install: Install) -> None:
    install("ntc-thief", "polish_d", passes={"canonicalize": "polish_d:Polish"})
    with pytest.raises(ConfigError, match=r"two packages bring a pass called canonicalize: .*ntc-thief"):
        registry.find_pass("canonicalize")


def test_a_broken_plug_in_is_listed_with_its_error_and_harms_nobody(install: Install) -> None:
    install("ntc-broken", "polish_e", "import a_library_that_is_not_there\n", passes={"broken": "polish_e:Polish"})
    row = next(r for r in registry.listed("pass") if r.name == "broken")
    assert row.loaded is None
    assert "a_library_that_is_not_there" in row.error
    assert registry.find_pass("calibrate").name == "calibrate"
    with pytest.raises(ConfigError, match="pass broken of ntc-broken cannot be imported: No module named 'a_library_that_is_not_there'"):
        registry.find_pass("broken")


def test_what_is_no_plug_in_is_refused(install: Install) -> None:
    install(
        "ntc-odd", "polish_f", recipes={"odd": "polish_f:Polish"}, backends={"odd": "polish_f:NUMBER", "needy": "polish_f:NeedsArguments"},
        passes={"number": "polish_f:NUMBER", "other": "polish_f:Shiny", "absent": "polish_f:Absent", "polish-it": "polish_f:Renamed"},
    )  # fmt: skip
    for name in ("number", "other"):
        with pytest.raises(ConfigError, match=f"entry point {name} of group ntc.passes is no subclass of ntc.Pass"):
            registry.find_pass(name)
    with pytest.raises(ConfigError, match="pass absent of ntc-odd cannot be imported"):
        registry.find_pass("absent")
    with pytest.raises(ConfigError, match=r"entry point polish-it of group ntc.passes points to a pass that calls itself shine"):
        registry.find_pass("polish-it")
    with pytest.raises(ConfigError, match=r"entry point odd of group ntc.recipes is no ntc.Recipe"):
        registry.recipe("odd")
    with pytest.raises(ConfigError, match=r"is no back end: it needs name, files, summary and emit\(\)"):
        registry.backend("odd")
    with pytest.raises(ConfigError, match=r"backend needy cannot be made: TypeError: .*chip"):
        registry.backend("needy")
