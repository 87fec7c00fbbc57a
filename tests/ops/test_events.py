"""Counting spikes and products: exact, and the same as by loops, whatever the sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ntc.ops.events import (
    nonzero_products,
    products_with_zero_weights,
    scores_and_values,
    spikes_per_head,
    spikes_per_neuron,
    zeros_in,
)


def train(shape: tuple[int, ...], levels: str, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    spikes = (torch.rand(shape, generator=random) < 0.3).float()
    if levels == "binary":
        return spikes
    signed = spikes * (torch.randint(0, 2, shape, generator=random) * 2 - 1)
    return signed if levels == "ternary" else signed * torch.rand(shape, generator=random)


@pytest.mark.parametrize("levels", ["binary", "ternary", "graded"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (4, 2, 300, 1000), (1, 1, 1, 1)])
def test_spikes_per_neuron_and_head(levels: str, shape: tuple[int, ...]) -> None:
    spikes = train(shape, levels)
    expected = (spikes != 0).double()
    found = spikes_per_neuron(spikes, levels)
    assert found.dtype == torch.float64 and torch.equal(found, expected.flatten(0, -2).sum(0))
    heads = 4 if shape[-1] % 4 == 0 else 1
    assert torch.equal(spikes_per_head(spikes, heads, levels).double(), expected.unflatten(-1, (heads, -1)).sum(-1))


@pytest.mark.parametrize("levels", ["binary", "ternary"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("length", "heads", "kv_heads"), [(1, 2, 2), (7, 4, 2), (128, 2, 1), (300, 3, 3)])
def test_scores_and_values_by_the_formula(levels: str, per_channel: bool, length: int, heads: int, kv_heads: int) -> None:
    q, k, v = (train((2, 3, length, n * 8), levels, seed) for seed, n in enumerate((heads, kv_heads, kv_heads)))
    fired = spikes_per_head(v, kv_heads, levels)
    found = scores_and_values(q, k, fired, heads, kv_heads, per_channel)
    ours, keys = (x.unflatten(-1, (n, 8)).transpose(-3, -2).double() for x, n in ((q, heads), (k, kv_heads)))
    keys = keys.repeat_interleave(heads // kv_heads, -3)
    if per_channel:
        ours, keys = ours.abs(), keys.abs()
    scores = (ours @ keys.mT).tril()
    spikes = fired.transpose(-2, -1).double().repeat_interleave(heads // kv_heads, -2)
    values = ((scores != 0).double() @ spikes[..., None]).sum()
    assert found == (float(values), float((scores != 0).sum()), float(scores.sum()) if per_channel else 0.0)


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1))
def test_products_with_zero_weights_are_followed_when_a_weight_changes(rows: int, columns: int, share: float) -> None:
    weight, x = torch.ones(rows, columns), train((3, columns), "binary")
    assert products_with_zero_weights(x, weight) == 0
    weight[torch.rand(rows, columns) < share] = 0  # in place: what was found before does not hold any more
    expected = float(((x != 0).double() @ (weight == 0).double().T).sum())
    assert products_with_zero_weights(x, weight) == expected
    assert nonzero_products(x, weight) == float(((x != 0).double() @ (weight != 0).double().T).sum())
    assert zeros_in(weight) == float((weight == 0).sum())
    x[:, 0] = 0  # and so of the input
    assert nonzero_products(x, weight) == float(((x != 0).double() @ (weight != 0).double().T).sum())


def test_nothing_is_remembered_of_inference_mode() -> None:
    with torch.inference_mode():
        x, weight = torch.ones(2, 3), torch.ones(4, 3)
        assert nonzero_products(x, weight) == 24
        weight[0, 0] = x[1, 2] = 0
        assert nonzero_products(x, weight) == 18 and zeros_in(weight) == 1
