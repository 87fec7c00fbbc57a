"""Programs that many tests start from, made once per session. Passes work on copies, so nobody changes them."""

from __future__ import annotations

from functools import cache
from typing import Any

import ntc
from ntc.pipeline import Context, Override, Pass, run_pipeline
from ntc.program import Program
from ntc.testing import NanoGPT, example_ids, tiny_gpt2
from ntc.text import calibration_from, random_tokens
from ntc_passes.calibrate import Calibrate
from ntc_passes.canonicalize import Canonicalize
from ntc_passes.convert_ffn import ConvertFfn
from ntc_passes.fold_thresholds import FoldThresholds
from ntc_passes.insert_neurons import InsertNeurons
from ntc_passes.quantize import Quantize
from ntc_passes.replace_attention import ReplaceAttention

# Batches of 3, 3 and 2 windows: nothing may rely on batches of one size.
TOKENS = random_tokens(61, 12, 96)
CALIBRATION = calibration_from(TOKENS, rows=3)
CONTEXT = Context(CALIBRATION)


def context(**overrides: dict[str, Any]) -> Context:
    """Calibration data, and options by module: ``context(**{"transformer.h.0.*": {"steps": 8}})``."""
    return Context(CALIBRATION, tuple(Override(module, options) for module, options in overrides.items()))


@cache
def canonical(**config: Any) -> Program:
    """A tiny GPT-2, canonical."""
    return run_pipeline(ntc.capture(tiny_gpt2(**config)), [Canonicalize()])


@cache
def calibrated(**config: Any) -> Program:
    return run_pipeline(canonical(**config), [Calibrate()], CONTEXT)


@cache
def nano(**config: Any) -> Program:
    """A hand-written decoder, canonical and calibrated."""
    model = NanoGPT(**{"layers": 1, **config})
    return run_pipeline(ntc.capture(model, example_ids()), [Canonicalize(), Calibrate()], CONTEXT)


@cache
def rates(steps: int = 4, **config: Any) -> Program:
    """Attention and FFN converted, thresholds not folded, neurons not inserted: the float limit."""
    return run_pipeline(calibrated(**config), _policy(steps), CONTEXT)


@cache
def spiking(steps: int = 4, **config: Any) -> Program:
    """All passes of the neurtransformer recipe with their own defaults: attention over positions, with an output neuron."""
    return run_pipeline(rates(steps, **config), [FoldThresholds(), InsertNeurons()], CONTEXT)


def _policy(steps: int) -> list[Pass]:
    return [ReplaceAttention.configure({"steps": steps}), ConvertFfn.configure({"steps": steps})]


# -------------------------------------------------------------------------------------------------------- the integer grade

_TERNARY = {"signed_query": True, "signed_key": True, "signed_value": True}
QUANTIZED: dict[str, dict[str, Any]] = {
    "position, spikes": {},
    "leak, current": {"attention": {"normalizer": "leak", "output": "current"}},
    "leak, ternary, spikes": {"attention": {"normalizer": "leak", **_TERNARY}},
    "learned position, current, not folded": {"attention": {"normalizer": "learned-position", "output": "current"}, "fold": False},
    "not folded": {"fold": False},
    "ffn analog": {"attention": {"normalizer": "leak", "output": "current"}, "ffn": False},
    "one step": {"attention": {"steps": 1}},
}
"""Kinds of programs that ``quantized`` makes, as arguments of ``floating``."""


def floating(attention: dict[str, Any] | None = None, ffn: bool = True, fold: bool = True, given: Any = CONTEXT) -> Program:
    """A spiking program of one block in floating point, as ``Quantize`` takes it."""
    steps: list[Pass] = [ReplaceAttention.configure(attention or {})]
    steps += [ConvertFfn()] if ffn else []
    steps += [FoldThresholds()] if fold else []
    return run_pipeline(calibrated(n_layer=1), [*steps, InsertNeurons()], given)


@cache
def unquantized(name: str) -> Program:
    """What a kind of ``QUANTIZED`` is made of."""
    return floating(**QUANTIZED[name])


@cache
def quantized(name: str, weight_bits: int = 8, activation_bits: int = 8) -> Program:
    """A program of the integer grade, of a kind of ``QUANTIZED``."""
    options = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    return run_pipeline(unquantized(name), [Quantize.configure(options)], CONTEXT)
