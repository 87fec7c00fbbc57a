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
