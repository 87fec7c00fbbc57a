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
    """Within 1 % of perplexity; and nearer to the oracle than the network is, or the oracle would be no oracle."""
    source = tiny_gpt2() if network == "gpt2" else model(network)
    made = ntc.compile(source, recipe=recipe, steps=steps, calibration=CALIBRATION)
    found = compared(made, ntc.capture(source), TOKENS.windows)
    assert abs(found["program"] / found["oracle"] - 1) < 0.01
    assert found["kl"] < found["kl_network"] / (3 if steps < 16 else 1), found
