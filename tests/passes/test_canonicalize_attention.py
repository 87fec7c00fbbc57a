"""Spellings of attention beyond those of GPT-2: rotated heads, heads flattened with the batch for ``bmm``, keys repeated afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ntc
from ntc.errors import PassError
from ntc.program import Program
from ntc.testing import check_pass, count_ops, example_ids, randomize
from ntc_passes.canonicalize import Canonicalize

HEADS, SIZE, LOWEST = 4, 4, torch.finfo(torch.float32).min


class Decoder(nn.Module):
    """An embedding, projections of queries, keys and values, a body that attends with them, and the head."""

    context = 24

    def __init__(self, body: Callable[[Any, Tensor], Tensor], kv_heads: int = HEADS) -> None:
        super().__init__()
        width = HEADS * SIZE
        self.wte = nn.Embedding(11, width)
        self.q, self.k, self.v = nn.Linear(width, width), *(nn.Linear(width, kv_heads * SIZE) for _ in range(2))
        self.qkv = nn.Linear(width, (HEADS + 2) * SIZE)
        self.last = nn.Buffer(torch.tensor([-1]), persistent=False)
        self.body = body

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.body(self, self.wte(input_ids)) @ self.wte.weight.t()


def captured(body: Callable[[Any, Tensor], Tensor], kv_heads: int = HEADS) -> Program:
    model = Decoder(body, kv_heads)
    randomize(model, seed=0)
    return ntc.capture(model.eval(), example=example_ids(11))


def heads(x: Tensor) -> Tensor:
    """[B, L, C] to [B, H, L, D]."""
    return x.unflatten(-1, (-1, SIZE)).transpose(1, 2)


def rotated(x: Tensor, tokens: int = -2) -> Tensor:
    """x [.., L, D], or with another axis of tokens, turned by an angle that grows with the position."""
    angle = torch.arange(x.shape[tokens]) / 7.0
    angle = angle[:, None] if tokens == -2 else angle[:, None, None]
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def softmax(scores: Tensor) -> Tensor:
    """Of scores [.., L, L], masked causally."""
    length = scores.shape[-1]
    return scores.masked_fill(torch.ones(length, length).tril() == 0, LOWEST).softmax(-1)


def merged(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(2)


def rotated_heads(m: Decoder, x: Tensor) -> Tensor:
    q, k = rotated(heads(m.q(x))), rotated(heads(m.k(x)))
    return merged(softmax(q @ k.transpose(-2, -1) / 2) @ heads(m.v(x)))


def rotated_before_they_are_permuted(m: Decoder, x: Tensor) -> Tensor:
    q, k = (rotated(y.unflatten(-1, (-1, SIZE)), tokens=-3).permute(0, 2, 1, 3) for y in (m.q(x), m.k(x)))
    return merged(softmax(q @ k.transpose(-2, -1) / 2) @ heads(m.v(x)))


def repeated(x: Tensor) -> Tensor:
    return x[:, :, None].expand(-1, -1, HEADS // x.shape[1], -1, -1).flatten(1, 2)


def keys_repeated_after_they_are_rotated(m: Decoder, x: Tensor) -> Tensor:
    k = repeated(rotated(heads(m.k(x)))).transpose(2, 3)
    return merged(softmax(rotated(heads(m.q(x))) @ k / 2) @ repeated(heads(m.v(x))))


def keys_repeated_before_they_are_rotated(m: Decoder, x: Tensor) -> Tensor:
    k = rotated(repeated(heads(m.k(x)))).transpose(2, 3)
    return merged(softmax(rotated(heads(m.q(x))) @ k / 2) @ repeated(heads(m.v(x))))


def one_key_of_a_fused_projection(m: Decoder, x: Tensor) -> Tensor:
    """Falcon: keys and values are picked with a tensor of an index, and SDPA is given a mask."""
    fused = m.qkv(x).unflatten(-1, (HEADS + 2, SIZE))
    q, k, v = (y.transpose(1, 2) for y in (fused[:, :, :-2], fused[:, :, m.last - 1], fused[:, :, m.last]))
    at = torch.arange(x.shape[1])
    return merged(functional.scaled_dot_product_attention(rotated(q), rotated(k), v, attn_mask=at[None, :] <= at[:, None]))


def flat(x: Tensor) -> Tensor:
    """[B, H, L, D] to [B H, L, D]."""
    return x.reshape(-1, *x.shape[2:])


def unflat(x: Tensor) -> Tensor:
    return x.unflatten(0, (-1, HEADS))


def batched_product(m: Decoder, x: Tensor) -> Tensor:
    """XGLM: masked as [B, H, L, L] and bounded from below."""
    q, k, v = flat(heads(m.q(x) / 2)), flat(heads(m.k(x))), flat(heads(m.v(x)))
    length = x.shape[1]
    mask = torch.where(torch.ones(length, length).tril() == 1, 0.0, LOWEST)
    scores = torch.maximum(unflat(torch.bmm(q, k.transpose(1, 2))) + mask, torch.tensor(LOWEST))
    return merged(unflat(torch.bmm(flat(scores).softmax(-1), v)))


def batched_product_of_rotated_heads(m: Decoder, x: Tensor) -> Tensor:
    """GPT-NeoX Japanese: added to zeros, and the product with the values is not flattened."""
    q, k = flat(rotated(heads(m.q(x)))), flat(rotated(heads(m.k(x))))
    scores = torch.baddbmm(torch.zeros(q.shape[0], q.shape[1], q.shape[1]), q, k.transpose(1, 2), alpha=0.5)
    return merged(softmax(unflat(scores)) @ heads(m.v(x)))


def probabilities_flattened(m: Decoder, x: Tensor) -> Tensor:
    probabilities = softmax(heads(m.q(x)) @ heads(m.k(x)).transpose(2, 3) / 2)
    return merged(unflat(torch.bmm(flat(probabilities), flat(heads(m.v(x))))))


SPELLINGS = {
    body.__name__: (body, kv_heads, groups) for body, kv_heads, groups in [
        (rotated_heads, HEADS, HEADS), (rotated_before_they_are_permuted, HEADS, HEADS), (keys_repeated_after_they_are_rotated, 2, 2),
        (keys_repeated_before_they_are_rotated, 2, HEADS), (one_key_of_a_fused_projection, 1, 1), (batched_product, HEADS, HEADS),
        (batched_product_of_rotated_heads, HEADS, HEADS), (probabilities_flattened, HEADS, HEADS),
    ]
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_is_one_attention(name: str) -> None:
    body, kv_heads, groups = SPELLINGS[name]
    after = check_pass(
        Canonicalize(), captured(body, kv_heads), missed=[], ops_after={"ntc.attention": 1},
        not_after=["softmax", "matmul", "bmm", "baddbmm", "scaled_dot_product_attention", "masked_fill", "where", "maximum"],
    )  # fmt: skip
    (node,) = [n for n in after.graph.nodes if n.target is torch.ops.ntc.attention.default]
    assert node.args[3:5] == (HEADS, groups)
    assert node.args[5] == pytest.approx(0.5)


def test_one_head_without_an_axis_for_it() -> None:
    program = captured(lambda m, x: softmax(m.q(x) @ m.k(x).transpose(1, 2) / 4) @ m.v(x))
    after = check_pass(Canonicalize(), program, missed=[], ops_after={"ntc.attention": 1, "linear": 4}, not_after=["reshape", "transpose"])
    (node,) = [n for n in after.graph.nodes if n.target is torch.ops.ntc.attention.default]
    assert node.args[3:] == (1, 1, 0.25)


def with_scores(change: Callable[[Tensor], Tensor]) -> Callable[[Decoder, Tensor], Tensor]:
    return lambda m, x: merged(softmax(change(heads(m.q(x)) @ heads(m.k(x)).transpose(2, 3))) @ heads(m.v(x)))


def heads_before_the_batch(m: Decoder, x: Tensor) -> Tensor:
    """[H B, L, D]: one attention of B heads would compute it, and they would be texts."""
    q, k, v = (heads(y).transpose(0, 1).reshape(-1, x.shape[1], SIZE) for y in (m.q(x), m.k(x), m.v(x)))
    return softmax(torch.bmm(q, k.transpose(1, 2))).bmm(v).unflatten(0, (HEADS, -1)).permute(1, 2, 0, 3).flatten(2)


def added_to_a_bias(m: Decoder, x: Tensor) -> Tensor:
    q, k = flat(heads(m.q(x))), flat(heads(m.k(x)))
    bias = torch.arange(x.shape[1]).float().expand(q.shape[0], x.shape[1], -1)  # ALiBi
    return merged(unflat(softmax(torch.baddbmm(bias, q, k.transpose(1, 2))).bmm(flat(heads(m.v(x))))))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (with_scores(lambda s: torch.maximum(s, torch.tensor(-50.0))), "not only scaled and causally masked"),
        (with_scores(lambda s: torch.maximum(s, torch.tensor(0.0))), "not only scaled and causally masked"),
        (with_scores(lambda s: s / s.shape[-1]), "not only scaled and causally masked"),  # the factor is another at every length
        (with_scores(lambda s: s.flatten(1, 2).unflatten(1, (-1, HEADS)).transpose(1, 2)), "its"),  # rows of other heads
        (heads_before_the_batch, "queries are not heads"),
        (added_to_a_bias, "something is added to its scores that is no mask"),
    ],
)  # fmt: skip
def test_other_attention_is_left_alone(body: Callable[[Decoder, Tensor], Tensor], reason: str) -> None:
    check_pass(Canonicalize(), captured(body), missed=[reason], ops_after={"ntc.attention": 0, "softmax": 1})


def test_what_baddbmm_adds_counts_for_nothing_with_a_beta_of_zero() -> None:
    def body(m: Decoder, x: Tensor) -> Tensor:
        q, k = flat(heads(m.q(x))), flat(heads(m.k(x)))
        bias = torch.ones(q.shape[0], x.shape[1], x.shape[1])
        return merged(unflat(softmax(torch.baddbmm(bias, q, k.transpose(1, 2), beta=0)).bmm(flat(heads(m.v(x))))))

    check_pass(Canonicalize(), captured(body), missed=[], ops_after={"ntc.attention": 1})


def test_the_refusal_of_sdpa_says_what_is_in_the_way() -> None:
    def windowed(m: Decoder, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        mask = (at[None, :] <= at[:, None]) & (at[None, :] > at[:, None] - 3)
        return merged(functional.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)), attn_mask=mask))

    with pytest.raises(PassError, match=r"scaled_dot_product_attention at node %\w+ .*only scaled and causally masked"):
        ntc.pipeline.run_pipeline(captured(windowed), [Canonicalize()])


# --- writes in place ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "op"),
    [
        (lambda m, x: m.q(x).add_(m.k(x)), "add"), (lambda m, x: m.q(x).mul_(3.0), "mul"), (lambda m, x: torch.relu_(m.q(x)), "relu"),
        (lambda m, x: functional.dropout(m.q(x), 0.1, training=False).sub_(m.k(x)), "sub"),
        (lambda m, x: m.q(x).transpose(0, 1).div_(2).transpose(0, 1), "div"),
    ],
)  # fmt: skip
def test_a_write_in_place_is_a_result(body: Callable[[Decoder, Tensor], Tensor], op: str) -> None:
    check_pass(Canonicalize(), captured(body), not_after=[f"{op}_"], ops_after={op: 1})


def test_a_write_that_another_node_sees_stays() -> None:
    def through_a_view(m: Decoder, x: Tensor) -> Tensor:
        y = m.q(x)
        y[..., :2].mul_(3.0)
        return y + m.k(x)

    program = captured(through_a_view)
    assert count_ops(check_pass(Canonicalize(), program))["mul_"] == 1
