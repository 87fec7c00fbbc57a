"""The layer behind spikes fitted again: against numpy's least squares, on both sides of the solution, and in a program."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import CONTEXT, canonical
from torch.nn import functional

import ntc
from ntc.pipeline import Calibration, Context, Override, run_pipeline
from ntc.program import Program, interpret
from ntc.testing import NanoGPT, check_pass, example_ids
from ntc.text import calibration_from, random_tokens
from ntc_passes.calibrate import Calibrate
from ntc_passes.canonicalize import Canonicalize
from ntc_passes.convert_ffn import ConvertFfn
from ntc_passes.insert_neurons import InsertNeurons
from ntc_passes.refit import LAMBDAS, _changes, refit

MANY = Context(calibration_from(random_tokens(61, 12, 1536)))  # a random network's errors have little in common: it takes many tokens
COARSE = {"refit": True, "steps": 2}


def coded(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Correlated activations in four levels, a layer, and what it gives for the activations themselves."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(tokens, 3, generator=g) @ torch.randn(3, 8, generator=g)).relu()
    weight, bias = torch.randn(5, 8, generator=g), torch.randn(5, generator=g)
    return (x * 2).floor().clamp(max=3) / 2, weight, functional.linear(x, weight, bias)


@pytest.mark.parametrize("tokens", [6, 200], ids=["over tokens", "over channels"])
@pytest.mark.parametrize("value", LAMBDAS)
def test_the_change_is_the_ridge_regression_of_numpy(tokens: int, value: float) -> None:
    f, weight, y = (t.double() for t in coded(tokens))
    f[:, 2] = 0.0  # a silent channel
    f, y = f - f.mean(0), y - y.mean(0)
    (found,) = _changes(f, weight, y, [value])
    penalty = np.diag(np.sqrt(value * f.square().sum(0).numpy()))
    stacked = np.vstack([f.numpy(), penalty])
    rest = np.vstack([(y - f @ weight.T).numpy(), np.zeros((8, 5))])
    expected = np.linalg.lstsq(stacked, rest, rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-10)
    assert not found[:, 2].any()


@given(st.integers(0, 10**6))
def test_on_other_tokens_it_is_nearer(seed: int) -> None:
    f, weight, y = coded(800, seed)
    found = refit(f[:400], weight, y[:400])
    assert found is not None
    assert found.after < found.before
    mean_error = y[400:] - y[:400].mean(0) - (f[400:] - f[:400].mean(0)) @ weight.T
    assert (functional.linear(f[400:], found.weight, found.bias) - y[400:]).square().sum() < mean_error.square().sum()


def test_what_is_exact_stays_as_it_is() -> None:
    f, weight, _ = coded(100)
    assert refit(f, weight, functional.linear(f, weight, torch.ones(5))) is None


def test_noise_is_not_fitted() -> None:
    """Results that have nothing to do with the values beyond what the weights say: any change errs more on other tokens."""
    g = torch.Generator().manual_seed(1)
    f, weight = torch.randn(12, 40, generator=g), torch.randn(2, 40, generator=g)
    assert refit(f, weight, f @ weight.T + torch.randn(12, 2, generator=g)) is None


@pytest.mark.parametrize("tokens", [0, 1])
def test_too_few_tokens(tokens: int) -> None:
    f, weight, y = coded(4)
    assert refit(f[:tokens], weight, y[:tokens]) is None


def converted(given: Context = MANY, **options: Any) -> Program:
    return run_pipeline(canonical(), [Calibrate(), ConvertFfn.configure({**COARSE, **options}), InsertNeurons()], given)


def test_the_feed_forward_of_a_program_is_nearer_to_the_original() -> None:
    ids = torch.randint(0, 61, (8, 12), generator=torch.Generator().manual_seed(99))
    kinds = {"original": canonical(), "plain": converted(refit=False), "refitted": converted()}
    results: dict[str, list[torch.Tensor]] = {}
    for name, program in kinds.items():
        found: list[torch.Tensor] = []

        def visit(node: Any, args: Any, value: Any, found: list[torch.Tensor] = found) -> None:
            if node.name == "h_0_mlp_c_proj":
                found.append(value.mean(0) if value.dim() == 4 else value)  # the mean of the currents is their decode

        with torch.no_grad():
            interpret(program, ids, visit)
        results[name] = found
    error = {n: float((r[0] - results["original"][0]).square().sum()) for n, r in results.items()}
    assert error["refitted"] < 0.95 * error["plain"]


def test_notes_say_how_much_nearer() -> None:
    notes = next(h for h in converted().history if h.name == "convert-ffn").notes["refit_squared_error"]
    assert all(0 <= layer["after"] < layer["before"] for layers in notes.values() for layer in layers)
    assert len(notes) == 2


def test_a_shared_layer_keeps_its_weights() -> None:
    model = NanoGPT(layers=2)
    model.h[1].mlp = model.h[0].mlp
    program = run_pipeline(ntc.capture(model, example_ids()), [Canonicalize(), Calibrate()], MANY)
    after = check_pass(ConvertFfn.configure(COARSE), program, context=MANY, sites=2, missed=[])
    assert after.tensor("h.0.mlp.c_proj.weight") is program.tensor("h.0.mlp.c_proj.weight")


def test_a_layer_without_bias_gets_one() -> None:
    program = run_pipeline(ntc.capture(NanoGPT(layers=1, bias=False), example_ids()), [Canonicalize(), Calibrate()], MANY)
    after = check_pass(ConvertFfn.configure(COARSE), program, context=MANY, sites=1)
    assert "h.0.mlp.c_proj.bias" in after.tensors


def test_the_refit_is_an_option_of_a_place() -> None:
    given = Context(MANY.calibration, (Override("*.h.0.mlp.*", {"refit": False}),))
    (notes,) = [h.notes["refit_squared_error"] for h in converted(given).history if h.name == "convert-ffn"]
    assert list(notes) == ["transformer.h.1"]


def test_rows_are_limited_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntc_passes.calibrate._MOST_BYTES", 5000)
    program = canonical()
    many = run_pipeline(program, [Calibrate()], CONTEXT)
    rows = next(h for h in many.history if h.name == "calibrate").notes["rows"]
    calibration = CONTEXT.calibration
    assert isinstance(calibration, Calibration)
    assert 1 <= rows < calibration.tokens
