"""Losses against their formulas in float64, their gradients in closed form, and what an objective refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ntc.errors import ConfigError
from ntc.program import Program
from ntc.testing import example_ids
from ntc.training.form import Population, TrainingForm
from ntc.training.groups import roles_of, trained
from ntc.training.losses import Objective, attention_rate, hidden_loss, logit_losses, rate_loss
from tests.programs import canonical
from tests.training.training_cases import config, without_ties


def logits(seed: int, batch: int = 2, length: int = 5, vocabulary: int = 7, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(batch, length, vocabulary, generator=torch.Generator().manual_seed(seed))


def softmax(z: Tensor) -> Any:
    z = z.double().numpy()
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@given(st.integers(0, 1000), st.integers(1, 3), st.integers(2, 6), st.integers(2, 9), st.sampled_from([0.1, 3.0, 30.0]))
def test_logit_losses_are_those_of_the_formulas(seed: int, batch: int, length: int, vocabulary: int, scale: float) -> None:
    z, teacher = logits(seed, batch, length, vocabulary, scale), logits(seed + 1, batch, length, vocabulary, scale)
    ids = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))
    q, p = softmax(z), softmax(teacher)
    expected_ce = np.mean([-np.log(max(q[b, i, ids[b, i + 1]], 1e-300)) for b in range(batch) for i in range(length - 1)])
    expected_kl = np.mean([sum(p[b, i] * (np.log(p[b, i]) - np.log(q[b, i]))) for b in range(batch) for i in range(length)])
    ce, kl = logit_losses(z, teacher, ids)
    assert float(ce) == pytest.approx(expected_ce, rel=1e-5, abs=1e-5)
    assert float(kl) == pytest.approx(expected_kl, rel=1e-5, abs=1e-5)


def test_known_values() -> None:
    ids = example_ids(7, 2, 5)
    ce, kl = logit_losses(torch.zeros(2, 5, 7), torch.full((2, 5, 7), 4.0), ids)
    assert float(ce) == pytest.approx(math.log(7))
    assert float(kl) == pytest.approx(0.0, abs=1e-6)
    z = logits(0)
    assert float(logit_losses(z, z + 1.5, ids)[1]) == pytest.approx(0.0, abs=1e-6)  # a constant changes no softmax
    assert float(logit_losses(z, None, ids)[1]) == 0.0


def test_gradients_of_the_logits() -> None:
    """d ce / dz = (softmax z - onehot) / (B (L - 1)) but at the last position; d kl / dz = (softmax z - softmax z') / (B L)."""
    z, teacher, ids = logits(1).requires_grad_(), logits(2).requires_grad_(), example_ids(7, 2, 5)
    ce, kl = logit_losses(z, teacher, ids)
    (of_ce,) = torch.autograd.grad(ce, z, retain_graph=True)
    (of_kl,) = torch.autograd.grad(kl, z)
    q, p = torch.from_numpy(softmax(z.detach())), torch.from_numpy(softmax(teacher.detach()))
    onehot = torch.nn.functional.one_hot(ids[:, 1:], 7)
    expected = torch.zeros(2, 5, 7, dtype=torch.float64)
    expected[:, :-1] = (q[:, :-1] - onehot) / 8
    torch.testing.assert_close(of_ce.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(of_kl.double(), (q - p) / 10, rtol=1e-5, atol=1e-7)


@given(st.floats(-3, 3), st.integers(1, 4))
def test_hidden_loss_is_relative_and_per_position(stretch: float, blocks: int) -> None:
    """h' (1 + s) is s^2 away from h' in every block, whatever the size of its positions."""
    sizes = torch.tensor([1000.0, 1.0, 0.01]).view(1, 3, 1)
    theirs = [sizes * logits(b, 2, 3, 4) for b in range(blocks)]
    loss = hidden_loss([(1 + stretch) * h for h in theirs], theirs)
    assert float(loss) == pytest.approx(blocks * stretch**2, rel=1e-3, abs=1e-6)


def test_hidden_loss_moves_the_program_only() -> None:
    ours, theirs = logits(3).requires_grad_(), logits(4).requires_grad_()
    hidden_loss([ours], [theirs]).backward()
    assert ours.grad is not None
    assert theirs.grad is None
    expected = 2 * (ours - theirs) / theirs.square().sum(-1, keepdim=True) / 10
    torch.testing.assert_close(ours.grad, expected.detach())


@pytest.mark.parametrize(("rate", "target", "expected"), [(0.1, 0.2, 0.0), (0.2, 0.2, 0.0), (0.3, 0.2, 0.25), (0.6, 0.2, 4.0)])
def test_rate_loss(rate: float, target: float, expected: float) -> None:
    r = torch.tensor(rate, requires_grad=True)
    loss = rate_loss(r, target)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert r.grad is not None
    assert float(r.grad) == pytest.approx(2 * max(0.0, rate / target - 1) / target, abs=1e-5)


def test_attention_rate_is_that_of_q_k_and_v() -> None:
    populations = [Population(role, "h.0", role, False) for role in ("q", "k", "ssa", "v", "ffn")]
    rates = [torch.full((size,), value) for size, value in ((4, 0.1), (2, 0.2), (4, 0.9), (2, 0.6), (9, 1.0))]
    assert float(attention_rate(rates, populations)) == pytest.approx(0.3)
    assert float(attention_rate(rates[-1:], populations[-1:])) == pytest.approx(1.0)  # nothing but a spiking FFN


# ------------------------------------------------------------------------------------------------ objective


def form(**options: Any) -> TrainingForm:
    program = without_ties()
    return TrainingForm(program, trained(roles_of(program), "all"), **options)


def test_objective_is_the_weighted_sum_of_its_parts() -> None:
    settings = config(ce=0.5, kl=2.0, hidden=0.25, target_rate=0.1, rate=3.0)
    objective, ids = Objective(form(), TrainingForm(canonical()), settings), example_ids(61, 3, 12)
    losses = objective(ids)
    ce, kl, hidden, rate = losses.parts.tolist()
    assert losses.total.item() == pytest.approx(0.5 * ce + 2 * kl + 0.25 * hidden + 3 * rate, rel=1e-6)
    with torch.no_grad():
        ours, theirs = without_ties()(ids), canonical()(ids)
    expected = logit_losses(ours, theirs, ids)
    assert ce == pytest.approx(float(expected[0]), rel=1e-4)
    assert kl == pytest.approx(float(expected[1]), rel=1e-4)
    assert hidden > 0
    assert rate > 0
    assert len(losses.rates) == len(objective.form.populations)
    assert not losses.parts.requires_grad
    assert not losses.rates.requires_grad


def test_the_teacher_is_no_part_of_what_is_trained() -> None:
    objective = Objective(form(), TrainingForm(canonical()), config())
    assert {n for n, _ in objective.named_parameters()} == {f"form.raw.{n}" for n in objective.form.raw}


def test_a_program_is_its_own_perfect_teacher() -> None:
    objective = Objective(form(), TrainingForm(without_ties()), config(ce=0.0, hidden=1.0))
    losses = objective(example_ids(61, 2, 12))
    assert losses.parts[1:3].tolist() == pytest.approx([0.0, 0.0], abs=1e-5)


def test_what_an_objective_refuses() -> None:
    with pytest.raises(ConfigError, match="give a teacher, or weigh both 0"):
        Objective(form(), None, config())
    Objective(form(), None, config(kl=0.0))
    teacher = TrainingForm(canonical())
    teacher.program = Program(canonical().module, replace(canonical().info, vocab_size=40), canonical().example)
    with pytest.raises(ConfigError, match=r"61 tokens in its vocabulary and the teacher .* has 40"):
        Objective(form(), teacher, config())
    teacher = TrainingForm(canonical())
    teacher.blocks = teacher.blocks[:1]
    with pytest.raises(ConfigError, match=r"transformer.h.0, transformer.h.1 where the teacher has transformer.h.0:"):
        Objective(form(), teacher, config(hidden=1.0))
    analog = TrainingForm(canonical(), trained(roles_of(canonical()), "all"))
    with pytest.raises(ConfigError, match="no rate to keep down"):
        Objective(analog, TrainingForm(canonical()), config(target_rate=0.1))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_is_eager(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher, program and losses are one graph for ``torch.compile``: same losses, same gradients up to rounding."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    settings, ids = config(hidden=0.1, target_rate=0.1), example_ids(61, 2, 12)
    results = []
    for compile in (False, True):
        objective = Objective(form(), TrainingForm(canonical()), settings, compile=compile)
        losses = objective(ids)
        losses.total.backward()
        gradients = {n: p.grad for n, p in objective.form.raw.items() if p.grad is not None}
        results.append((losses.parts, gradients))
    (parts, gradients), (parts_compiled, gradients_compiled) = results
    torch.testing.assert_close(parts_compiled, parts, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == gradients_compiled.keys()
    whole, whole_compiled = (torch.cat([g[n].flatten() for n in gradients]) for g in (gradients, gradients_compiled))
    assert float(torch.nn.functional.cosine_similarity(whole, whole_compiled, dim=0)) > 0.9999
