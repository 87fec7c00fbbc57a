"""The differentiable form of a program is the program: same logits, the gradients of its kernels, legal values all the time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ntc
from ntc.errors import ConfigError
from ntc.recipe import Settings
from ntc.testing import example_ids, tiny_gpt2
from ntc.training.form import TrainingForm
from ntc.training.groups import GROUPS, roles_of, trained
from ntc.training.legal import from_raw, to_raw

DECODED = {"output": "current"}  # without an output neuron no threshold meets integers, where rounding decides


@pytest.fixture(scope="module")
def compiled():
    return ntc.compile(tiny_gpt2(), settings=Settings(options={"steps": 3, **DECODED}), calibration=example_ids(batch=4, length=24))


@pytest.fixture(scope="module")
def program(compiled):
    return compiled.program


def test_form_gives_the_logits_of_the_program_and_watches_it(program):
    ids = example_ids()
    form = TrainingForm(program, trained(roles_of(program), "all"))
    out = form(ids)
    torch.testing.assert_close(out.logits, program(ids), rtol=1e-5, atol=1e-5)
    assert form.blocks == ("transformer.h.0", "transformer.h.1")
    assert [tuple(h.shape) for h in out.hidden] == [(2, 9, 32)] * 2
    assert [p.label for p in form.populations] == [f"h.{b}.{r}" for b in (0, 1) for r in ("q", "k", "v", "ffn")]
    assert all(float(r.detach().min()) >= 0 and float(r.detach().max()) <= 1 and r.shape[0] in (32, 128) for r in out.rates)
    assert any(float(r.detach().mean()) > 0 for r in out.rates)


def test_gradients_are_those_of_the_kernels(program):
    """The program itself trains too, only more slowly: its kernels' explicit gradients are the oracle of the traced form."""
    ids, names = example_ids(), sorted(program.tensors)
    form = TrainingForm(program, frozenset(names))
    weights = torch.randn(2, 9, 61, generator=torch.Generator().manual_seed(3))
    (form(ids).logits * weights).sum().backward()
    program.module.zero_grad()
    (program(ids) * weights).sum().backward()
    for name in names:
        role = form.roles[name]
        expected = program.tensor(name).grad
        raw = form.raw[name.replace(".", "/")]
        if role.domain == "positive":  # d/dr of exp(r)
            expected = expected * program.tensor(name)
        elif role.domain == "unit":
            expected = expected * program.tensor(name) * (1 - program.tensor(name))
        torch.testing.assert_close(raw.grad, expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()), msg=lambda m, n=name: f"{n}: {m}")
    assert any(float(form.raw[n.replace(".", "/")].grad.abs().max()) > 0 for n in names if form.roles[n].role == "v0")


def test_what_is_not_trained_has_no_parameter_and_comes_back_unchanged(program):
    group = trained(roles_of(program), "thresholds")
    form = TrainingForm(program, group)
    assert len(list(form.parameters())) == len(group)
    with torch.no_grad():
        for raw in form.parameters():
            raw.add_(0.1)
    after = form.to_program()
    for name, old in program.tensors.items():
        changed = not torch.equal(after.tensor(name), old)
        assert changed == (name in group), name
    assert isinstance(after.tensor(next(iter(group))), torch.nn.Parameter)


def test_groups_are_read_off_the_graph(compiled):
    roles = roles_of(compiled.program)
    sets = {g: trained(roles, g) for g in GROUPS}
    assert not sets["ssa"] & sets["ffn"]
    assert {n.split("attn.")[-1] for n in sets["ssa"] if "h.0." in n} >= {"c_proj.weight", "q.threshold", "k.v0", "v.threshold"}
    assert all("attn" in n for n in sets["ssa"])
    assert all("mlp" in n for n in sets["ffn"])
    assert all(n.endswith(("threshold", "v0", "gain", "leak")) for n in sets["thresholds"])
    assert sets["all"] == frozenset(compiled.program.tensors)
    assert {"transformer.wte.weight", "transformer.ln_f.weight"} <= sets["all"] - sets["ssa"] - sets["ffn"]
    analog = trained(roles_of(compiled.analog), "ssa")
    assert analog and all("attn.c_" in n for n in analog)
    with pytest.raises(ConfigError, match="has no tensor"):
        trained(roles_of(compiled.analog), "thresholds")
    with pytest.raises(ConfigError, match="no group"):
        trained(roles, "attention")


def test_surrogate_and_width_reach_the_neurons(program):
    ids, grads = example_ids(), []
    for name, width in (("triangular", 1.0), ("sigmoid", 1.0), ("atan", 2.0)):
        form = TrainingForm(program, trained(roles_of(program), "all"), surrogate=name, width=width)
        form(ids).logits.square().sum().backward()
        grads.append(form.raw["transformer/h/0/attn/q/threshold"].grad.clone())
    assert not torch.allclose(grads[0], grads[1]) and not torch.allclose(grads[1], grads[2])
    with pytest.raises(ConfigError, match="surrogate"):
        TrainingForm(program, surrogate="step")
    with pytest.raises(ConfigError, match="positive"):
        TrainingForm(program, width=0.0)


def test_checkpointing_changes_memory_only(program):
    ids, results = example_ids(), []
    for again in (False, True):
        form = TrainingForm(program, trained(roles_of(program), "all"), checkpointing=again)
        form(ids).logits.square().sum().backward()
        results.append([p.grad for p in form.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_bf16_stays_near(program):
    ids = example_ids()
    full, half = (TrainingForm(program, bf16=b)(ids).logits.float() for b in (False, True))
    assert float((full - half).abs().max()) > 0  # it really ran in bf16
    assert torch.nn.functional.cosine_similarity(full, half, dim=-1).mean() > 0.9


def test_a_forced_layer_sees_the_teacher_and_nothing_else(compiled):
    """With its own streams given, a form is itself; with a teacher's, no layer depends on the weights of another."""
    program, ids = compiled.program, example_ids()
    own = TrainingForm(program, by_layer=True)(ids)
    form = TrainingForm(program, trained(roles_of(program), "all"), by_layer=True, forced=True)
    assert form.blocks == tuple(f"transformer.h.{b}.{w}" for b in (0, 1) for w in ("attention", "ffn"))
    for a, b in zip(form(ids, own.stream).hidden, own.hidden, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    teacher = TrainingForm(compiled.analog, by_layer=True)(ids)
    assert len(teacher.stream) == 4
    torch.testing.assert_close(teacher.stream[1], teacher.stream[0] + teacher.hidden[1])
    form(ids, teacher.stream).hidden[2].square().sum().backward()
    touched = {n for n, raw in form.raw.items() if raw.grad is not None and bool(raw.grad.any())}
    assert touched and all("h/1/attn" in n or "h/1/ln_1" in n for n in touched)


@given(value=st.floats(1e-6, 1e6), step=st.floats(-50, 50), domain=st.sampled_from(["positive", "unit", "above-one", "any"]))
def test_no_step_leaves_the_legal_values(value, step, domain):
    legal = {"positive": value, "unit": value / (1 + value), "above-one": 1 + value, "any": -value}[domain]
    raw = to_raw(torch.tensor([legal]), domain)
    edge = 2.0**-12
    if domain == "any" or (domain == "unit" and edge < legal < 1 - edge) or (domain == "above-one" and value > edge) or domain == "positive":
        torch.testing.assert_close(from_raw(raw, domain), torch.tensor([legal]), rtol=2e-5, atol=1e-6)
    moved = float(from_raw(raw + min(max(step, -20), 20), domain))
    assert {"positive": moved > 0, "unit": 0 <= moved <= 1, "above-one": moved >= 1, "any": True}[domain]
