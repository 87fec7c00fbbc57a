r"""Time steps per site, chosen by what each site's error does, under a budget of events per value.

A site is the train of one population of digit neurons and the linear layers that read it (``encode-linears`` with ``code = digits``). With
T steps it has

    e_s(T) = sum over its layers W of mean over tokens of |W (x - x_T)|^2 / |W x|^2        x_T = what T digits tell of x
    n_s(T) = mean spikes per value of x_T                                                  both on calibration text

and T_s is chosen to minimise ``sum_s e_s(T_s) + mu c_s n_s(T_s)``, c_s the number of its values; mu >= 0 is the smallest for which the
mean of ``n_s`` over values is within the budget (bisection). The relative error of a layer's output is a stand-in for its effect on the
network: it knows weights and values of the site, and nothing of the layers behind. It is taken token by token, because a few tokens with
activations a thousand times those of the others (attention sinks) would make every error look small.

Ranges stay as they are, so fewer digits are wider steps: ``d = range / N(T)``. What is measured per token keeps its range, what is known in
advance is folded into the weights anew. Sites with two ranges keep their steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import PassError
from ntc.meta import building
from ntc.ops.digit_neuron import digit_neuron, digit_thresholds, digit_weights
from ntc.ops.spike_linear import weighted
from ntc.pipeline import Context, Pass, PassResult
from ntc.program import Program
from ntc_passes.digits import Digits, check_steps, sampled

__all__ = ["MixedSteps"]

_OPS = torch.ops.ntc


@dataclass(frozen=True)
class Options:
    """Options of ``mixed-steps``.

    Attributes:
        events: Budget: mean spikes per coded value at the input of linear layers.
        fewest: Least time steps of a site.
        most: Most of them.
        rows: Most tokens of the calibration text that are looked at.
    """

    events: float = 1.5
    fewest: int = 2
    most: int = 8
    rows: int = 128

    def __post_init__(self) -> None:
        for name in ("fewest", "most", "rows"):
            check_steps(name, getattr(self, name))
        if self.fewest > self.most:
            raise ValueError(f"fewest must not be above most, got {self.fewest} and {self.most}")
        if isinstance(self.events, bool) or not isinstance(self.events, int | float) or not 0 < self.events < float("inf"):
            raise ValueError(f"events must be a positive number, got {self.events!r}")


@dataclass(frozen=True)
class _Site:
    """A population and what its number of steps may be: systems, and error and spikes per value of each."""

    node: Node
    layers: tuple[Node, ...]
    systems: tuple[Digits, ...]
    errors: tuple[float, ...]
    events: tuple[float, ...]
    values: int


class MixedSteps(Pass):
    """Choose the time steps of each population of digits."""

    name = "mixed-steps"
    requires = frozenset({"spiking"})
    required = True
    Options = Options

    def run(self, program: Program, context: Context) -> PassResult:
        """Measure all sites on the program as it is, then choose and write."""
        options: Options = self.options
        found = [n for n in program.graph.find_nodes(op="call_function", target=_OPS.digit_neuron.default) if _readers(n)]
        wanted = {n.args[0]: options.rows for n in found if isinstance(n.args[0], Node)}
        samples = sampled(program, wanted, context, self.name, "no mixed steps")
        sites = []
        for number, node in enumerate(found):
            context.progress("measure steps", number, len(found))
            assert isinstance(node.args[0], Node)
            sites.append(_measured(program, node, samples[node.args[0]], options))
        if not sites:
            return PassResult(False, 0)
        chosen = _within(sites, options.events)
        for site, index in zip(sites, chosen, strict=True):
            _write(program, site, site.systems[index])
        program.graph.eliminate_dead_code()
        values = sum(s.values for s in sites)
        steps = {s.node.name: s.systems[i].steps for s, i in zip(sites, chosen, strict=True)}
        macs = [sum(int(layer.meta["val"].shape[-1]) for layer in s.layers) * s.values for s in sites]
        notes: dict[str, Any] = {
            "steps": steps, "events_per_value": sum(s.events[i] * s.values for s, i in zip(sites, chosen, strict=True)) / values,
            "mean_steps": sum(m * s.systems[i].steps for m, s, i in zip(macs, sites, chosen, strict=True)) / sum(macs),
        }  # fmt: skip
        return PassResult(True, len(sites), notes=notes)


def _readers(node: Node) -> tuple[Node, ...]:
    """The linear layers that read a train, if nothing else does and its neurons hear all values."""
    layers = tuple(u for u in node.users if u.target is _OPS.spike_linear.default)
    return layers if len(layers) == len(node.users) and len(node.args) <= 5 else ()


def _measured(program: Program, node: Node, x: Tensor, options: Options) -> _Site:
    w, theta = (program.tensor(a).detach() for a in node.args[2:4])  # type: ignore[arg-type]
    base = float(w[0] / w[1]) if len(w) > 1 else 3.0
    price = max(0.0, float(2 * theta[-1] - 1.0))  # of the last digit theta = 1/2 + price / 2
    layers, most = _readers(node), float(w.sum())
    per_token = len(node.args) > 4 and bool(node.args[4])
    step = node.args[1]
    assert isinstance(step, Node)
    if per_token:
        top = x.abs().amax(-1, keepdim=True) * (float(step.args[1]) * most)  # type: ignore[arg-type]
        top = top.clamp(min=1e-20)
    else:
        top = program.tensor(step).detach() * most
    matrices = []
    for layer in layers:
        matrix = program.tensor(layer.args[2]).detach()  # type: ignore[arg-type]
        matrices.append(matrix if per_token else matrix / program.tensor(step).detach())
    full = [x @ m.T for m in matrices]
    powers = [y.square().sum(-1).clamp(min=1e-20) for y in full]
    systems, errors, events = [], [], []
    for steps in range(options.fewest, options.most + 1):
        system = Digits(base, steps, price)
        v = torch.tensor(digit_weights(base, steps))
        spikes = digit_neuron(x, top / system.most, v, torch.tensor(digit_thresholds(v.tolist(), price)), per_token)
        off = x - weighted(spikes, v) * (top / system.most)
        errors.append(sum(float(((off @ m.T).square().sum(-1) / p).double().mean()) for m, p in zip(matrices, powers, strict=True)))
        events.append(float(spikes.abs().sum(dtype=torch.float64)) / x.numel())
        systems.append(system)
    return _Site(node, layers, tuple(systems), tuple(errors), tuple(events), int(x.shape[-1]))


def _chosen(sites: Sequence[_Site], mu: float) -> list[int]:
    """The best choice of each site at a price of mu for a spike."""
    return [min(range(len(s.systems)), key=lambda i, s=s: s.errors[i] + mu * s.values * s.events[i]) for s in sites]  # type: ignore[misc]


def _mean(sites: Sequence[_Site], chosen: Sequence[int]) -> float:
    return sum(s.events[i] * s.values for s, i in zip(sites, chosen, strict=True)) / sum(s.values for s in sites)


def _within(sites: Sequence[_Site], budget: float) -> list[int]:
    """The choice with the least error within the budget, by bisection of mu on a logarithmic scale.

    Raises:
        PassError: If the budget is below what the fewest steps fire.
    """
    fewest = _mean(sites, [min(range(len(s.systems)), key=s.events.__getitem__) for s in sites])
    if fewest > budget:
        raise PassError(
            f"mixed-steps has a budget of {budget:g} events per value, and the fewest steps fire {fewest:.3f}: raise events or lower fewest"
        )
    if _mean(sites, _chosen(sites, 0.0)) <= budget:
        return _chosen(sites, 0.0)
    low, high = -60.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        if _mean(sites, _chosen(sites, 2.0**middle)) <= budget:
            high = middle
        else:
            low = middle
    return _chosen(sites, 2.0**high)


def _write(program: Program, site: _Site, system: Digits) -> None:
    """The same site with another number system: tables, the step, and the weights that a known step is in."""
    node, step = site.node, site.node.args[1]
    old = program.tensor(node.args[2]).detach()  # type: ignore[arg-type]
    if [*old.tolist()] == system.weights:
        return
    w, theta = system.tables(program)
    assert isinstance(step, Node)
    factor = float(old.sum()) / system.most
    per_token = len(node.args) > 4 and bool(node.args[4])
    with building(program.graph, before=node, stands_for=[node], by=MixedSteps.name) as call:
        new_w, new_theta = call(w), call(theta)
        if per_token:
            others = [u for u in step.users if u is not node and u not in site.layers]
            assert not others, "a step belongs to one population"
            step.args = (step.args[0], float(step.args[1]) * factor, *step.args[2:])  # type: ignore[arg-type]
        else:
            name = program.add_tensor(f"{node.name}.step", program.tensor(step).detach() * factor)
            node.update_arg(1, call(name))
    node.update_arg(2, new_w)
    node.update_arg(3, new_theta)
    for layer in site.layers:
        layer.update_arg(1, new_w)
        if not per_token:
            matrix = layer.args[2]
            assert isinstance(matrix, Node)
            with building(program.graph, before=layer, stands_for=[layer], by=MixedSteps.name) as call:
                name = program.add_tensor(f"{layer.name}.weight_of_steps", program.tensor(matrix).detach() * factor)
                layer.update_arg(2, call(name))
