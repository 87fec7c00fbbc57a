"""Options of a run: the schedule in closed form, and one sentence for every mistake."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntc.errors import ConfigError
from ntc.training.config import DEFAULT_TOKENS, TrainingConfig, learning_rate, with_options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"group": "attention"}, "no group of parameters is called 'attention'; there are ssa, thresholds, ffn, all"),
        ({"max_tokens": 5, "max_minutes": 1.0}, "give one of them"),
        ({"max_tokens": 0}, "max_tokens is a whole number, at least 1, got 0"),
        ({"max_minutes": -1.0}, "max_minutes is a positive number, got -1.0"),
        ({"window": 1}, "window is a whole number, at least 2, got 1"),
        ({"rows": 2.5}, "rows is a whole number, at least 1, got 2.5"),
        ({"rows": True}, "rows is a whole number"),
        ({"rows": 16, "accumulate": 3}, "16 windows per step do not divide into 3 equal pieces"),
        ({"lr": 0}, "lr is a positive number, got 0"),
        ({"lr": math.nan}, "lr is a positive number, got nan"),
        ({"lr": "fast"}, "lr is a positive number, got 'fast'"),
        ({"weight_decay": -0.1}, "weight_decay is a number, not negative, got -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas of AdamW lie in \[0, 1\), got 0.9 and 1"),
        ({"betas": 0.9}, "betas are two numbers"),
        ({"final_lr": 1.5}, r"final_lr is a share of the peak, in \[0, 1\], got 1.5"),
        ({"surrogate": "tanh"}, "no surrogate gradient is called 'tanh'; there are triangular, sigmoid, atan"),
        ({"target_rate": 1.5}, r"target_rate is in spikes per neuron and step, in \(0, 1\], got 1.5"),
        ({"rate": 1.0}, "give target_rate"),
        ({"ce": 0.0, "kl": 0.0}, "there is nothing to learn"),
        ({"compile": "yes"}, "compile is true or false, got 'yes'"),
        ({"seed": -1}, "seed is a whole number, at least 0, got -1"),
    ],
)
def test_mistakes(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TrainingConfig(**options)


def test_options_by_name() -> None:
    config = with_options(TrainingConfig(), {"lr": 1e-4, "group": None, "betas": [0.8, 0.9]})
    assert (config.lr, config.group, config.betas) == (1e-4, "all", (0.8, 0.9))
    with pytest.raises(ConfigError, match="no option 'qqq'; there are group"):
        with_options(TrainingConfig(), {"qqq": 1.0})
    with pytest.raises(ConfigError, match="no option 'neuronlr'; did you mean neuron_lr"):
        with_options(TrainingConfig(), {"neuronlr": 1.0})


def test_every_option_is_in_the_record() -> None:
    data = json.loads(json.dumps(TrainingConfig(betas=(0.5, 0.6)).to_json()))
    assert TrainingConfig(**data) == TrainingConfig(betas=(0.5, 0.6))


def test_window_and_budget_come_from_the_model() -> None:
    assert TrainingConfig().fitting(1024).window == 256
    assert TrainingConfig().fitting(24).window == 24
    assert TrainingConfig().fitting(0).window == 256
    assert TrainingConfig().fitting(24).max_tokens == DEFAULT_TOKENS
    assert TrainingConfig(max_minutes=3).fitting(24).max_tokens is None
    with pytest.raises(ConfigError, match="a window of 25 tokens is longer than the model's context of 24"):
        TrainingConfig(window=25).fitting(24)


def test_steps_come_from_tokens() -> None:
    both = TrainingConfig(rows=8, window=256, max_tokens=1_500_000, blockwise_tokens=2_500_000)
    assert (both.steps(), both.for_blockwise().steps(), both.planned_steps()) == (732, 1221, 1953)
    assert TrainingConfig(window=256, max_minutes=2.0).planned_steps() is None
    config = TrainingConfig(rows=16, window=256, max_tokens=1_000_000)
    assert config.steps() == 244
    assert TrainingConfig(rows=16, window=256, max_tokens=1).steps() == 1
    assert TrainingConfig(window=256, max_minutes=1).steps() is None


def test_the_baseline_learns_from_text_alone() -> None:
    config = TrainingConfig(hidden=1.0, target_rate=0.1, neuron_lr=1.0, surrogate="atan", patience=3, lr=0.5, rows=4, seed=7)
    baseline = config.for_baseline()
    assert (baseline.ce, baseline.kl, baseline.hidden, baseline.rate_weight) == (1.0, 0.0, 0.0, 0.0)
    assert (baseline.lr, baseline.rows, baseline.seed, baseline.group) == (0.5, 4, 7, "all")
    assert config.for_baseline(0.25).lr == 0.25
    assert not baseline.needs_teacher


def test_layers_are_fitted_to_the_end_whatever_a_validation_says() -> None:
    assert TrainingConfig().result == "best"
    assert TrainingConfig().for_blockwise().result == "last"
    assert TrainingConfig(result="last").for_baseline().result == "last"
    with pytest.raises(ConfigError, match="the result of a run is the best or the last program, got 'first'"):
        TrainingConfig(result="first")


def test_rate_weighs_5_once_there_is_a_target() -> None:
    assert TrainingConfig().rate_weight == 0
    assert TrainingConfig(target_rate=0.1).rate_weight == 5
    assert TrainingConfig(target_rate=0.1, rate=0.0).rate_weight == 0


@given(st.integers(1, 3000), st.one_of(st.none(), st.integers(0, 50)), st.floats(0, 1))
def test_learning_rate_rises_linearly_and_falls_along_a_cosine(steps: int, warmup: int | None, floor: float) -> None:
    config = TrainingConfig(warmup=warmup, final_lr=floor)
    shares = [learning_rate(config, step, steps) for step in range(steps)]
    begin = warmup if warmup is not None else min(max(30, round(0.03 * steps)), steps // 5)
    for step in range(steps):
        if step < begin:
            expected = (step + 1) / begin
        else:
            expected = floor + (1 - floor) * (1 + math.cos(math.pi * (step - begin) / (steps - begin))) / 2
        assert shares[step] == pytest.approx(expected)
    if begin < steps:
        assert learning_rate(config, steps, steps) == pytest.approx(floor)


def test_learning_rate_before_the_steps_are_known_is_that_of_the_warm_up() -> None:
    config = TrainingConfig(max_minutes=1)
    assert [learning_rate(config, s, None) for s in (0, 14, 29, 40)] == pytest.approx([1 / 30, 0.5, 1.0, 1.0])
