"""Quality: against an independent computation with the Hugging Face model, and on cases with known answers."""

from __future__ import annotations

import json
import math
from functools import cache
from itertools import pairwise

import pytest
import torch
from programs import TOKENS, canonical, spiking
from torch.nn import functional

import ntc
from ntc.errors import ConfigError, DataError
from ntc.meta import NEURON, building
from ntc.observe import Activity, observe
from ntc.ops import aten
from ntc.program import Program, interpret
from ntc.quality import evaluate, perplexity
from ntc.testing import tiny_gpt2
from ntc.text import Tokens, random_tokens


def test_perplexity_is_that_of_the_model() -> None:
    with torch.no_grad():
        logits = tiny_gpt2(n_layer=1)(TOKENS.windows).logits.double()
    losses = [-logits[b, i].log_softmax(-1)[TOKENS.windows[b, i + 1]] for b in range(8) for i in range(11)]
    expected = math.exp(float(sum(losses)) / len(losses))
    quality = evaluate(spiking(n_layer=1), canonical(n_layer=1), TOKENS, batch=3)
    assert quality.perplexity_ann == pytest.approx(expected, rel=1e-5)
    assert perplexity(canonical(n_layer=1), TOKENS, batch=5) == pytest.approx(expected, rel=1e-5)
    assert quality.perplexity == pytest.approx(perplexity(spiking(n_layer=1), TOKENS), rel=1e-4)
    assert quality.perplexity_change == pytest.approx(quality.perplexity / expected - 1, rel=1e-4)


def test_every_metric_against_a_plain_computation() -> None:
    program, analog = spiking(n_layer=1), canonical(n_layer=1)
    quality = evaluate(program, analog, TOKENS, batch=3)
    with torch.no_grad():
        ours, theirs = program(TOKENS.windows).double(), analog(TOKENS.windows).double()
        hidden = [interpret(p, TOKENS.windows, lambda *_: None, last=p.find("ln_f")).double() for p in (program, analog)]
    p, q = theirs.softmax(-1), ours.softmax(-1)
    assert quality.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert quality.cosine == pytest.approx(float(functional.cosine_similarity(ours, theirs, dim=-1).mean()), abs=1e-5)
    assert quality.cosine_hidden == pytest.approx(float(functional.cosine_similarity(*hidden, dim=-1).mean()), abs=1e-5)
    assert quality.top1_agreement == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()), abs=0.011)
    for accuracy, logits in ((quality.accuracy, ours), (quality.accuracy_ann, theirs)):
        right = logits[:, :-1].argmax(-1) == TOKENS.windows[:, 1:]
        assert accuracy == pytest.approx(float(right.double().mean()), abs=0.012)
    assert (quality.tokens, quality.window, quality.steps) == (96, 12, 4)
    assert quality.neurons == 4 * 32 + 128


def test_a_program_against_itself() -> None:
    quality = evaluate(canonical(n_layer=1), canonical(n_layer=1), TOKENS)
    assert quality.cosine == pytest.approx(1, abs=1e-6)
    assert quality.cosine_hidden == pytest.approx(1, abs=1e-6)
    assert quality.kl == 0
    assert quality.top1_agreement == 1
    assert quality.perplexity == quality.perplexity_ann
    assert quality.perplexity_change == 0
    assert quality.accuracy == quality.accuracy_ann
    assert [layer.where for layer in quality.layers] == ["attention", "ffn", "block"]
    assert all(layer.cosine == pytest.approx(1, abs=1e-12) and layer.relative_error == 0 for layer in quality.layers)
    assert quality.confidence is not None
    assert quality.confidence.intervals["perplexity_change"] == (0, 0)
    assert quality.confidence.intervals["top1_agreement"] == (1, 1)
    assert (quality.neurons, quality.steps, quality.firing_rate, quality.events_per_value, quality.populations) == (0, 0, 0, 0, ())


@cache
def own_text() -> Tokens:
    """Text that the tiny GPT-2 wrote itself: no other network predicts it better, so a worse one must show."""
    network = canonical(n_layer=1)
    ids = torch.randint(0, 61, (48, 1), generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for _ in range(23):
            chances = network.module(ids)[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    return Tokens(ids, "own text", "")


@cache
def disturbed(amount: float, seed: int = 0) -> Program:
    """The network with noise on its weights, relative to their spread."""
    work = canonical(n_layer=1).copy()
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: t.detach() + amount * t.detach().std() * torch.randn(t.shape, generator=generator) if t.dim() > 1 else t
        for name, t in work.tensors.items()
    }
    return Program(torch.fx.GraphModule(tensors, work.graph, "Program").eval(), work.info, work.example, work.facts)


def test_a_worse_program_is_told_from_a_better_one() -> None:
    """More noise on the weights: every figure gets worse, and the interval of the change leaves zero behind."""
    found = [evaluate(disturbed(amount), canonical(n_layer=1), own_text()) for amount in (0.1, 0.3, 1.0)]
    assert all(q.confidence is not None for q in found)
    for better, worse in pairwise(found):
        assert worse.perplexity > better.perplexity
        assert worse.cosine < better.cosine
        assert worse.kl > better.kl
        assert worse.top1_agreement < better.top1_agreement
        assert worse.accuracy < better.accuracy
        for name in ("cosine", "top1_agreement"):
            assert worse.confidence.intervals[name][1] < better.confidence.intervals[name][0], name
        for one, other in zip(better.layers, worse.layers, strict=True):
            assert other.cosine < one.cosine
            assert other.relative_error > one.relative_error
    assert found[1].confidence.intervals["perplexity_change"][0] > 0
    assert found[2].confidence.intervals["perplexity_change"][0] > found[1].confidence.intervals["perplexity_change"][1]


def test_intervals_lie_around_the_figures_and_the_paired_ones_are_narrow() -> None:
    quality = evaluate(disturbed(0.1), canonical(n_layer=1), own_text(), tuned=disturbed(0.02, seed=1))
    confidence = quality.confidence
    assert confidence is not None
    assert (confidence.level, confidence.seed, confidence.windows) == (0.95, 0, 48)
    assert confidence.resamples >= 1000
    wanted = {"perplexity", "perplexity_change", "perplexity_change_tuned", "cosine", "cosine_tuned", "top1_agreement", "kl", "accuracy"}
    assert wanted <= confidence.intervals.keys()
    for name, (low, high) in confidence.intervals.items():
        assert low < getattr(quality, name) < high, name
    width = {name: (high - low) for name, (low, high) in confidence.intervals.items()}
    assert width["perplexity_change"] < width["perplexity"] / quality.perplexity / 2
    again = evaluate(disturbed(0.1), canonical(n_layer=1), own_text(), seed=1, level=0.5)
    assert again.confidence is not None
    assert again.confidence.intervals["perplexity"] != confidence.intervals["perplexity"]
    low, high = again.confidence.intervals["perplexity"]
    assert high - low < width["perplexity"]


def test_figures_against_the_tuned_network_are_those_of_a_comparison_with_it() -> None:
    program, tuned = spiking(n_layer=1), disturbed(0.3)
    both = evaluate(program, canonical(n_layer=1), TOKENS, tuned=tuned)
    apart = evaluate(program, tuned, TOKENS)
    for name, expected in (
        ("perplexity_tuned", apart.perplexity_ann), ("perplexity_change_tuned", apart.perplexity_change), ("cosine_tuned", apart.cosine),
        ("top1_agreement_tuned", apart.top1_agreement), ("kl_tuned", apart.kl), ("accuracy_tuned", apart.accuracy_ann),
    ):  # fmt: skip
        assert getattr(both, name) == pytest.approx(expected, rel=1e-9), name
    assert both.perplexity_tuned != both.perplexity_ann
    plain = evaluate(program, canonical(n_layer=1), TOKENS)
    for name in ("perplexity", "perplexity_ann", "perplexity_change", "cosine", "top1_agreement", "kl", "accuracy", "layers"):
        assert getattr(both, name) == getattr(plain, name), name
    assert math.isnan(plain.perplexity_tuned) and plain.to_json()["perplexity_tuned"] is None


def test_few_windows_have_no_intervals() -> None:
    few = Tokens(TOKENS.windows[:7], "seven windows", "")
    quality = evaluate(canonical(n_layer=1), canonical(n_layer=1), few)
    assert quality.confidence is None
    assert quality.to_json()["confidence"] is None
    assert evaluate(canonical(n_layer=1), canonical(n_layer=1), TOKENS).confidence is not None, "eight are enough"


def test_a_single_window_of_two_tokens() -> None:
    quality = evaluate(spiking(n_layer=1), canonical(n_layer=1), Tokens(TOKENS.windows[:1, :2], "two tokens", ""))
    assert quality.perplexity > 1
    assert quality.accuracy in (0, 1)


def test_batch_size_does_not_matter() -> None:
    one, many = (evaluate(spiking(n_layer=1), canonical(n_layer=1), TOKENS, batch=b) for b in (1, 8))
    assert one.kl == pytest.approx(many.kl, rel=1e-4)
    assert one.events_per_value == pytest.approx(many.events_per_value, rel=1e-3)


def with_biases(shift: dict[int, float]) -> Program:
    """The spiking program with other biases in front of some FFN neurons, in units of the threshold."""
    work = spiking(n_layer=1).copy()
    fc = work.find("h_0_mlp_c_fc")
    bias = work.tensor(fc.args[2]).detach().clone()
    for neuron, value in shift.items():
        bias[neuron] = value
    with building(work.graph, before=fc, stands_for=[fc], by="test") as call:
        fc.update_arg(2, call(work.add_tensor("b", bias)))
    work.refresh()
    ntc.verify.verify(work)
    return work


def test_dead_and_saturated_neurons_are_counted() -> None:
    """A current far below 0 never fires, one far above the threshold fires at every step of every token."""
    plain = evaluate(spiking(n_layer=1), canonical(n_layer=1), TOKENS)
    before = {p.name: (p.dead, p.saturated) for p in plain.populations}["h_0_mlp_act_spikes"]
    base = evaluate(with_biases(dict.fromkeys(range(8), 0.5)), canonical(n_layer=1), TOKENS)
    dead, saturated = {p.name: (p.dead, p.saturated) for p in base.populations}["h_0_mlp_act_spikes"]
    forced = evaluate(with_biases({0: -1e4, 1: -1e4, 2: -1e4, 3: 1e4, 4: 1e4} | dict.fromkeys((5, 6, 7), 0.5)), canonical(n_layer=1), TOKENS)
    population = next(p for p in forced.populations if p.name == "h_0_mlp_act_spikes")
    assert (population.dead, population.saturated) == (dead + 3, saturated + 2)
    assert forced.dead == sum(p.dead for p in forced.populations)
    assert population.spikes[:5].tolist() == [0, 0, 0, 96 * 4, 96 * 4]
    assert population.role == "ffn"
    assert before[0] <= 128


def test_rates_are_counted_on_the_spikes_themselves() -> None:
    program, spikes = spiking(n_layer=1), []
    interpret(program, TOKENS.windows, lambda n, a, v: spikes.append(v.detach()) if NEURON in n.meta else None)
    quality = evaluate(program, canonical(n_layer=1), TOKENS)
    events = sum(float(s.abs().sum()) for s in spikes)
    assert quality.events_per_value == pytest.approx(events / (96 * 256))
    assert quality.firing_rate == pytest.approx(events / (96 * 256 * 4))
    for population, train in zip(quality.populations, spikes, strict=True):
        assert population.firing_rate == pytest.approx(float(train.abs().mean()))
        assert population.tokens == 96


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="the program has 61 tokens in its vocabulary and GPT2LMHeadModel has 37: they are not the same network"):
        evaluate(spiking(n_layer=1), canonical(n_layer=1, vocab_size=37), TOKENS)
    with pytest.raises(DataError, match="the fine-tuned network has 37 tokens in its vocabulary and the program has 61"):
        evaluate(spiking(n_layer=1), canonical(n_layer=1), TOKENS, tuned=canonical(n_layer=1, vocab_size=37))
    with pytest.raises(DataError, match=r"what was given as the fine-tuned network spikes \(T = 4\)"):
        evaluate(spiking(n_layer=1), canonical(n_layer=1), TOKENS, tuned=spiking(n_layer=1))
    with pytest.raises(ConfigError, match=r"at least 100 draws, got 0\.95 and 10"):
        evaluate(spiking(n_layer=1), canonical(n_layer=1), TOKENS, resamples=10)
    with pytest.raises(ConfigError, match=r"a level in \(0, 1\) and .* got 95 and"):
        evaluate(spiking(n_layer=1), canonical(n_layer=1), TOKENS, level=95)
    with pytest.raises(DataError, match="13 tokens are more than the model's context of 12"):
        evaluate(spiking(n_layer=1), canonical(n_layer=1, n_positions=12), random_tokens(61, 13, 26))
    with pytest.raises(DataError, match="token id 61 is outside"):
        perplexity(canonical(n_layer=1), Tokens(torch.full((1, 4), 61), "x", ""))
    with pytest.raises(DataError, match="at least 2 tokens"):
        evaluate(spiking(n_layer=1), canonical(n_layer=1), Tokens(torch.zeros(3, 1, dtype=torch.long), "x", ""))


def test_plain_data_has_no_nan() -> None:
    work = canonical(n_layer=1).copy()  # a network whose graph ends otherwise: no hidden states to compare
    head = work.find("lm_head")
    output = next(n for n in work.graph.nodes if n.op == "output")
    with building(work.graph, before=output, stands_for=[head], by="test") as call:
        output.args = (call(aten.mul.Tensor, head, 1.0),)
    work.refresh()
    quality = evaluate(work, canonical(n_layer=1), TOKENS)
    assert math.isnan(quality.cosine_hidden)
    data = quality.to_json()
    assert data["cosine_hidden"] is None
    json.dumps(data, allow_nan=False)
    assert {"perplexity", "perplexity_ann", "cosine", "top1_agreement", "kl", "tokens", "steps", "events_per_value", "firing_rate"} <= data.keys()


def test_a_program_that_computes_no_numbers_has_no_figures() -> None:
    work = canonical(n_layer=1).copy()
    tensors = {name: torch.full_like(t, math.nan) if name.endswith("c_proj.weight") else t for name, t in work.tensors.items()}
    broken = Program(torch.fx.GraphModule(tensors, work.graph, "Program").eval(), work.info, work.example, work.facts)
    data = evaluate(broken, canonical(n_layer=1), TOKENS).to_json()
    json.dumps(data, allow_nan=False)
    assert (data["perplexity"], data["perplexity_change"], data["cosine"], data["kl"]) == (None,) * 4
    assert data["confidence"]["perplexity"] == [None, None]
    assert data["perplexity_ann"] > 1
    assert data["layers"][0]["cosine"] is None


def test_progress_and_activity() -> None:
    calls: list[tuple[int, int]] = []
    evaluate(spiking(n_layer=1), canonical(n_layer=1), TOKENS, batch=3, progress=lambda *a: calls.append(a))
    assert calls == [(3, 8), (6, 8), (8, 8)]
    activity = Activity(operations=False)
    observe(spiking(n_layer=1), TOKENS.batches(3), activity)
    assert activity.tokens == 96
    assert activity.nodes == {}
