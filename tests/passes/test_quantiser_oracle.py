"""The recipes sdllm and las are their own quantisers: perplexity of program and closed form, end to end."""

from __future__ import annotations

import pytest
from family_cases import model
from programs import CALIBRATION, TOKENS, tiny_gpt2

import ntc
from benchmarks.quantiser_oracle import compared


@pytest.mark.parametrize("network", ["llama", "gpt2"])
@pytest.mark.parametrize(("recipe", "steps"), [("sdllm", 7), ("las", 16), ("las", 5)])
def test_a_program_is_its_quantiser(recipe: str, steps: int, network: str) -> None:
    """In float64 they are the same, but for weights that were multiplied with steps in float32; and the network is not, or nothing was tested."""
    source = tiny_gpt2() if network == "gpt2" else model(network)
    made = ntc.compile(source, recipe=recipe, steps=steps, calibration=CALIBRATION)
    found = compared(made, TOKENS.windows)
    assert abs(found["program"] / found["oracle"] - 1) < 1e-4
    assert found["kl"] < 1e-7, found
    assert steps == 16 or found["kl"] < found["kl_network"] / 10, found  # sixteen steps are as fine as float32
