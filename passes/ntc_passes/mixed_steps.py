r"""Steps per site, chosen by what each site's error does to the network's answer, under a budget of events or of perplexity.

A site is a population of digit neurons whose train linear layers read, or attention as its queries, keys or values. It tells
``|x| <= N d`` in steps of d. With the Fisher information F_s of its n_s values (``ntc_passes.sensitivity``) a step that is k times as wide
costs about ``k^2 F_s / 24`` nats per token, and a digit of each value, ``1 / log2(b)`` of them for every factor of 2, is saved: the least
loss for a number of events has the same loss per value at all sites (reverse water-filling, Cover and Thomas, Elements of Information
Theory, 10.3.3):

    d_s <- k_s d_s,   k_s = g sqrt(n_s / F_s)          where each channel has a step of its own, each is a site with n = 1
    T_s  = the fewest with (N(T_s) + 1/2) k_s >= R_s,   R_s = N, or the largest |x| / d of the text if d is known and that is more

The range stays, or grows to what the text has. g is the widest for which the predicted loss is within ``change``, or the narrowest for
which the spikes are within ``events`` (bisection):

    predicted change = exp(1/2 sum_s sum_c F_c k^2 mean(e_c^2)) - 1,    e = x / (k d) - n,  on sample tokens

Errors are taken for independent and small; what the program has in the end is what ``ntc evaluate`` measures. Where steps are known they
are folded into the weights anew, where they are measured per token their factor changes. Queries, keys and values of one attention have T
in common, the largest of the three. Numerators of softmax and sites with two ranges keep their steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import PassError
from ntc.meta import building
from ntc.ops.digit_neuron import MOST_DIGITS, digit_neuron, digit_thresholds, most_digits
from ntc.ops.spike_linear import weighted
from ntc.pipeline import Context, Pass, PassResult
from ntc.program import Program
from ntc_passes.digits import Digits, check_steps
from ntc_passes.new_weights import NewWeights, times
from ntc_passes.sensitivity import Sensitivity, sensitivities

__all__ = ["MixedSteps"]

_OPS = torch.ops.ntc


@dataclass(frozen=True)
class Options:
    """Options of ``mixed-steps``.

    Attributes:
        events: Budget: mean spikes per value of the sites; 0 = none.
        change: Budget: predicted relative change of perplexity, such as 0.01; 0 = none. One of the two is given.
        most: Most time steps of a site; one that would need more for its range has wider steps than its share.
        tokens: Calibration tokens on which sensitivities are measured.
        rows: Most of them whose spikes are counted to keep the budget.
    """

    events: float = 1.2
    change: float = 0.0
    most: int = MOST_DIGITS
    tokens: int = 2048
    rows: int = 64

    def __post_init__(self) -> None:
        for name in ("most", "tokens", "rows"):
            check_steps(name, getattr(self, name))
        for name in ("events", "change"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if (self.events > 0) == (self.change > 0):
            raise ValueError(f"one budget is given, events or change, and the other is 0, got {self.events:g} and {self.change:g}")


@dataclass(frozen=True)
class _Site:
    """A population.

    Attributes:
        node: Its neurons.
        readers: Linear layers, or one attention.
        base: b of its digits.
        price: lambda of its digits.
        fisher: F, ``[C]``.
        reach: R, in its present steps, ``[1]`` or, if each channel has a step of its own, ``[C]``.
        sample: ``x / d``, ``[rows, C]``.
    """

    node: Node
    readers: tuple[Node, ...]
    base: float
    price: float
    fisher: Tensor
    reach: Tensor
    sample: Tensor

    @property
    def values(self) -> int:
        return int(self.sample.shape[-1])

    def wider(self, g: float, most: int) -> Tensor:
        """The k of a g, ``[1]`` or ``[C]``; at least what so many steps can reach with, at most what leaves nothing to tell."""
        fisher = self.fisher.reshape(len(self.reach), -1)
        k = g * (fisher.shape[1] / fisher.sum(1).clamp(min=1e-30)).sqrt().float()
        return torch.minimum(torch.maximum(k, self.reach / (Digits(self.base, most).most + 0.5)), 4 * self.reach)

    def system(self, k: Tensor, most: int) -> Digits:
        """Digits that reach as far with steps k times as wide."""
        needed = float((self.reach / k).max())
        steps = next((t for t in range(1, most) if Digits(self.base, t).most + 0.5 >= needed), most)
        return Digits(self.base, steps, self.price)

    def fires(self, k: Tensor, most: int) -> tuple[float, float]:
        """Spikes per value, and the predicted loss in nats per token."""
        system = self.system(k, most)
        w, theta = torch.tensor(system.weights), torch.tensor(digit_thresholds(system.weights, self.price))
        n = self.sample / k
        spikes = digit_neuron(n, torch.ones(1), w, theta)
        off = ((weighted(spikes, w) - n) * k).double().square().mean(0)
        return float(spikes.count_nonzero()) / n.numel(), float(self.fisher @ off) / 2


class MixedSteps(Pass):
    """Choose the step, and with it the time steps, of each population of digits."""

    name = "mixed-steps"
    requires = frozenset({"spiking"})
    required = True
    Options = Options

    def run(self, program: Program, context: Context) -> PassResult:
        """Measure all sites on the program as it is, then choose and write."""
        options: Options = self.options
        found = [n for n in program.graph.find_nodes(op="call_function", target=_OPS.digit_neuron.default) if _readers(n)]
        if not found:
            return PassResult(False, 0)
        calibration = context.calibration
        if calibration is None or calibration.tokens == 0:
            raise PassError(f"{self.name} measures on calibration text: give --calibration FILE or a Calibration in the context")
        known = sensitivities(program, found, calibration, options.tokens, options.rows, context.progress)
        sites = [_site(program, n, known[n]) for n in found]
        most = min(options.most, *(most_digits(s.base) for s in sites))
        g = _widest(sites, options, most, context.progress)
        chosen = {s.node: (s.wider(g, most), s.system(s.wider(g, most), most)) for s in sites}
        for trains in {tuple(s.readers[0].args[:3]) for s in sites if s.readers[0].target is _OPS.coded_attention.default}:
            together = max((chosen[t][1] for t in trains), key=lambda d: d.steps)  # type: ignore[index]
            chosen.update({t: (chosen[t][0], together) for t in trains})  # type: ignore[index, misc]
        weights = NewWeights(program, self.name)
        for number, site in enumerate(sites):
            context.progress(self.name, number, len(sites))
            _write(program, site, *chosen[site.node], weights)
        program.graph.eliminate_dead_code()
        return PassResult(True, len(sites), notes=_notes(sites, chosen, g, most, weights))


def _readers(node: Node) -> tuple[Node, ...]:
    """The linear layers that read a train, or the attention, if nothing else does and its neurons hear all values."""
    users = tuple(node.users)
    if len(node.args) > 5 or not users:
        return ()
    if all(u.target is _OPS.spike_linear.default for u in users):
        return users
    if len(users) == 1 and users[0].target is _OPS.coded_attention.default:
        trains = users[0].args[:3]
        alone = all(isinstance(t, Node) and t.target is _OPS.digit_neuron.default and len(t.users) == 1 for t in trains)
        return users if alone and len(set(trains)) == 3 else ()
    return ()


def _per_token(node: Node) -> bool:
    return len(node.args) > 4 and bool(node.args[4])


def _site(program: Program, node: Node, known: Sensitivity) -> _Site:
    step, *tables = node.args[1:4]
    assert isinstance(step, Node)
    w, theta = (program.tensor(a).detach() for a in tables)  # type: ignore[arg-type]
    base = float(w[0] / w[1]) if len(w) > 1 else 3.0
    price = max(0.0, float(2 * theta[-1] - 1.0))  # of the last digit theta = 1/2 + price / 2
    reach = w.sum().reshape(1)
    if not _per_token(node):
        reach = torch.maximum(reach, known.largest if program.tensor(step).numel() > 1 else known.largest.max())
    return _Site(node, _readers(node), base, price, known.fisher, reach, known.sample)


def _totals(sites: Sequence[_Site], g: float, most: int) -> tuple[float, float]:
    """Spikes per value of all sites, and the predicted change of perplexity."""
    fired = [s.fires(s.wider(g, most), most) for s in sites]
    values = sum(s.values for s in sites)
    events = sum(e * s.values for (e, _), s in zip(fired, sites, strict=True)) / values
    return events, math.expm1(min(sum(loss for _, loss in fired), 100.0))


def _widest(sites: Sequence[_Site], options: Options, most: int, progress: Callable[..., None]) -> float:
    """g, by bisection of its logarithm.

    Raises:
        PassError: If no g keeps the budget of perplexity: the finest steps that ``most`` allows lose more than it.
    """
    low, high, rounds = -30.0, 10.0, 16
    if options.change and (least := _totals(sites, 2.0**low, most)[1]) > options.change:
        raise PassError(
            f"mixed-steps has a budget of {100 * options.change:g} % and is predicted to lose {100 * least:.2f} % with the finest steps: "
            "raise change or most"
        )
    for number in range(rounds):
        progress("choose steps", number, rounds)
        middle = (low + high) / 2
        events, change = _totals(sites, 2.0**middle, most)
        wider = change <= options.change if options.change else events > options.events
        low, high = (middle, high) if wider else (low, middle)
    return math.exp2(low if options.change else high)


def _write(program: Program, site: _Site, k: Tensor, system: Digits, weights: NewWeights) -> None:
    """The same site with steps k times as wide: tables, the step, and the weights that a known step is in."""
    node, step, per_token = site.node, site.node.args[1], _per_token(site.node)
    assert isinstance(step, Node)
    w, theta = system.tables(program)
    with building(program.graph, before=node, stands_for=[node], by=MixedSteps.name) as call:
        node.update_arg(2, call(w))
        node.update_arg(3, call(theta))
        if per_token:
            others = [u for u in step.users if u is not node and u not in site.readers]
            assert not others, "a step belongs to one population"
            step.args = (step.args[0], float(step.args[1]) * float(k), *step.args[2:])  # type: ignore[arg-type]
        else:
            step = call(program.add_tensor(f"{node.name}.step", program.tensor(step).detach() * k))
            node.update_arg(1, step)
    for reader in site.readers:
        with building(program.graph, before=reader, stands_for=[reader], by=MixedSteps.name) as call:
            if reader.target is _OPS.coded_attention.default:
                reader.update_arg(6, call(w))
                reader.update_arg(3 + reader.args.index(node), step)
                continue
            reader.update_arg(1, call(w))
            if not per_token:
                matrix = reader.args[2]
                assert isinstance(matrix, Node)
                reader.update_arg(2, call(weights.of(matrix, ("wider", node.name), times(k), reader)))


def _notes(sites: Sequence[_Site], chosen: dict[Node, tuple[Tensor, Digits]], g: float, most: int, weights: NewWeights) -> dict[str, Any]:
    events, change = _totals(sites, g, most)
    linear = [s for s in sites if s.readers[0].target is _OPS.spike_linear.default]
    macs = {s.node: s.values * sum(int(r.meta["val"].shape[-1]) for r in s.readers) for s in linear}
    notes: dict[str, Any] = {
        "steps": {s.node.name: chosen[s.node][1].steps for s in sites}, "events_per_value": events, "predicted_change": change,
        "mean_steps": sum(m * chosen[n][1].steps for n, m in macs.items()) / max(sum(macs.values()), 1),
    }  # fmt: skip
    if untied := weights.untied():
        notes["untied"] = untied
    return notes
