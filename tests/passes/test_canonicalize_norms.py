"""Norms, activations and gates in any spelling: recognised by running, measured to the last constant, or left alone."""

from __future__ import annotations

import pytest
import torch
from test_canonicalize import tail
from torch.fx import Node
from torch.nn import functional

from ntc.meta import source_of
from ntc.ops import aten
from ntc.pipeline import run_pipeline
from ntc.program import Program
from ntc.testing import check_pass, count_ops
from ntc_passes.canonicalize import Canonicalize


def ms(x):
    return x.pow(2).mean(-1, keepdim=True)


RMS = {
    "llama": lambda m, x: m.w * (x * torch.rsqrt(ms(x) + 1e-6)),
    "gemma": lambda m, x: x.float() * torch.rsqrt(ms(x.float()) + 1e-6) * (1.0 + m.w.float()),
    "root and quotient": lambda m, x: m.w * x / (ms(x) + 1e-6).sqrt(),
    "a power": lambda m, x: x * torch.pow((x * x).mean(-1, keepdim=True) + 1e-6, -0.5) * m.w,
    "a power below": lambda m, x: m.w * (x / (x.square().mean(dim=2, keepdim=True) + 1e-6) ** 0.5),
    "reciprocal": lambda m, x: m.w * x * (ms(x) + 1e-6).sqrt().reciprocal(),
    "weight first": lambda m, x: (m.w * x) * torch.rsqrt(ms(x) + 1e-6),
    "sum over the width": lambda m, x: m.w * x * torch.rsqrt((x * x).sum(-1, keepdim=True) / 16 + 1e-6),
    "in float64": lambda m, x: m.w * (x.double() * torch.rsqrt(ms(x.double()) + 1e-6)).float(),
}
"""Spellings of the same norm of a width of 16; its weight is w, of Gemma's 1 + w."""


def the(program: Program, target: object) -> Node:
    (node,) = program.graph.find_nodes(op="call_function", target=target)
    return node


@pytest.mark.parametrize("spelling", RMS)
def test_rms_norm_in_any_spelling_is_one_node(spelling: str) -> None:
    program = tail(RMS[spelling], w=(16,))
    after = check_pass(Canonicalize(), program, missed=[], ops_after={"rms_norm": 1})
    assert set(count_ops(after)) == {"embedding", "rms_norm"}
    node = the(after, aten.rms_norm.default)
    assert node.args[1] == [16] and node.args[3] == 1e-6
    assert node.args[2].target == "w" and source_of(node)
    assert torch.equal(after.tensor("w"), program.tensor("w") + (spelling == "gemma")), "taken from the graph, not rounded anew"


@pytest.mark.parametrize("eps", [1e-8, 1e-5, 1.01e-5, 3.2e-3])
def test_eps_is_measured(eps: float) -> None:
    after = check_pass(Canonicalize(), tail(lambda m, x: m.w * x * torch.rsqrt(ms(x) + eps), w=(16,)), ops_after={"rms_norm": 1})
    assert the(after, aten.rms_norm.default).args[3] == eps


def test_factors_go_into_the_weight_and_eps() -> None:
    program = tail(lambda m, x: 4 * m.w * x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1.6e-4), w=(16,))
    node = the(check_pass(Canonicalize(), program, ops_after={"rms_norm": 1}), aten.rms_norm.default)
    assert node.args[3] == pytest.approx(1e-5)


def test_without_a_weight() -> None:
    after = check_pass(Canonicalize(), tail(lambda m, x: x * torch.rsqrt(ms(x) + 1e-6)), ops_after={"rms_norm": 1})
    assert the(after, aten.rms_norm.default).args[2] is None


def test_a_weight_of_ones_stays_a_weight() -> None:
    program = tail(lambda m, x: m.w * x * torch.rsqrt(ms(x) + 1e-6), w=(16,))
    torch.nn.init.ones_(program.tensor("w"))
    after = run_pipeline(program, [Canonicalize()])
    assert the(after, aten.rms_norm.default).args[2].target == "w"


def test_norms_per_head() -> None:
    def body(m, x):
        h = x.unflatten(-1, (2, 8))
        return (m.w * (h * torch.rsqrt(ms(h) + 1e-6))).transpose(1, 2).transpose(1, 2).flatten(2)

    after = check_pass(Canonicalize(), tail(body, w=(8,)), ops_after={"rms_norm": 1})
    assert the(after, aten.rms_norm.default).args[1] == [8]


def test_rms_norm_of_torch_stays_what_it_is() -> None:
    check_pass(Canonicalize(), tail(lambda m, x: functional.rms_norm(x, [16], m.w, 1e-6), w=(16,)), ops_after={"rms_norm": 1})


def test_a_bias_behind_an_rms_norm_is_added_by_itself() -> None:
    program = tail(lambda m, x: m.w * x * torch.rsqrt(ms(x) + 1e-6) + m.b, w=(16,), b=(16,))
    check_pass(Canonicalize(), program, ops_after={"rms_norm": 1, "add": 1})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("variance", ["of the centred", "var"])
def test_layer_norm_spelled_out(bias: bool, variance: str) -> None:
    def body(m, x):
        centred = x - x.mean(-1, keepdim=True)
        v = ms(centred) if variance == "of the centred" else x.var(-1, unbiased=False, keepdim=True)
        y = m.w * (centred * torch.rsqrt(v + 1e-5))
        return y + m.b if bias else y

    after = check_pass(Canonicalize(), tail(body, w=(16,), b=(16,)), ops_after={"layer_norm": 1})
    assert set(count_ops(after)) == {"embedding", "layer_norm"}
    _, width, weight, offset, eps, _ = the(after, aten.layer_norm.default).args
    assert (width, weight.target, offset and offset.target, eps) == ([16], "w", "b" if bias else None, 1e-5)


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.w * x / (ms(x).sqrt() + 1e-3),  # eps outside of the root
        lambda m, x: m.w * x * torch.rsqrt(x.pow(2).mean(1, keepdim=True).mean(-1, keepdim=True) + 1e-6),  # over tokens too
        lambda m, x: m.w * x * torch.rsqrt(ms(x[..., :8]) + 1e-6),  # of a part of the width
        lambda m, x: m.w * x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6),
        lambda m, x: m.w * x * torch.rsqrt(ms(x + 0.01) + 1e-6),
        lambda m, x: m.w * x * torch.rsqrt(ms(x)),  # eps = 0: a row of zeros has no norm
        lambda m, x: (m.w + x) * torch.rsqrt(ms(x) + 1e-6),
    ],
)
def test_what_is_nearly_a_norm_is_left_alone(body) -> None:
    program = tail(body, w=(16,))
    check_pass(Canonicalize(), program, missed=["not that of an RMSNorm or LayerNorm"], ops_after={"rms_norm": 0, "layer_norm": 0})


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_silu_spelled_out(factor: float) -> None:
    after = check_pass(Canonicalize(), tail(lambda m, x: x * torch.sigmoid(factor * x)), idempotent=False)
    assert count_ops(after)["silu"] == (factor == 1.0)


@pytest.mark.parametrize("swapped", [True, False])
def test_a_fused_gate_becomes_two_layers(swapped: bool) -> None:
    def body(m, x):
        a, b = functional.linear(x, m.gate_up, m.c).chunk(2, -1)
        gate, up = (b, a) if swapped else (a, b)
        return functional.linear(functional.silu(gate) * up, m.down)

    program = tail(body, gate_up=(24, 16), c=(24,), down=(16, 12))
    after = check_pass(Canonicalize(), program, ops_after={"linear": 3, "silu": 1, "mul": 1})
    assert set(count_ops(after)) == {"embedding", "linear", "silu", "mul"}
    first, second = program.tensor("gate_up").chunk(2)
    gate, up = (second, first) if swapped else (first, second)
    assert torch.equal(after.tensor("gate_up_gate"), gate) and torch.equal(after.tensor("gate_up_up"), up)


def test_a_gate_with_other_readers_stays_fused() -> None:
    def body(m, x):
        gate, up = functional.linear(x, m.gate_up).chunk(2, -1)
        act = functional.silu(gate)
        return functional.linear(act * up + act, m.down)

    check_pass(Canonicalize(), tail(body, gate_up=(24, 16), down=(16, 12)), ops_after={"linear": 2})
