"""Convert-ffn: the fit against brute force, the float limit against the clipped network, refusals with their reasons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import CALIBRATION, CONTEXT, calibrated, canonical, context
from torch import Tensor, nn
from torch.nn import functional

import ntc
from ntc.errors import ConfigError, PassError
from ntc.meta import NEURON, STATS, NeuronSpec
from ntc.pipeline import Context, run_pipeline
from ntc.program import Program
from ntc.testing import NanoGPT, check_pass, count_ops, example_ids, tiny_gpt2
from ntc_passes.calibrate import Calibrate
from ntc_passes.canonicalize import Canonicalize
from ntc_passes.convert_ffn import ConvertFfn, fit_relu


def converted(program: Program, given: Context = CONTEXT, **options: Any) -> Program:
    return run_pipeline(program, [ConvertFfn.configure(options)], given)


def ready(model: nn.Module) -> Program:
    return run_pipeline(ntc.capture(model, example_ids()), [Canonicalize(), Calibrate()], CONTEXT)


def logits_with(model: nn.Module, activation: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """The Hugging Face model with another activation in its first block."""
    act = model.transformer.h[0].mlp.act
    handle = act.register_forward_hook(lambda module, args, output: activation(args[0]))
    try:
        with torch.no_grad():
            return model(ids).logits
    finally:
        handle.remove()


# ------------------------------------------------------------------------------------------------ the fit


def brute_force(x: np.ndarray, y: np.ndarray, percentile: float, shifts: list[float]) -> list[tuple[float, float, float, float, float]]:
    """Per channel the best (error, a, b, c, theta): a least-squares problem for every shift, solved by numpy."""
    tops = {b: np.percentile(np.maximum(x - b, 0), percentile, axis=0) for b in shifts}
    best = []
    for c in range(x.shape[1]):
        found = []
        for b in shifts:
            theta = max(tops[b][c], tops[b].max() * 1e-3 or 1e-3)
            u = np.clip(x[:, c] - b, 0, theta)
            columns = np.stack([u, np.ones_like(u)], axis=1)
            a, offset = np.linalg.lstsq(columns, y[:, c], rcond=None)[0]
            if a < 0:  # a rate cannot count backwards; the best constant is the mean
                a, offset = 0.0, y[:, c].mean()
            found.append((float(np.mean((a * u + offset - y[:, c]) ** 2)), a, b, offset, theta))
        best.append(min(found))
    return best


SHIFTS = [-1.0, -0.5, 0.0, 0.25, 0.75]


@pytest.mark.parametrize("percentile", [70.0, 99.0, 100.0])
def test_fit_equals_brute_force(percentile: float) -> None:
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * torch.linspace(0.3, 3, 12)
    x[:, 3] -= 4  # hardly ever active
    y = functional.gelu(x)
    y[:, 5] = -y[:, 5]  # a falling target: a = 0 is the best that a rate can do
    fit = fit_relu(x, y, percentile, torch.tensor(SHIFTS, dtype=torch.float64))
    expected = np.array(brute_force(x.numpy(), y.numpy(), percentile, SHIFTS))
    error = ((fit.gain * torch.minimum((x - fit.shift).clamp(min=0), fit.threshold) + fit.offset - y) ** 2).mean(0)
    np.testing.assert_allclose(error, expected[:, 0], rtol=1e-6, atol=1e-12)
    keep = [c for c in range(12) if c != 5]  # with a = 0 every shift is as good
    np.testing.assert_allclose(fit.gain[keep], expected[keep, 1], rtol=1e-5)
    np.testing.assert_array_equal(fit.shift[keep], expected[keep, 2])
    np.testing.assert_allclose(fit.offset[keep], expected[keep, 3], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(fit.threshold[keep], expected[keep, 4], rtol=1e-9)
    assert float(fit.gain[5]) == 0.0
    assert fit.residual == pytest.approx(float(error.sum() / (y * y).mean(0).sum()))


@settings(deadline=None, max_examples=60)
@given(
    columns=st.integers(2, 30).flatmap(
        lambda n: st.lists(st.lists(st.floats(-6, 6, width=32), min_size=n, max_size=n), min_size=1, max_size=4)
    ),
    percentile=st.floats(50, 100),
)
def test_fit_is_never_worse_than_plain_relu(columns: list[list[float]], percentile: float) -> None:
    x = torch.tensor(columns, dtype=torch.float64).T.contiguous()
    y = functional.gelu(x)
    fit = fit_relu(x, y, percentile, torch.tensor(SHIFTS, dtype=torch.float64))
    error = ((fit.gain * torch.minimum((x - fit.shift).clamp(min=0), fit.threshold) + fit.offset - y) ** 2).mean(0)
    theta = np.percentile(np.maximum(x.numpy(), 0), percentile, axis=0)
    plain = np.mean((np.clip(x.numpy(), 0, np.maximum(theta, theta.max() * 1e-3 or 1e-3)) - y.numpy()) ** 2, axis=0)
    assert (error.numpy() <= plain + 1e-11).all()


def test_constant_channels_keep_their_mean() -> None:
    x = torch.full((10, 2), 0.7)
    fit = fit_relu(x, torch.full((10, 2), 0.3), 99.0, torch.tensor([0.0]))
    value = fit.gain * torch.minimum(x[0] - fit.shift, fit.threshold) + fit.offset
    torch.testing.assert_close(value, torch.full((2,), 0.3))


# ------------------------------------------------------------------------------------------------ the rewrite


def test_ops_before_and_after() -> None:
    before = {"gelu": 2, "linear": 13, "ntc.if_rate": 0}
    after = check_pass(
        ConvertFfn(), calibrated(), context=CONTEXT, ops_before=before, sites=2, missed=[], not_after=["gelu"],
        ops_after={"ntc.if_rate": 2, "mul": 2, "linear": 13, "ntc.attention": 2},
    )  # fmt: skip
    assert {n.meta[NEURON] for n in after.graph.nodes if NEURON in n.meta} == {NeuronSpec(steps=4, role="ffn")}
    errors = after.history[-1].notes["relative_squared_error"]
    assert set(errors) == {"transformer.h.0", "transformer.h.1"}
    assert all(0 < e < 0.1 for e in errors.values())


def test_a_relu_network_gets_the_identity_and_its_float_limit_is_the_clipped_network() -> None:
    model = tiny_gpt2(n_layer=1, activation_function="relu")
    program = calibrated(n_layer=1, activation_function="relu")
    after = check_pass(
        ConvertFfn.configure({"percentile": 80.0}), program, context=CONTEXT, ops_before={"relu": 1}, not_after=["relu"], sites=1
    )
    prefix = "transformer.h.0.mlp"
    rows = program.find("h_0_mlp_c_fc").meta[STATS]["rows"].numpy()
    theta = np.percentile(np.maximum(rows, 0), 80.0, axis=0)
    theta = torch.tensor(np.maximum(theta, theta.max() * 1e-3), dtype=torch.float32)
    torch.testing.assert_close(after.tensor(f"{prefix}.c_fc.threshold").detach(), theta, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after.tensor(f"{prefix}.c_fc.value").detach(), theta, rtol=1e-5, atol=1e-6)
    assert after.tensor(f"{prefix}.c_fc.bias").data_ptr() == program.tensor(f"{prefix}.c_fc.bias").data_ptr(), "nothing to shift"
    assert after.tensor(f"{prefix}.c_proj.bias").data_ptr() == program.tensor(f"{prefix}.c_proj.bias").data_ptr(), "no offset"
    ids = example_ids(batch=3, length=11, seed=7)
    clipped = logits_with(model, lambda x: x.clamp(min=0).minimum(theta), ids)
    torch.testing.assert_close(after(ids).detach(), clipped, rtol=0, atol=1e-4)
    assert float((clipped - model(ids).logits).abs().max()) > 0.05, "clipping must matter for this test to mean anything"


def test_at_percentile_100_nothing_of_a_relu_network_is_clipped_on_the_calibration_text() -> None:
    after = converted(calibrated(n_layer=1, activation_function="relu"), percentile=100)
    ids = CALIBRATION.batches[0]
    model = tiny_gpt2(n_layer=1, activation_function="relu")
    # A silent channel is clipped at a thousandth of the largest threshold, and it is silent on this text.
    torch.testing.assert_close(after(ids).detach(), model(ids).logits.detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("activation_function", ["gelu_new", "gelu"])
def test_the_float_limit_of_a_gelu_network_is_the_network_with_the_fit_in_it(activation_function: str) -> None:
    program = calibrated(n_layer=1, activation_function=activation_function)
    after = converted(program, percentile=99.0)
    rows = program.find("h_0_mlp_c_fc").meta[STATS]["rows"]
    target = functional.gelu(rows, approximate="tanh" if activation_function == "gelu_new" else "none")
    fit = fit_relu(rows, target, 99.0, torch.linspace(-1.0, 0.75, 15))
    ids = example_ids(batch=3, length=11, seed=7)
    model = tiny_gpt2(n_layer=1, activation_function=activation_function)
    expected = logits_with(model, lambda x: fit.gain * (x - fit.shift).clamp(min=0).minimum(fit.threshold) + fit.offset, ids)
    torch.testing.assert_close(after(ids).detach(), expected, rtol=0, atol=2e-4)
    assert after.history[-1].notes["relative_squared_error"]["transformer.h.0"] == pytest.approx(fit.residual)


def test_plain_relu_is_the_literal_replacement_and_worse() -> None:
    after = converted(calibrated(n_layer=1), activation="relu", percentile=100)
    fitted = converted(calibrated(n_layer=1), percentile=100)
    rows = calibrated(n_layer=1).find("h_0_mlp_c_fc").meta[STATS]["rows"]
    theta = after.tensor("transformer.h.0.mlp.c_fc.threshold").detach()
    ids = example_ids(seed=5)
    expected = logits_with(tiny_gpt2(n_layer=1), lambda x: x.clamp(min=0).minimum(theta), ids)
    torch.testing.assert_close(after(ids).detach(), expected, rtol=0, atol=1e-4)
    target = functional.gelu(rows, approximate="tanh")
    plain = float((rows.clamp(min=0).minimum(theta) - target).pow(2).mean() / target.pow(2).mean())
    (note,) = after.history[-1].notes["relative_squared_error"].values()
    (better,) = fitted.history[-1].notes["relative_squared_error"].values()
    assert note == pytest.approx(plain, rel=1e-4)
    assert better < note / 2


def test_layers_without_biases_get_them() -> None:
    program = ready(NanoGPT(layers=1, bias=False))
    after = check_pass(ConvertFfn(), program, context=CONTEXT, sites=1)
    assert {"h.0.mlp.c_fc.bias", "h.0.mlp.c_proj.bias"} <= after.tensors.keys() - program.tensors.keys()


def test_a_feed_forward_shared_by_two_blocks_keeps_its_weights() -> None:
    model = NanoGPT(layers=2)
    model.h[1].mlp = model.h[0].mlp
    program = ready(model)
    after = check_pass(ConvertFfn(), program, context=CONTEXT, sites=2, missed=[])
    thresholds = [t for name, t in after.tensors.items() if "threshold" in name]
    assert len(thresholds) == 2
    assert not torch.equal(*thresholds), "each place has the activations of its own"
    assert after.tensor("h.0.mlp.c_fc.weight") is program.tensor("h.0.mlp.c_fc.weight")


def test_overrides_reach_one_block() -> None:
    given = context(**{"*.h.1.mlp.*": {"steps": 16, "percentile": 60.0}})
    after = converted(calibrated(), given, percentile=99.0, activation="relu")
    specs = {n.name: n.meta[NEURON].steps for n in after.graph.nodes if NEURON in n.meta}
    assert specs == {"h_0_mlp_act_rate": 4, "h_1_mlp_act_rate": 16}
    for block, percentile in ((0, 99.0), (1, 60.0)):
        rows = calibrated().find(f"h_{block}_mlp_c_fc").meta[STATS]["rows"].clamp(min=0).numpy()
        theta = np.percentile(rows, percentile, axis=0)
        found = after.tensor(f"transformer.h.{block}.mlp.c_fc.threshold").numpy(force=True)
        np.testing.assert_allclose(found, np.maximum(theta, theta.max() * 1e-3), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match=r"override for \*\.h\.0\.\*: activation must be 'fit' or 'relu'"):
        converted(calibrated(), context(**{"*.h.0.*": {"activation": "elu"}}))


# ------------------------------------------------------------------------------------------------ refusals


class Odd(nn.Module):
    """Embedding, something odd around an activation, head; beside it a plain FFN, so that the pass has a site."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.wte, self.head = nn.Embedding(61, 8), nn.Linear(8, 61)
        self.up, self.gate, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.fc, self.proj = nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.rand(16, 1) + 0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        x = x + self.proj(functional.gelu(self.fc(x)))
        x = functional.layer_norm(x, (8,))
        h = self.up(x)
        if self.kind == "gated":
            y = self.down(functional.gelu(h) * self.gate(x))
        elif self.kind == "twice":
            y = self.down(functional.gelu(h)) + self.down(h)
        elif self.kind == "no_linear_before":
            y = self.down(functional.gelu(torch.tanh(h)))
        elif self.kind == "no_linear_after":
            y = functional.gelu(h)[..., :8] + x
        elif self.kind == "weight_norm":
            y = self.down(functional.gelu(functional.linear(x, self.up.weight * self.scale, self.up.bias)))
        else:  # weight_norm_after
            y = functional.linear(functional.gelu(h), self.down.weight * self.scale[:8], self.down.bias)
        return self.head(x + y)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gated", "it gates another projection (SwiGLU, GeGLU)"),
        ("twice", "its pre-activation %up is used elsewhere too"),
        ("no_linear_before", "its input is not the result of a linear layer"),
        ("no_linear_after", "its result goes elsewhere than into a linear layer"),
        ("weight_norm", "is computed and not a constant"),
        ("weight_norm_after", "is computed and not a constant"),
    ],
)
def test_other_activations_are_left_alone_with_the_reason(kind: str, reason: str) -> None:
    torch.manual_seed(0)
    after = check_pass(ConvertFfn(), ready(Odd(kind).eval()), context=CONTEXT, sites=1, missed=[reason], ops_after={"gelu": 1})
    assert count_ops(after)["ntc.if_rate"] == 1


def test_no_site_is_an_error_that_shows_the_nearest_miss() -> None:
    class Gated(Odd):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.wte(ids)
            return self.head(self.down(functional.gelu(self.up(x)) * self.gate(x)))

    with pytest.raises(PassError, match=r"convert-ffn found none of its sites in Gated: nearest miss %\w+: it gates another projection"):
        converted(ready(Gated("")))
    with pytest.raises(PassError, match="nothing looked like one"):
        converted(converted(calibrated(n_layer=1)))


def test_needs_statistics() -> None:
    with pytest.raises(PassError, match="needs a program that is calibrated"):
        converted(canonical(n_layer=1))
    program = canonical(n_layer=1).copy()
    program.facts |= {"calibrated"}
    with pytest.raises(PassError, match=r"no calibration statistics at node %h_0_mlp_c_fc .*run calibrate right before convert-ffn"):
        converted(program)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"percentile": 0}, r"a percentile lies in \(0, 100\], got 0"),
        ({"percentile": 101}, "got 101"),
        ({"activation": "gelu"}, "activation must be 'fit' or 'relu', got 'gelu'"),
        ({"step": 4}, "has no option 'step'; did you mean steps"),
    ],
)
def test_options_are_checked(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"pass convert-ffn.*{message}"):
        ConvertFfn.configure(options)
