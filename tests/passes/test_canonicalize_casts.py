"""Casts that round are arithmetic: canonicalize keeps them, though whole numbers, which it probes with, pass them unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ntc
from ntc.ops import aten
from ntc.probe import keeps_values
from ntc.program import Program
from ntc.testing import check_pass, count_ops, example_ids
from ntc_passes.canonicalize import Canonicalize


class Decoder(nn.Module):
    """An embedding whose rows are not whole numbers, a body, and the head."""

    context = 24

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 16)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(16, 16)) for _ in range(3))
        self.body = body

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.body(self, 3 * self.wte(input_ids)) @ self.wte.weight.t()


def captured(body: Callable[[Any, Tensor], Tensor]) -> Program:
    return ntc.capture(Decoder(body), example=example_ids(11))


def casts(program: Program) -> list[torch.dtype]:
    found = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default)
    return [n.meta["val"].dtype for n in program.graph.nodes if n.target in found]


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (lambda m, x: x.long().float(), [torch.int64, torch.float32]),
        (lambda m, x: x.transpose(1, 2).int().contiguous().transpose(1, 2).float(), [torch.int32, torch.float32]),
        (lambda m, x: x + m.wte(x[..., 0].long().clamp(0, 10)), [torch.int64]),  # as an index
        (lambda m, x: x.to(torch.bfloat16).float(), [torch.bfloat16, torch.float32]),
        (lambda m, x: x.half().transpose(1, 2).transpose(1, 2).float(), [torch.float16, torch.float32]),
        (lambda m, x: x.bool().float(), [torch.bool, torch.float32]),
        (lambda m, x: x * (x > 0).float(), [torch.float32]),  # bool to float keeps the value, and not the type
        (lambda m, x: x.double().transpose(1, 2).long().transpose(1, 2).float(), [torch.float64, torch.int64, torch.float32]),
        (lambda m, x: (x.view(-1, 16).long().float() @ m.q).view(x.shape), [torch.int64, torch.float32]),
    ],
)  # fmt: skip
def test_rounding_is_kept(body: Callable[[Any, Tensor], Tensor], kept: list[torch.dtype]) -> None:
    """The pass is exact: that the rounding is still there shows in the logits, too."""
    assert casts(check_pass(Canonicalize(), captured(body))) == kept


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x.double().float() + x,  # exact there and back
        lambda m, x: x.double().transpose(1, 2).transpose(1, 2).float(),
        lambda m, x: x.float(),
    ],
)  # fmt: skip
def test_casts_that_lose_nothing_are_dropped(body: Callable[[Any, Tensor], Tensor]) -> None:
    assert casts(check_pass(Canonicalize(), captured(body))) == []


def attention(change: Callable[[Tensor], Tensor], probabilities: Callable[[Tensor], Tensor] = lambda p: p) -> Program:
    """Hand-written causal attention with ``change`` done to the queries, split into heads."""

    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = (functional.linear(x, w).unflatten(-1, (2, 8)).transpose(1, 2) for w in (m.q, m.k, m.v))
        causal = torch.ones(x.shape[1], x.shape[1]).tril() == 1
        scores = (change(q) @ k.transpose(-2, -1)).masked_fill(~causal, -1e9)
        return (probabilities(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)

    return captured(body)


def test_rounded_queries_stay_rounded() -> None:
    after = check_pass(Canonicalize(), attention(lambda q: q.long().float()))
    assert casts(after) == [torch.int64, torch.float32] or count_ops(after)["ntc.attention"] == 0
    check_pass(Canonicalize(), attention(lambda q: q.double().float()), missed=[], ops_after={"ntc.attention": 1})


def test_probabilities_rounded_to_integers_are_no_attention() -> None:
    program = attention(lambda q: q, lambda p: p.long().float())
    check_pass(Canonicalize(), program, missed=["something else than one product"], ops_after={"ntc.attention": 0})
    check_pass(Canonicalize(), attention(lambda q: q, lambda p: p.double().float()), missed=[], ops_after={"ntc.attention": 1})


@pytest.mark.parametrize(
    ("before", "after", "keeps"),
    [
        (torch.float32, torch.float64, True), (torch.float64, torch.float32, False), (torch.float32, torch.int64, False),
        (torch.float16, torch.bfloat16, False), (torch.bfloat16, torch.float16, False), (torch.bfloat16, torch.float32, True),
        (torch.int32, torch.int64, True), (torch.int64, torch.int32, False), (torch.uint8, torch.int8, False),
        (torch.int16, torch.float32, True), (torch.int32, torch.float32, False), (torch.int32, torch.float64, True),
        (torch.bool, torch.float32, True), (torch.float32, torch.bool, False), (torch.int64, torch.int64, True),
    ],
)  # fmt: skip
def test_what_a_type_can_hold(before: torch.dtype, after: torch.dtype, keeps: bool) -> None:
    graph = torch.fx.Graph()
    source = graph.placeholder("x")
    source.meta["val"] = torch.empty(2, dtype=before)
    cast = graph.call_function(aten._to_copy.default, (source,), {"dtype": after})
    cast.meta["val"] = torch.empty(2, dtype=after)
    assert keeps_values(source, [cast]) is keeps
