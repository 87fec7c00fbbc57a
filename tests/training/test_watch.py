"""What goes wrong is noticed, named and said once: divergence, numbers that are not finite, dead and saturated neurons."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ntc.errors import TrainingError
from ntc.observe import PopulationActivity
from ntc.testing import example_ids
from ntc.training.form import TrainingForm
from ntc.training.groups import roles_of, trained
from ntc.training.watch import Divergence, NeuronWatch, first_non_finite
from tests.programs import spiking

# ------------------------------------------------------------------------------------------------ divergence


def feed(watch: Divergence, losses: list[float], first: int = 1) -> list[str]:
    return [said for step, loss in enumerate(losses, first) if (said := watch.see(step, loss)) is not None]


@given(st.lists(st.floats(0, 10), max_size=60))
def test_a_loss_that_never_doubles_its_lowest_mean_is_left_alone(noise: list[float]) -> None:
    assert feed(Divergence(), [10 + n for n in noise]) == []


def test_divergence_is_said_once_with_its_numbers() -> None:
    watch = Divergence(window=4)
    said = feed(watch, [2.0] * 4 + [8.0] * 10 + [2.0] * 10 + [8.0] * 10)
    assert len(said) == 1
    assert "the loss diverges: 5 on average over the 4 steps up to step 6, after 2" in said[0]


def test_divergence_that_stays_ends_the_run() -> None:
    watch = Divergence(window=2, patience=5)
    assert len(feed(watch, [1.0, 1.0, 9.0, 9.0, 9.0, 9.0])) == 1
    with pytest.raises(TrainingError, match="for 5 steps; try a lower learning rate"):
        watch.see(7, 9.0)


def test_divergence_that_passes_does_not() -> None:
    watch = Divergence(window=2, patience=5)
    feed(watch, ([1.0] * 4 + [9.0] * 3) * 6)
    with pytest.raises(TrainingError):
        feed(watch, [9.0] * 9)


def test_noise_around_a_small_loss_is_no_divergence() -> None:
    assert feed(Divergence(window=2), [0.01, 0.01, 0.09, 0.09]) == []


def test_divergence_goes_on_where_it_was() -> None:
    losses = [3.0] * 7 + [20.0] * 12
    whole, before, after = Divergence(window=5, patience=50), Divergence(window=5, patience=50), Divergence(window=5, patience=50)
    said = feed(whole, losses)
    first = feed(before, losses[:9])
    after.load_state_dict(before.state_dict())
    assert first + feed(after, losses[9:], first=10) == said
    assert after.state_dict() == whole.state_dict()


# ------------------------------------------------------------------------------------------------ neurons


def population(spikes: list[float], *, role: str = "q", name: str = "h_0_q", steps: int = 4, tokens: int = 10) -> PopulationActivity:
    return PopulationActivity(name, "transformer.h.0.attn", "transformer.h.0", role, steps, torch.tensor(spikes, dtype=torch.float64), tokens)


def test_dead_and_saturated_layers_are_named_once() -> None:
    watch = NeuronWatch()
    dead, saturated = population([0.0] * 3), population([40.0] * 3, role="ffn", name="h_0_mlp")
    first = watch.see(50, [dead, saturated])
    assert len(first) == 2
    assert "dead layer: none of the 3 queries of transformer.h.0 (%h_0_q) fires on the validation text at step 50" in first[0]
    assert "saturated layer: the 3 feed-forward neurons of transformer.h.0 (%h_0_mlp) fire at 100.0 % of all steps" in first[1]
    assert watch.see(100, [dead, saturated]) == []
    assert NeuronWatch(watch.said).see(150, [dead, saturated]) == []  # nor after a kill


@pytest.mark.parametrize("spikes", [[0.0, 0.0, 1.0], [40.0, 40.0, 37.0], [20.0] * 3])
def test_layers_that_do_something_are_not(spikes: list[float]) -> None:
    assert NeuronWatch().see(1, [population(spikes)]) == []


def test_nearly_saturated_is_saturated() -> None:
    assert len(NeuronWatch().see(1, [population([399.0, 398.0, 400.0], tokens=100)])) == 1


# ------------------------------------------------------------------------------------------------ not finite


def form() -> TrainingForm:
    program = spiking()
    return TrainingForm(program, trained(roles_of(program), "all"))


def test_a_tensor_that_is_not_finite_is_named() -> None:
    broken = form()
    with torch.no_grad():
        broken.raw["transformer/h/1/mlp/c_proj/weight"][0, 0] = torch.inf
    assert first_non_finite(broken, example_ids()) == "the tensor transformer.h.1.mlp.c_proj.weight"


def test_a_value_that_is_not_finite_is_named_where_it_first_appears() -> None:
    broken = form()
    with torch.no_grad():
        broken.raw["transformer/h/1/ln_2/weight"].fill_(3e38)  # finite, but not what is computed with it
    said = first_non_finite(broken, example_ids())
    assert said.startswith("the value of node %")
    assert "transformer.h.1" in said


def test_a_gradient_that_is_not_finite_is_named() -> None:
    broken = form()
    for parameter in broken.raw.values():
        parameter.grad = torch.zeros_like(parameter)
    gradient = broken.raw["transformer/h/0/mlp/c_fc/bias"].grad
    assert gradient is not None
    gradient[3] = torch.nan
    assert first_non_finite(broken, example_ids()) == "the gradient of transformer.h.0.mlp.c_fc.bias"
