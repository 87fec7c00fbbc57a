"""Fold-thresholds: exact for rates and, step by step, for spikes; refuses what it may not touch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import CONTEXT, canonical, rates
from torch import Tensor, nn
from torch.fx import Node

import ntc
from ntc.errors import PassError, VerifyError
from ntc.meta import NEURON, NeuronSpec, building
from ntc.ops import aten, integrate_fire
from ntc.pipeline import Context, PassResult, run_pipeline
from ntc.program import Program, interpret
from ntc.testing import NanoGPT, check_pass, example_ids
from ntc_passes.calibrate import Calibrate
from ntc_passes.canonicalize import Canonicalize
from ntc_passes.convert_ffn import ConvertFfn
from ntc_passes.fold_thresholds import FoldThresholds, fold_columns, fold_rows
from ntc_passes.insert_neurons import InsertNeurons


def folded(program: Program) -> tuple[Program, PassResult]:
    """The pass alone, without the runner: for programs that the runner refuses anyway."""
    work = program.copy()
    result = FoldThresholds().run(work, Context())
    if result.modified:
        work.refresh()
    return work, result


def with_tensor(program: Program, name: str, value: Tensor) -> Program:
    """A copy of the program with other values in one of its tensors."""
    work = program.copy()
    for node in work.graph.nodes:
        if node.op == "get_attr" and node.target == name:
            node.target = work.add_tensor(name, value)
    work.refresh()
    return work


class TinyFfn(nn.Module):
    """Embedding, one ReLU feed-forward block, head: all that the fold looks at."""

    def __init__(self, seed: int = 0, hidden: int = 12) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.wte, self.fc, self.proj, self.head = nn.Embedding(61, 8), nn.Linear(8, hidden), nn.Linear(hidden, 8), nn.Linear(8, 61)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        return self.head(x + self.proj(torch.relu(self.fc(x))))


@pytest.fixture(scope="module")
def tiny() -> Program:
    program = ntc.capture(TinyFfn(), example_ids())
    return run_pipeline(program, [Canonicalize(), Calibrate(), ConvertFfn.configure({"percentile": 90.0})], CONTEXT)


# ------------------------------------------------------------------------------------------------ what it does


def test_the_float_limit_stays_and_every_linear_threshold_is_one() -> None:
    before = {"ntc.if_rate": 10, "mul": 4, "linear": 13}
    program = rates()
    after = check_pass(
        FoldThresholds(), program, ops_before=before, ops_after={**before, "mul": 0}, sites=12,
        missed=["is not the result of a linear layer"] * 2,
    )  # fmt: skip
    thresholds = {name: t for name, t in after.tensors.items() if name.endswith("threshold")}
    assert len(thresholds) == 10
    for name, theta in thresholds.items():
        assert bool((theta == 1).all()) == (".ssa." not in name), name
    assert after.tensor("transformer.wte.weight") is program.tensor("transformer.wte.weight"), "embeddings are not touched"
    assert "fold-thresholds" in after.find("h_0_mlp_act_rate").meta["ntc.made_by"]
    assert after.find("h_0_mlp_c_proj").meta["ntc.made_by"][-1] == "fold-thresholds"


def test_weights_are_divided_by_row_and_multiplied_by_column(tiny: Program) -> None:
    after = check_pass(FoldThresholds(), tiny, sites=2, missed=[])
    theta, value = tiny.tensor("fc.threshold").double(), tiny.tensor("fc.value").double()
    for name, expected in (
        ("fc.weight", tiny.tensor("fc.weight").double() / theta[:, None]),
        ("fc.bias", tiny.tensor("fc.bias").double() / theta),
        ("proj.weight", tiny.tensor("proj.weight").double() * value),
        ("proj.bias", tiny.tensor("proj.bias").double()),
    ):
        assert torch.equal(after.tensor(name), expected.float()), name


def test_spikes_are_the_same_at_every_step_on_dyadic_weights() -> None:
    """Powers of two scale without rounding, so even potentials that lie on a threshold must fall to the same side."""
    generator = torch.Generator().manual_seed(0)

    def dyadic(*shape: int, most: int = 8) -> Tensor:
        return torch.randint(-most, most + 1, shape, generator=generator) / 16

    model = TinyFfn()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(dyadic(*p.shape))
    program = run_pipeline(ntc.capture(model, example_ids()), [Canonicalize(), Calibrate(), ConvertFfn.configure({"steps": 6})], CONTEXT)
    theta = 2.0 ** torch.randint(-3, 1, (12,), generator=generator)
    program = with_tensor(with_tensor(program, "fc.threshold", theta), "fc.value", theta)

    def spikes(p: Program) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        with torch.no_grad():
            logits = interpret(p, example_ids(batch=5, seed=9), lambda n, a, v: seen.append(v) if v.dim() == 4 and n.meta.get(NEURON) else None)
        return seen[0], logits

    plain = run_pipeline(program, [InsertNeurons()])
    before, logits_before = spikes(plain)
    for after_order in (run_pipeline(program, [FoldThresholds(), InsertNeurons()]), run_pipeline(plain, [FoldThresholds()])):
        after, logits_after = spikes(after_order)
        assert torch.equal(before, after)
        assert torch.equal(logits_before, logits_after)
    assert 0.1 < float(before.mean()) < 0.9
    on_threshold = interpret_currents(plain) * 6 / theta % 1 == 0.5  # v0 + T x / theta is whole
    assert bool(on_threshold.any()), "no potential lies on a threshold: the test would pass with > in place of >="


def interpret_currents(program: Program) -> Tensor:
    seen: list[Tensor] = []

    def visit(node: Node, args: tuple[Any, ...], value: Any) -> None:
        if node.target is torch.ops.ntc.integrate_fire.default:
            seen.append(args[0])

    with torch.no_grad():
        interpret(program, example_ids(batch=5, seed=9), visit)
    return seen[0]


scales = st.lists(st.floats(1e-4, 1e4), min_size=3, max_size=8)


@settings(deadline=None, max_examples=80)
@given(scales=scales, seed=st.integers(0, 1000), has_bias=st.booleans(), steps=st.integers(1, 9))
def test_folding_any_positive_thresholds_changes_nothing(scales: list[float], seed: int, has_bias: bool, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    theta = torch.tensor(scales, dtype=torch.float64)
    weight = torch.randn(len(scales), 5, generator=generator, dtype=torch.float64) * theta[:, None]
    bias = torch.randn(len(scales), generator=generator, dtype=torch.float64) * theta if has_bias else None
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    new_weight, new_bias = fold_rows(weight, bias, theta)
    assert (new_bias is None) == (bias is None)
    one, ours = torch.ones_like(theta), nn.functional.linear(x, new_weight, new_bias)
    given_current = nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(ours.clamp(0, 1), (given_current / theta).clamp(0, 1), rtol=1e-12, atol=1e-12)
    spikes = [integrate_fire(c, t, torch.tensor([0.5]), steps, True, False, "atan", 1.0) for c, t in ((ours, one), (given_current, theta))]
    near = ((0.5 + steps * ours) % 1 - 0.5).abs() > 0.5 - 1e-9  # rounding may move a potential that lies on the threshold
    assert torch.equal(spikes[0][:, ~near], spikes[1][:, ~near])
    layer = torch.randn(4, len(scales), generator=generator, dtype=torch.float64)
    r = torch.rand(7, len(scales), generator=generator, dtype=torch.float64)
    torch.testing.assert_close(r @ fold_columns(layer, theta).T, (r * theta) @ layer.T, rtol=1e-12, atol=1e-12)


def test_one_threshold_for_all_neurons_is_folded_too() -> None:
    weight, bias = fold_rows(torch.full((3, 2), 6.0), torch.full((3,), 3.0), torch.tensor([2.0]))
    assert weight.tolist() == [[3.0, 3.0]] * 3
    assert bias is not None and bias.tolist() == [1.5] * 3
    assert fold_columns(torch.full((3, 2), 6.0), torch.tensor([2.0])).tolist() == [[12.0, 12.0]] * 3


def test_twice_changes_nothing_and_so_does_a_program_without_neurons() -> None:
    once = run_pipeline(rates(n_layer=1), [FoldThresholds()])
    twice = run_pipeline(once, [FoldThresholds()])
    assert str(twice) == str(once)
    assert twice.fingerprint() == once.fingerprint()
    assert twice.history[-1].sites == 0
    untouched = check_pass(FoldThresholds(), canonical(n_layer=1), sites=0, missed=[])
    assert str(untouched) == str(canonical(n_layer=1))


def test_a_later_conversion_takes_the_fact_back() -> None:
    early = run_pipeline(
        ntc.capture(NanoGPT(layers=1), example_ids()), [Canonicalize(), FoldThresholds(), Calibrate(), ConvertFfn()], CONTEXT
    )
    assert "thresholds-folded" not in early.facts, "convert-ffn brought thresholds that are not 1"
    assert "thresholds-folded" in run_pipeline(early, [FoldThresholds()]).facts


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("bad", "text"), [(0.0, "neuron 2 has the threshold 0"), (-0.5, "neuron 2 has the threshold -0.5"), (float("nan"), "neuron 2 has .* nan")]
)
def test_thresholds_that_are_not_positive_are_refused(tiny: Program, bad: float, text: str) -> None:
    theta = tiny.tensor("fc.threshold").detach().clone()
    theta[2] = bad
    program = with_tensor(tiny, "fc.threshold", theta)
    after, result = folded(program)
    assert result.sites == 1, "the value behind is folded all the same"
    ((name, reason),) = result.missed
    assert name == "relu_rate"
    with pytest.raises(ValueError, match=f"{text}, which is not positive"):
        fold_rows(program.tensor("fc.weight"), None, theta)
    assert reason.startswith("neuron 2")
    assert torch.equal(after.tensor("fc.weight"), tiny.tensor("fc.weight"))
    with pytest.raises(VerifyError, match=r"pass fold-thresholds left .* a neuron needs thresholds > 0"):
        run_pipeline(program, [FoldThresholds()])


def test_a_feed_forward_shared_by_two_blocks_is_refused() -> None:
    model = NanoGPT(layers=2)
    model.h[1].mlp = model.h[0].mlp
    program = run_pipeline(ntc.capture(model, example_ids()), [Canonicalize(), Calibrate(), ConvertFfn()], CONTEXT)
    after = check_pass(
        FoldThresholds(), program, sites=0,
        missed=["h.0.mlp.c_fc.weight also feeds %", "h.0.mlp.c_proj.weight also feeds %"] * 2,
    )  # fmt: skip
    assert str(after) == str(program)


def test_a_weight_tied_to_the_embedding_is_refused() -> None:
    class Tied(TinyFfn):
        def __init__(self) -> None:
            super().__init__(hidden=61)
            self.fc.weight = self.wte.weight  # [61, 8]: the hidden layer scores every token

    program = run_pipeline(ntc.capture(Tied(), example_ids()), [Canonicalize(), Calibrate(), ConvertFfn()], CONTEXT)
    after = check_pass(FoldThresholds(), program, sites=1, missed=["also feeds %wte"])
    assert after.tensor("wte.weight") is program.tensor("wte.weight")


def test_a_bias_used_elsewhere_is_refused(tiny: Program) -> None:
    work = tiny.copy()
    fc, head = work.find("fc"), work.find("head")
    with building(work.graph, before=fc, stands_for=[fc], by="test") as call:
        shifted = call(aten.add.Tensor, fc.args[2], fc.args[2])
    with building(work.graph, before=head, stands_for=[head], by="test") as call:
        total = call(aten.sum.default, shifted)
        moved = call(aten.add.Tensor, head.args[0], total)
    head.update_arg(0, moved)
    work.refresh()
    check_pass(FoldThresholds(), work, sites=1, missed=["fc.bias also feeds %"])


def test_a_current_with_other_users_is_refused(tiny: Program) -> None:
    work = tiny.copy()
    fc, head = work.find("fc"), work.find("head")
    with building(work.graph, before=head, stands_for=[head], by="test") as call:
        total = call(aten.mean.dim, fc, [-1], True)
        moved = call(aten.add.Tensor, head.args[0], total)
    head.update_arg(0, moved)
    work.refresh()
    check_pass(FoldThresholds(), work, sites=1, missed=["its current %fc is used elsewhere too"])


def test_a_scale_with_other_users_is_refused(tiny: Program) -> None:
    work = tiny.copy()
    scale, head = next(n for n in work.graph.nodes if n.target is aten.mul.Tensor), work.find("head")
    with building(work.graph, before=head, stands_for=[head], by="test") as call:
        total = call(aten.mean.dim, scale, [-1], True)
        moved = call(aten.add.Tensor, head.args[0], total)
    head.update_arg(0, moved)
    work.refresh()
    check_pass(FoldThresholds(), work, sites=1, missed=["not only into linear layers"])


def test_a_computed_weight_is_refused(tiny: Program) -> None:
    work = tiny.copy()
    fc = work.find("fc")
    with building(work.graph, before=fc, stands_for=[fc], by="test") as call:
        fc.update_arg(1, call(aten.mul.Tensor, fc.args[1], 0.5))
    work.refresh()
    check_pass(FoldThresholds(), work, sites=1, missed=["is computed, not a constant"])


def test_a_rate_without_a_linear_layer_is_refused() -> None:
    work = canonical(n_layer=1).copy()
    node = work.find("ln_f")
    with building(work.graph, before=node.next, stands_for=[node], by="test") as call:
        theta = call(work.add_tensor("ln_f.threshold", torch.tensor([2.0])))
        rate = call(torch.ops.ntc.if_rate.default, node, theta, True)
    rate.meta[NEURON] = NeuronSpec(signed=True)
    node.replace_all_uses_with(rate, delete_user_cb=lambda user: user is not rate)
    work.refresh()
    check_pass(FoldThresholds(), work, sites=0, missed=["its current %ln_f is not the result of a linear layer"])


def test_needs_a_canonical_program() -> None:
    program = canonical(n_layer=1).copy()
    program.facts = frozenset({"captured"})
    with pytest.raises(PassError, match="fold-thresholds needs a program that is canonical"):
        run_pipeline(program, [FoldThresholds()])
