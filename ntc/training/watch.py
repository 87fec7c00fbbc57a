r"""What can go wrong while training, noticed and named: numbers that are not finite, divergence, dead and saturated neurons.

- *Not finite*: the norm of the gradient or the loss is no number. The run stops before the step is taken, so the parameters
  are still those of the step before; ``first_non_finite`` says where the first such value comes from.
- *Divergence*: with the mean loss of the last W = 20 steps ``l_s`` and its lowest value so far ``l*``, the run diverges at
  step s if ``l_s > 2 l* + 0.1``. It is said when it begins, and stops the run when it has stayed so for 100 steps.
- *Dead*: none of a population's neurons fires on the whole validation text, so no gradient reaches what drives them but the
  surrogate's tail. *Saturated*: its neurons fire at more than 99 % of all steps, so that they tell nothing apart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import TrainingError
from ntc.meta import where
from ntc.observe import PopulationActivity
from ntc.program import interpret
from ntc.training.form import TrainingForm

__all__ = ["Divergence", "NeuronWatch", "first_non_finite"]

_SATURATED = 0.99

_ROLES = {"q": "queries", "k": "keys", "v": "values", "ssa": "attention output", "ffn": "feed-forward neurons"}


class Divergence:
    """Watches the loss.

    Args:
        window: W, steps of the moving mean.
        factor: How many times the lowest mean is too much.
        slack: What is always allowed on top, in units of the loss: near 0, noise alone doubles it.
        patience: Steps above that end the run.
    """

    def __init__(self, window: int = 20, factor: float = 2.0, slack: float = 0.1, patience: int = 100) -> None:
        self.window, self.factor, self.slack, self.patience = window, factor, slack, patience
        self._recent: deque[float] = deque(maxlen=window)
        self._lowest: float | None = None
        self._above = 0
        self._said = False

    def see(self, step: int, loss: float) -> str | None:
        """One step; returns a warning when the loss begins to diverge, once per run.

        Raises:
            TrainingError: If it has stayed so for ``patience`` steps.
        """
        self._recent.append(loss)
        if len(self._recent) < self.window:
            return None
        mean = sum(self._recent) / self.window
        self._lowest = mean if self._lowest is None else min(self._lowest, mean)
        if mean <= self.factor * self._lowest + self.slack:
            self._above = 0
            return None
        self._above += 1
        found = f"the loss diverges: {mean:.3g} on average over the {self.window} steps up to step {step}, after {self._lowest:.3g}"
        if self._above >= self.patience:
            raise TrainingError(f"{found}, and that for {self._above} steps; try a lower learning rate")
        if self._said:
            return None
        self._said = True
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"recent": list(self._recent), "lowest": self._lowest, "above": self._above, "said": self._said}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict()`` was taken."""
        self._recent = deque(state["recent"], maxlen=self.window)
        self._lowest, self._above, self._said = state["lowest"], state["above"], state["said"]


@dataclass(frozen=True)
class _Finding:
    population: str
    kind: str
    message: str


class NeuronWatch:
    """Names dead and saturated populations, each once.

    Args:
        said: What was said before, as ``said`` has it.
    """

    def __init__(self, said: Iterable[str] = ()) -> None:
        self.said: list[str] = list(said)

    def see(self, step: int, activity: Iterable[PopulationActivity]) -> list[str]:
        """One validation; returns new warnings, one sentence each."""
        news: list[str] = []
        for population in activity:
            for finding in _findings(step, population):
                key = f"{finding.population} {finding.kind}"
                if key not in self.said:
                    self.said.append(key)
                    news.append(finding.message)
        return news


def _findings(step: int, p: PopulationActivity) -> Iterable[_Finding]:
    name = _ROLES.get(p.role, "neurons")
    place = f"{name} of {p.block} (%{p.name})" if p.block else f"{name} %{p.name}"
    if p.neurons and p.dead == p.neurons:
        yield _Finding(
            p.name, "dead",
            f"dead layer: none of the {p.neurons} {place} fires on the validation text at step {step}; lower their thresholds, or "
            "take a wider surrogate",
        )  # fmt: skip
    elif p.firing_rate > _SATURATED:
        yield _Finding(
            p.name, "saturated",
            f"saturated layer: the {p.neurons} {place} fire at {100 * p.firing_rate:.1f} % of all steps at step {step}; raise their "
            "thresholds, or set a target rate",
        )  # fmt: skip


def first_non_finite(form: TrainingForm, input_ids: Tensor) -> str:
    """Name the first value that is not finite: a tensor of the program, a value in its graph, or a gradient.

    Args:
        form: With the gradients of the step that failed.
        input_ids: The windows of that step.
    """
    for name, value in form.constants().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            return f"the tensor {name}"
    program = form.to_program()
    found: list[Node] = []

    def visit(node: Node, args: tuple[Any, ...], value: Any) -> None:
        if not found and isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            found.append(node)

    with torch.no_grad():
        interpret(program, input_ids, visit)
    if found:
        return f"the value of {where(found[0])}"
    for key, parameter in form.raw.items():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return f"the gradient of {key.replace('/', '.')}"
    return "the loss itself"
