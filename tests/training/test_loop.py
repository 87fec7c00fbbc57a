"""The loop on tiny programs: it learns, trains what it should and nothing else, and its log is true."""

from __future__ import annotations

import math
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ntc.training.loop as loop_module
from ntc.errors import ConfigError, TrainingError
from ntc.quality import perplexity
from ntc.training.form import TrainingForm
from ntc.training.groups import roles_of, trained
from ntc.training.optimizer import optimizer_for
from ntc.training.state import News, Outcome
from ntc.training.validation import validate
from ntc.training.watch import Divergence
from tests.programs import canonical, spiking
from tests.training.training_cases import WINDOW, config, trainer, validation


def ran(folder: Path, analog: bool = False, **options: Any) -> Outcome:
    return trainer(folder, config(**options), analog=analog).run()


@pytest.mark.parametrize("analog", [False, True])
def test_it_learns(tmp_path: Path, analog: bool) -> None:
    """A chain with three successors per token, and cross entropy alone."""
    outcome = ran(tmp_path, analog, ce=1.0, kl=0.0, lr=1e-2, max_tokens=4 * WINDOW * 60, validate_every=20, log_every=20)
    before, after = outcome.before["valid_perplexity"], outcome.after["valid_perplexity"]
    assert after < 0.35 * before
    assert after == pytest.approx(perplexity(outcome.program, validation()), rel=1e-6)  # what is given back is what was measured
    assert before == pytest.approx(perplexity(canonical() if analog else spiking(), validation()), rel=1e-6)
    assert outcome.best_step in (20, 40, 60)
    assert (outcome.steps, outcome.ended, outcome.tokens) == (60, "steps", 4 * WINDOW * 60)


def test_it_comes_nearer_to_its_teacher(tmp_path: Path) -> None:
    outcome = ran(tmp_path, ce=0.0, kl=1.0, lr=1e-2, max_tokens=4 * WINDOW * 40, log_every=10)
    divergences = [row["kl"] for row in outcome.rows if "kl" in row]
    assert divergences[-1] < 0.6 * divergences[0]


def test_the_program_that_was_given_is_not_touched(tmp_path: Path) -> None:
    before = {n: t.clone() for n, t in spiking().tensors.items()}
    ran(tmp_path)
    assert all(torch.equal(t, before[n]) for n, t in spiking().tensors.items())


@pytest.mark.parametrize("group", ["ssa", "thresholds", "ffn"])
def test_a_group_is_trained_and_nothing_else(tmp_path: Path, group: str) -> None:
    run = trainer(tmp_path, config(group=group))
    names = trained(roles_of(spiking()), group)
    assert sum(len(g["params"]) for g in run.optimizer.param_groups) == len(names)
    program = run.run().program
    changed = {n for n, t in program.tensors.items() if not torch.equal(t, spiking().tensor(n))}
    assert changed
    assert changed <= names


def test_neurons_stay_legal_at_any_learning_rate(tmp_path: Path) -> None:
    run = trainer(tmp_path, config(group="thresholds", neuron_lr=0.5, validate_every=12))
    run.run()
    for name, tensor in run.form.to_program().tensors.items():
        role = run.form.roles[name]
        if role.domain == "positive":
            assert float(tensor.detach().min()) > 0, name
        elif role.domain == "unit":
            assert float(tensor.detach().min()) >= 0, name
            assert float(tensor.detach().max()) <= 1, name


def test_only_matrices_decay_and_neurons_have_their_own_rate() -> None:
    program = spiking()
    form = TrainingForm(program, trained(roles_of(program), "all"))
    groups = optimizer_for(form, config(lr=0.1, neuron_lr=0.01, weight_decay=0.3)).param_groups
    matrices, others, neurons = groups
    assert (matrices["weight_decay"], others["weight_decay"], neurons["weight_decay"]) == (0.3, 0.0, 0.0)
    assert (matrices["lr"], others["lr"], neurons["lr"]) == (0.1, 0.1, 0.01)
    assert all(p.dim() >= 2 for p in matrices["params"])
    assert all(p.dim() == 1 for p in others["params"])
    of_neurons = {n for n in form.trained if form.roles[n].role != "weight"}
    assert any(n.endswith(".v0") for n in of_neurons)
    assert {id(p) for p in neurons["params"]} == {id(form.raw[n.replace(".", "/")]) for n in of_neurons}


def test_pieces_change_nothing_but_the_order_of_sums(tmp_path: Path) -> None:
    """The analog network: no threshold turns rounding into spikes."""
    whole, pieces = (
        ran(tmp_path / str(n), True, accumulate=n, ce=1.0, kl=0.0, max_tokens=4 * WINDOW * 6) for n in (1, 4)
    )  # fmt: skip
    assert [r["loss"] for r in pieces.rows[1:]] == pytest.approx([r["loss"] for r in whole.rows[1:]], rel=1e-4)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    norms = []
    run = trainer(tmp_path, config(clip=0.01, max_tokens=4 * WINDOW))
    step = run.optimizer.optimizer.step

    def watched(closure: Any = None) -> Any:
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in run.form.raw.values() if p.grad is not None])))
        return step(closure)

    run.optimizer.optimizer.step = watched
    run.run()
    assert norms == [pytest.approx(0.01, rel=1e-3)]


# ------------------------------------------------------------------------------------------------ the log


def test_rows_hold_what_is_documented(tmp_path: Path) -> None:
    outcome = ran(tmp_path, hidden=0.5, target_rate=0.05, log_every=2)
    assert [r["step"] for r in outcome.rows] == [0, 2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in outcome.rows if "valid_perplexity" in r] == [0, 4, 8, 12]
    for row in outcome.rows[1:]:
        assert row["tokens"] == row["step"] * 4 * WINDOW
        parts = 0.3 * row["ce"] + row["kl"] + 0.5 * row["hidden"] + 5 * row["rate"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
        assert set(row["rates"]) == {f"h.{b}.{r}" for b in (0, 1) for r in ("q", "k", "v", "ssa", "ffn")}
        assert row["tokens_per_second"] > 0
    assert outcome.rows[-1]["lr"] < outcome.rows[2]["lr"]


def test_rows_are_means_over_the_steps_since_the_last(tmp_path: Path) -> None:
    each, some = ran(tmp_path / "a", log_every=1), ran(tmp_path / "b", log_every=3, validate_every=100)
    means = [np.mean([r["loss"] for r in each.rows if s < r["step"] <= s + 3]) for s in (0, 3, 6, 9)]
    assert [r["loss"] for r in some.rows[1:]] == pytest.approx(means, rel=1e-6)


def test_rates_of_training_are_those_of_the_program(tmp_path: Path) -> None:
    """The rates in a training row are measured on its batch; on the validation text validate() measures the program itself."""
    found = validate(spiking(), validation())
    row = ran(tmp_path).rows[0]
    assert row["firing_rate"] == pytest.approx(found.firing_rate)
    assert row["attention_rate"] == pytest.approx(np.mean([p.firing_rate for p in found.populations if p.role in "qkv"]))
    assert 0 < row["rates"]["h.0.q"] < 1


def test_news_say_where_the_run_is(tmp_path: Path) -> None:
    news: list[News] = []
    trainer(tmp_path, news=news.append).run()
    steps = [n for n in news if n.stage == "train"]
    assert [n.done for n in steps] == list(range(1, 13))
    assert {n.total for n in steps} == {12}
    assert {"loss", "rates", "valid_perplexity", "tokens_per_second", "seconds_left"} <= set(steps[-1].figures)
    assert steps[-1].figures["seconds_left"] == 0
    assert [n.done for n in news if n.stage == "validate"][:2] == [4, 6]


# ------------------------------------------------------------------------------------------------ budgets and ends


class Clock:
    """Every look at the clock finds it one second later."""

    def __init__(self, seconds: float = 1.0) -> None:
        self._count, self._seconds = count(), seconds

    def perf_counter(self) -> float:
        return next(self._count) * self._seconds


def test_minutes_become_steps_once_the_speed_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "time", Clock())
    run = trainer(tmp_path, config(max_tokens=None, max_minutes=5.0, validate_every=100, save_minutes=1e6))
    outcome = run.run()
    planned = outcome.planned
    assert planned > 10
    assert outcome.steps <= planned
    assert outcome.seconds <= 300 + 10  # the clock runs on while the last checkpoint is written
    if outcome.steps == planned:
        assert outcome.ended == "steps"
        assert outcome.rows[-1]["lr"] == pytest.approx(0.05 * 3e-3, rel=0.5)  # the cosine has come down
    else:
        assert outcome.ended == "time"


def test_time_is_a_limit_even_when_steps_become_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(loop_module, "time", clock)

    def slower(news: News) -> None:
        if news.stage == "train" and news.done > 12:
            clock._seconds = 0.0
            clock._count = count(10**6)
            clock.perf_counter = lambda: 10.0**6  # type: ignore[method-assign]

    outcome = trainer(tmp_path, config(max_tokens=None, max_minutes=5.0, validate_every=100, save_minutes=1e9), news=slower).run()
    assert outcome.ended == "time"
    assert outcome.steps == 13
    assert outcome.planned > 13
    assert outcome.rows[-1]["step"] == 13
    assert "valid_perplexity" in outcome.rows[-1]


def test_patience(tmp_path: Path) -> None:
    """A learning rate that does nothing: the first validation stays the best one."""
    outcome = ran(tmp_path, lr=1e-12, patience=2, validate_every=2, max_tokens=4 * WINDOW * 40)
    assert outcome.ended == "patience"
    assert outcome.best_step in (0, 2)  # exp(log threshold) may move a spike once
    assert outcome.steps == outcome.best_step + 4


def test_a_run_that_only_harms_gives_the_program_back(tmp_path: Path) -> None:
    outcome = ran(tmp_path, lr=3.0, max_tokens=4 * WINDOW * 8)
    assert outcome.best_step == 0
    assert outcome.program.fingerprint() == spiking().fingerprint()


def test_the_last_program_is_given_if_asked_for_though_another_was_better(tmp_path: Path) -> None:
    run = trainer(tmp_path, config(lr=3.0, max_tokens=4 * WINDOW * 8, result="last"))
    outcome = run.run()
    assert outcome.best_step == outcome.steps == 8
    assert outcome.after == outcome.rows[-1]
    trained_to = run.form.to_program()
    assert all(torch.equal(outcome.program.tensor(n), trained_to.tensor(n)) for n in trained_to.tensors)
    assert any(not torch.equal(outcome.program.tensor(n), spiking().tensor(n)) for n in trained_to.tensors)
    assert run.outcome("best").program.fingerprint() == spiking().fingerprint()


def test_a_target_rate_is_reached_and_decides_what_is_best(tmp_path: Path) -> None:
    before = validate(spiking(), validation()).attention_rate
    target = 0.5 * before
    outcome = ran(
        tmp_path, target_rate=target, rate=20.0, lr=2e-2, max_tokens=4 * WINDOW * 60, validate_every=5, log_every=60, neuron_lr=0.1
    )  # fmt: skip
    within = [r for r in outcome.rows if "valid_perplexity" in r and r["attention_rate"] <= 1.02 * target]
    assert within
    assert outcome.after["valid_perplexity"] == min(r["valid_perplexity"] for r in within)
    assert outcome.after["attention_rate"] <= 1.02 * target


# ------------------------------------------------------------------------------------------------ failures


def test_a_number_that_is_not_finite_ends_the_run_before_the_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, config(save_every=1))
    kept: dict[str, torch.Tensor] = {}

    def poison(news: News) -> None:
        if news.stage == "train" and news.done == 5:
            kept.update({n: p.detach().clone() for n, p in run.form.raw.items()})
            with torch.no_grad():
                run.form.raw["transformer/h/1/mlp/c_proj/bias"][0] = torch.nan

    run.news = poison
    says = r"step 6 .* not finite, first in the tensor transformer.h.1.mlp.c_proj.bias; try a lower learning rate \(lr is 0.003\)"
    with pytest.raises(TrainingError, match=says):
        run.run()
    untouched = run.form.raw["transformer/h/0/mlp/c_proj/bias"]
    assert torch.equal(untouched, kept["transformer/h/0/mlp/c_proj/bias"])
    saved = run.work.load(run.work.last)
    assert saved is not None
    assert saved["state"]["step"] <= 5
    assert run.outcome().best_step == 4  # the best program is still to be had
    assert math.isfinite(run.outcome().after["valid_perplexity"])


def test_divergence_is_a_warning_and_then_an_error(tmp_path: Path) -> None:
    news: list[News] = []
    run = trainer(tmp_path, config(lr=1e-9, max_tokens=4 * WINDOW * 60, validate_every=100, log_every=100))
    run.divergence = Divergence(window=4, patience=10)

    def spoil(said: News) -> None:
        news.append(said)
        if said.stage == "train" and said.done == 8:
            with torch.no_grad():
                run.form.raw["transformer/wte/weight"].mul_(20.0)

    run.news = spoil
    with pytest.raises(TrainingError, match=r"diverges: .* for 10 steps"):
        run.run()
    assert 18 <= run.state.step <= 24
    (warning,) = [n.message for n in news if n.stage == "warning"]
    assert "the loss diverges" in warning


def test_dead_layers_are_in_log_news_and_outcome(tmp_path: Path) -> None:
    news: list[News] = []
    run = trainer(tmp_path, config(group="thresholds", max_tokens=4 * WINDOW * 8), news=news.append)

    def kill(said: News) -> None:
        news.append(said)
        if said.stage == "train" and said.done == 3:
            with torch.no_grad():
                name = next(n for n, r in run.form.roles.items() if r.role == "threshold" and "h.1.mlp" in n)
                run.form.raw[name.replace(".", "/")].fill_(20.0)

    run.news = kill
    outcome = run.run()
    assert outcome.rows[-1]["dead"]["h.1.ffn"] == 1.0
    (warning,) = [w for w in outcome.warnings if "dead layer" in w]
    assert "feed-forward neurons of transformer.h.1" in warning
    assert warning in [n.message for n in news if n.stage == "warning"]


def test_rows_have_to_divide_into_pieces() -> None:
    with pytest.raises(ConfigError, match="do not divide"):
        config(rows=4, accumulate=3)
