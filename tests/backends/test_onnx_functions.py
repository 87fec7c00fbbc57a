"""Few-spikes neurons, products of trains and open attention in ONNX Runtime: spikes are the same bits as the kernels'."""

from __future__ import annotations

import pytest
import torch
from onnx_cases import run_op
from torch import Tensor

from ntc.ops import causal_scores, encode, fs_neuron, fs_synapse, train_product, weighted_values
from ntc_passes.spike_functions.fit import fit


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(("name", "most"), [("gelu", 6), ("silu", 1), ("exp", 5)])
@pytest.mark.parametrize("shape", [(2, 3, 40), (2, 2, 5, 5), (1, 3, 1)])
def test_few_spikes(name: str, most: int, shape: tuple[int, ...]) -> None:
    found, x = fit(name, -4.0, 5.0, 7, most), values(*shape)
    x.view(-1)[0], x.view(-1)[1] = -torch.inf, float(found.intervals[-1, 0])
    tables = [found.intervals, found.theta, found.reset]
    spikes = fs_neuron(x, *tables, 7)
    assert torch.equal(run_op(torch.ops.ntc.fs_neuron.default, [x, *tables], len(shape) + 1, steps=7), spikes)
    train = run_op(torch.ops.ntc.fs_synapse.default, [spikes, x, found.intervals, found.weight], len(shape) + 1, steps=7)
    assert torch.equal(train, fs_synapse(spikes, x, found.intervals, found.weight, 7)) and bool(train.any())


@pytest.mark.parametrize("codes", [("count", "count"), ("phase", "phase"), ("phase", "count")])
def test_train_product(codes: tuple[str, str]) -> None:
    a, b = (encode(values(2, 3, 40, seed=s), torch.tensor([0.2]), 5, code) for s, code in enumerate(codes))
    overload = ".".join(dict.fromkeys(codes))
    for other in (b, b[..., :1].contiguous()):
        got = run_op(torch.ops.ntc.train_product.default, [a, other], 4, overload, code_a=codes[0], code_b=codes[1])
        assert torch.equal(got, train_product(a, other, *codes))


@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(4, 4, 0), (4, 2, 0), (4, 1, 3)])
def test_open_attention(heads: int, kv_heads: int, window: int) -> None:
    q, k, v = (values(2, 5, h * 3, seed=s) for s, h in enumerate((heads, kv_heads, kv_heads)))
    sizes = {"heads": heads, "kv_heads": kv_heads, "window": window}
    scores = causal_scores(q, k, heads, kv_heads, 0.7, window)
    torch.testing.assert_close(run_op(torch.ops.ntc.causal_scores.default, [q, k], 3, scale=0.7, **sizes), scores)
    p = scores.softmax(-1)
    got = run_op(torch.ops.ntc.weighted_values.default, [p, v], 3, **sizes)
    torch.testing.assert_close(got, weighted_values(p, v, heads, kv_heads, window))
