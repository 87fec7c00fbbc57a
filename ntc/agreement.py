"""Does an artefact do what its program does? Runs are compared spike by spike, population by population, logit by logit.

Two questions, for each executor and each population:

- *Free run*: from the same token ids, which spikes differ from the program's, where does it begin, how far are the logits?
- *Held run*: if everything that reads a population is given the program's spikes, does each population still fire the same? Nothing
  accumulates there, so it names the place.

What may differ depends on the program. Integers: nothing. Floating point: spikes of neurons that were within rounding of their
threshold (``ntc.rounding`` proves it or does not), and logits by rounding, both in the held run; behind a spike that a tie has
moved, a free run may do anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import DisagreementError
from ntc.executors import Execution, Executor
from ntc.meta import block_of, module_of, where
from ntc.program import Program
from ntc.recording import Recorded, grade_of, neurons_of, populations, role_of
from ntc.rounding import Limits, at_threshold, limits, margins
from ntc.verdict import Current, Findings, First, Layer, Verdict, finite, judge, promised, worst_of

__all__ = ["Agreement", "nothing"]

_STRICT = 16
"""Neurons that meet their threshold exactly and all differ: by chance once in 2**16, so the comparison is another one."""


class Agreement:
    """Compares one executor with the program, batch by batch.

    ``window`` is the length of the sequences: populations on rows of attention have more neurons per token in longer ones.

    Attributes:
        findings: What was found so far.
    """

    def __init__(self, program: Program, executor: Executor, window: int) -> None:
        self.program, self.executor = program, executor
        missing, other = dict(executor.unsupported), dict(executor.approximate)
        nodes = populations(program)
        layers = {name: _layer(node, window, missing.get(name), other.get(name, "")) for name, node in nodes.items()}
        self.findings = Findings(grade_of(program), nodes, layers)
        self._limits: Limits | None = None

    def add(self, given: Recorded) -> None:
        """Compare one batch.

        Raises:
            DisagreementError: If a population is missing from an execution, or something has another shape.
        """
        if not self.findings.compared:
            return
        if self.findings.grade == "float" and self._limits is None:
            self._measure(given.one())
        differs = self._run(given) if self.executor.free else True
        # Integers that agree freely agree when they are held: they are the same numbers.
        if differs or self.findings.grade == "float":
            self._hold(given)

    def _measure(self, one: Recorded) -> None:
        """How far rounding reaches, on one sequence."""
        self._limits = limits(self.program, one, self.executor.outputs)
        self.findings.logit_limit = self._limits.logits
        for layer in self.findings.compared:
            if layer.node in self._limits.membranes:
                layer.resolution = finite(float(self._limits.membranes[layer.node].amax(0).median()))

    def _run(self, given: Recorded) -> bool:
        """The free run; whether anything differs."""
        found = self.executor.run(given.ids)
        differs = found.logits is not None and self.findings.free.add(found.logits, given.logits)
        begun = False
        for layer, other in self._differences(found, given):
            self._count(layer, given, other)
            if not other.any():
                continue
            if self._limits is not None and not begun:  # what this population reads is the program's, up to rounding
                layer.free_unexplained += int(other.sum()) - self._ties(layer, given, found, other)
            begun = differs = True
        return differs

    def _hold(self, given: Recorded) -> None:
        """The held run."""
        found = self.executor.held(given.ids, {**given.values, **given.trains})
        if found.logits is not None:
            self.findings.held.add(found.logits, given.logits)
        apart: dict[str, Tensor] = {}
        for layer, other in self._differences(found, given):
            apart[layer.node] = other
            if not self.executor.free:
                self._count(layer, given, other)
            if not other.any():
                continue
            own = other & ~self._behind(layer.node, apart, other)
            layer.held_mismatches += int(other.sum())
            layer.consequences += int(other.sum()) - int(own.sum())
            if self._limits is not None and own.any():
                layer.ties += self._ties(layer, given, found, own)
        for name in self.executor.outputs:
            self._compare_current(name, found, given, apart)

    def _compare_current(self, name: str, found: Execution, given: Recorded, apart: Mapping[str, Tensor]) -> None:
        """A value that leaves a piece, at the tokens in which nothing in front of it differs."""
        expected, got = given.values[name], found.values[name]
        if got.shape != expected.shape:
            raise DisagreementError(f"it has currents of shape {list(got.shape)}, the program {list(expected.shape)}: node %{name}")
        off = (got.double() - expected.double()).abs().nan_to_num(nan=torch.inf)
        off = torch.where(self._behind(name, apart, expected), 0.0, off).flatten(0, -2).amax(0)
        limit = torch.zeros_like(off) if self._limits is None else self._limits.values[name].double()
        worst = int((off / limit).nan_to_num(nan=0.0).argmax())
        self.findings.currents.setdefault(name, Current(name, 0.0, float(limit[worst]))).note(float(off[worst]), float(limit[worst]))

    def _behind(self, name: str, apart: Mapping[str, Tensor], other: Tensor) -> Tensor:
        """Tokens at which a population in front, in the same piece, fires something else."""
        found = torch.zeros(other.shape[-3:-1], dtype=torch.bool)[..., None]
        for front in self.executor.behind.get(name, ()):
            found |= apart[front].any(0).any(-1, keepdim=True)
        return found

    def _differences(self, found: Execution, given: Recorded) -> Iterator[tuple[Layer, Tensor]]:
        """For each population where it differs: ``[T, B, L, C]``, or ``[1, B, L, C]`` of counts."""
        for layer in self.findings.compared:
            train, place = given.trains[layer.node], where(self.findings.nodes[layer.node])
            if layer.node in found.counts:
                layer.by, train, got = "counts", train.sum(0, dtype=torch.int32)[None], found.counts[layer.node][None]
            elif layer.node in found.spikes:
                got = found.spikes[layer.node]
            else:
                raise DisagreementError(f"it shows no spikes of {place}")
            if got.shape != train.shape:
                raise DisagreementError(f"it has spikes of shape {list(got.shape)}, the program {list(train.shape)}: {place}")
            yield layer, got != train

    def _count(self, layer: Layer, given: Recorded, other: Tensor) -> None:
        layer.spikes += int(given.trains[layer.node].count_nonzero())
        layer.compared += other.numel()
        layer.spike_mismatches += int(other.sum())
        if layer.first is None and other.any():
            sequence, position, step, neuron = (int(i) for i in other.permute(1, 2, 0, 3).nonzero()[0])
            layer.first = First(given.first + sequence, position, None if layer.by == "counts" else step, neuron)

    def _ties(self, layer: Layer, given: Recorded, found: Execution, other: Tensor) -> int:
        """How many of the differences are ties; takes note of how far the membranes were from their thresholds."""
        if self._limits is None or layer.by != "spikes" or layer.node not in self._limits.membranes:
            return 0
        node, arguments = self.findings.nodes[layer.node], given.arguments[layer.node]
        places = other.any(0).nonzero(as_tuple=True)
        apart = margins(node, arguments, found.spikes[layer.node], places)
        assert apart is not None
        reach = self._limits.membranes[layer.node][:, places[-1]]
        worst = int((apart / reach).nan_to_num(nan=torch.inf).argmax())
        layer.note(float(apart.flatten()[worst]), float(reach.flatten()[worst]))
        exactly = (apart == 0).all(0)
        if bool(exactly.any()):
            met = at_threshold(node, arguments, given.trains[layer.node])
            assert met is not None
            missed = torch.zeros_like(met)
            missed[places] = exactly
            layer.strict |= int(met.sum()) >= _STRICT and bool((missed & met).equal(met))
        every: tuple[slice | Tensor, ...] = (slice(None), *places)
        return int((other[every].sum(0) * (apart <= reach).all(0)).sum())

    def result(self) -> dict[str, Any]:
        """Verdict and figures as plain data (docs/json.md, ``ntc verify``)."""
        return _to_json(self.findings, *judge(self.findings), self.executor)


def nothing(program: Program, window: int, verdict: Verdict, reason: str) -> dict[str, Any]:
    """The result of a target that cannot be run."""
    nodes = populations(program)
    return _to_json(Findings(grade_of(program), nodes, {n: _layer(node, window, reason, "") for n, node in nodes.items()}), verdict, reason)


def _to_json(found: Findings, verdict: Verdict, reason: str, executor: Executor | None = None) -> dict[str, Any]:
    compared = found.compared
    neurons, whole = sum(layer.neurons for layer in compared), sum(layer.neurons for layer in found.layers.values())
    worst = worst_of(compared)
    return {
        "verdict": verdict, "reason": reason, "agrees": verdict in promised(found.grade),
        "spike_mismatches": sum(layer.spike_mismatches for layer in compared), "spikes": sum(layer.spikes for layer in compared),
        "compared": sum(layer.compared for layer in compared), "max_logit_diff": finite(found.free.largest),
        "top1_agreement": found.free.same / found.free.positions if found.free.positions else None,
        "held": {
            "spike_mismatches": sum(layer.held_mismatches for layer in compared), "ties": sum(layer.ties for layer in compared),
            "consequences": sum(layer.consequences for layer in compared), "margin": finite(worst.margin if worst else None),
            "margin_limit": finite(worst.margin_limit if worst else None),
            "max_logit_diff": finite(found.held.largest), "logit_limit": finite(found.logit_limit),
        },
        "coverage": {
            "populations": len(compared), "of_populations": len(found.layers), "neurons": neurons, "of_neurons": whole,
            "share": neurons / whole,
        },
        "unsupported": [{"node": node, "reason": why} for node, why in executor.unsupported] if executor else [],
        "currents": [
            {"node": c.node, "difference": finite(c.difference), "limit": finite(c.limit)} for c in found.currents.values()
        ],
        "runs_in": executor.about if executor else "",
        "layers": [_plain(layer) for layer in found.layers.values()],
    }  # fmt: skip


def _layer(node: Node, window: int, missing: str | None, other: str) -> Layer:
    neurons, steps = neurons_of(node, window) // window, int(node.meta["val"].shape[0])
    row = Layer(node.name, module_of(node), block_of(node), role_of(node), neurons, steps)
    row.by, row.reason = ("spikes", other) if missing is None else ("nothing", missing)
    return row


def _plain(layer: Layer) -> dict[str, Any]:
    margin = {"margin": finite(layer.margin), "margin_limit": finite(layer.margin_limit)}
    return {**asdict(layer), **margin, "unexplained": layer.unexplained}
