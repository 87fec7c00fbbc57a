"""Few-spikes neurons, products of trains and open attention in ONNX Runtime: spikes are the same bits as the kernels'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from onnx_cases import run_op, session
from torch import Tensor, nn

import ntc
from ntc.ops import causal_scores, encode, expectation, fs_neuron, fs_synapse, train_product, weighted_values
from ntc_backends.onnx_export import OnnxBackend
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


TAIL = torch.linspace(-30.0, 10.0, 24 * 24).reshape(24, 24)  # where sigmoids are far below the 1e-7 to which ONNX Runtime's own is exact


@pytest.mark.parametrize("function", [torch.sigmoid, nn.functional.silu])
def test_small_sigmoids_have_all_their_digits(function: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(24, 24, _weight=TAIL.clone())

        def forward(self, ids: Tensor) -> Tensor:
            return function(self.wte(ids))

    OnnxBackend().emit(ntc.capture(Model(), example=torch.arange(24).view(2, 12)), tmp_path)
    model, ids = session(tmp_path / "model.onnx"), torch.arange(24)[None]
    got = torch.from_numpy(model.run(None, {model.get_inputs()[0].name: ids.numpy()})[0])
    torch.testing.assert_close(got, function(TAIL)[None], rtol=1e-6, atol=0)


def test_so_has_the_increment_of_a_silu() -> None:
    got = run_op(torch.ops.ntc.expectation.default, [TAIL[None, None]], 4, "silu", function="silu", eps=0.0)
    torch.testing.assert_close(got, expectation(TAIL[None, None], "silu", 0.0), rtol=1e-6, atol=0)
