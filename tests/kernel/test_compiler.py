"""compile(): what the orchestrator adds to capture and passes."""

from __future__ import annotations

import pytest

import ntc
from ntc.testing import example_ids, tiny_gpt2


@pytest.mark.parametrize(("module", "steps", "warned"), [("transformer.h.0.attn", 8, False), ("*.c_attn", 4, True)])
def test_an_override_that_changes_nothing_says_so(module: str, steps: int, warned: bool) -> None:
    """``c_attn`` is a module of the model, but what becomes SSA is the attention around it."""
    settings = ntc.Settings({}, (ntc.Override(module, {"steps": 8}),))
    compiled = ntc.compile(tiny_gpt2(n_layer=1), settings=settings, calibration=ntc.Calibration.of(example_ids()))
    assert compiled.program.steps == steps
    assert [w for w in compiled.warnings if "changed nothing" in w and module in w] == list(compiled.warnings)
    assert bool(compiled.warnings) is warned


def test_an_option_of_one_pass_and_one_of_all() -> None:
    """``percentile`` is 90 for Q, K and V and 99.9 in the FFN: one number for both is remarked, and set."""

    def compiled(**options: float) -> ntc.compiler.Compilation:
        return ntc.compile(tiny_gpt2(n_layer=1), settings=ntc.Settings(options), calibration=ntc.Calibration.of(example_ids()))

    def percentiles(made: ntc.compiler.Compilation) -> dict[str, float]:
        return {r.name: r.options["percentile"] for r in made.program.history if "percentile" in r.options}

    one, both = compiled(**{"replace-attention.percentile": 95}), compiled(percentile=95)
    assert percentiles(one) == {"replace-attention": 95, "convert-ffn": 99.9}
    assert percentiles(both) == {"replace-attention": 95, "convert-ffn": 95}
    assert one.warnings == ()
    assert both.warnings == (
        "percentile=95 sets replace-attention (default 90.0) and convert-ffn (default 99.9): to set it for one of them alone, "
        "write replace-attention.percentile=95 or convert-ffn.percentile=95",
    )
    assert one.about()["settings"]["options"] == {"replace-attention.percentile": 95}


def test_an_override_that_reaches_two_passes_says_so() -> None:
    settings = ntc.Settings({}, tuple(ntc.Override(m, {"percentile": 95}) for m in ("transformer.h.0.*", "*.mlp.*")))
    made = ntc.compile(tiny_gpt2(n_layer=1), settings=settings, calibration=ntc.Calibration.of(example_ids()))
    assert [w.partition(" sets ")[0] for w in made.warnings] == ["percentile=95 in the override for transformer.h.0.*"]


@pytest.mark.parametrize(("scale", "warned"), [("token", False), ("static", True)])
def test_a_missing_text_is_told_of_where_it_matters(scale: str, warned: bool) -> None:
    """Steps that each token measures come from no text; static ones do."""
    compiled = ntc.compile(tiny_gpt2(n_layer=1), recipe="sdllm", settings=ntc.Settings({"scale": scale}))
    assert [w.split(",")[0] for w in compiled.warnings] == ["no calibration text was given"] * warned
    assert compiled.calibrated is warned
