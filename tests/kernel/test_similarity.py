"""Comparing logits and activations: against the textbook formulas in float64, and on cases with known answers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import TOKENS, canonical, spiking
from torch.nn import functional

from ntc.blocks import layer_outputs
from ntc.meta import building
from ntc.ops import aten
from ntc.program import Program, interpret
from ntc.similarity import LayerComparison, LayerQuality, LogitSummary, compare_logits, next_token


@given(st.integers(0, 10**6), st.sampled_from([0.1, 3.0, 40.0]), st.sampled_from([0.0, 0.01, 2.0]), st.sampled_from([-300.0, 0.0, 500.0]))
def test_logits_against_the_textbook(seed: int, spread: float, apart: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = spread * torch.randn(7, 31, generator=generator) + offset
    y = z + apart * torch.randn(7, 31, generator=generator)
    ids = torch.randint(0, 31, (7,), generator=generator)
    theirs, ours = LogitSummary.of(z), LogitSummary.of(y)
    found = next_token(ours, ids) | compare_logits(ours, theirs)
    a, b = z.double(), y.double()
    kl = functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    scale = 1 + abs(offset) + spread
    assert found["kl"] == pytest.approx(float(kl), abs=3e-7 * scale, rel=1e-5)
    assert found["cross_entropy"] == pytest.approx(float(functional.cross_entropy(b[:-1], ids[1:])), abs=3e-7 * scale, rel=1e-6)
    assert found["cosine"] == pytest.approx(float(functional.cosine_similarity(a, b, dim=-1).mean()), abs=1e-6)
    assert found["top1_agreement"] == float((a.argmax(-1) == b.argmax(-1)).double().mean())
    assert found["accuracy"] == float((b[:-1].argmax(-1) == ids[1:]).double().mean())


@given(st.integers(0, 10**6), st.sampled_from([0.0, 1e-3, 50.0]))
def test_the_same_logits_are_the_same(seed: int, spread: float) -> None:
    z = LogitSummary.of(spread * torch.randn(5, 17, generator=torch.Generator().manual_seed(seed)))
    found = compare_logits(z, z)
    assert found["cosine"] == pytest.approx(1 if spread else 0, abs=1e-12)
    assert (found["kl"], found["top1_agreement"]) == (0, 1)


def compared(program: Program, network: Program) -> dict[tuple[str, str], LayerQuality]:
    layers = LayerComparison(program, network)
    with torch.no_grad():
        for rows in TOKENS.batches(3):
            interpret(network, rows, lambda node, args, value: layers.keep(node, value))
            interpret(program, rows, lambda node, args, value: layers.compare(node, value))
            layers.advance(rows.numel())
    return {(layer.block, layer.where): layer for layer in layers.result()}


def test_the_same_program_has_the_same_layers() -> None:
    found = compared(canonical(), canonical())
    assert list(found) == [(f"transformer.h.{i}", where) for i in (0, 1) for where in ("attention", "ffn", "block")]
    for layer in found.values():
        assert layer.cosine == pytest.approx(1, abs=1e-12)
        assert layer.relative_error == 0


def scaled(name: str, factor: float) -> Program:
    """The network with the result of one layer times a factor."""
    work = canonical().copy()
    node = work.find(name)
    with building(work.graph, before=node.next, stands_for=[node], by="test") as call:
        times = call(aten.mul.Tensor, node, factor)
    node.replace_all_uses_with(times, delete_user_cb=lambda user: user is not times)
    work.refresh()
    return work


def test_a_layer_that_is_too_strong_is_the_one_that_is_named() -> None:
    """Twice the attention of block 1: cosine 1, relative error 1, there and nowhere before it."""
    found = compared(scaled("h_1_attn_c_proj", 2.0), canonical())
    wrong = found["transformer.h.1", "attention"]
    assert (wrong.cosine, wrong.relative_error) == pytest.approx((1, 1), abs=1e-5)
    assert wrong.node != "h_1_attn_c_proj", "the value that is added, which is the scaled one"
    for where in ("attention", "ffn", "block"):
        before = found["transformer.h.0", where]
        assert (before.cosine, before.relative_error) == pytest.approx((1, 0), abs=1e-6)
    after = found["transformer.h.1", "block"]
    assert after.cosine < 0.99 and after.relative_error > 0.1
    assert found["transformer.h.1", "ffn"].relative_error > 0.01


def test_opposite_and_silent_layers() -> None:
    opposite = compared(scaled("h_0_mlp_c_proj", -1.0), canonical())["transformer.h.0", "ffn"]
    assert (opposite.cosine, opposite.relative_error) == pytest.approx((-1, 2), abs=1e-5)
    silent = compared(scaled("h_0_mlp_c_proj", 0.0), canonical())["transformer.h.0", "ffn"]
    assert (silent.cosine, silent.relative_error) == pytest.approx((0, 1), abs=1e-6)


def test_a_spiking_program_against_a_plain_computation() -> None:
    found = compared(spiking(), canonical())
    with torch.no_grad():
        for ours, theirs in zip(layer_outputs(spiking()), layer_outputs(canonical()), strict=True):
            y, x = (interpret(p, TOKENS.windows, lambda *_: None, last=n).double() for p, n in ((spiking(), ours.node), (canonical(), theirs.node)))
            layer = found[ours.block, ours.where]
            assert layer.node == ours.node.name
            assert layer.cosine == pytest.approx(float(functional.cosine_similarity(x, y, dim=-1).mean()), abs=1e-5)
            assert layer.relative_error == pytest.approx(float(((x - y).norm(dim=-1) / x.norm(dim=-1)).mean()), rel=1e-4)
            assert not math.isclose(layer.cosine, 1, abs_tol=1e-3)
