r"""How far rounding moves what a floating-point program computes: what tells a tie at a threshold from a mistake.

Two executors that add the same numbers in another order differ by rounding, and a neuron makes a whole spike of it if its membrane lies
within that of its threshold. Whether it does is measured, and how far "within" reaches is derived, not chosen:

- *Model.* A computed sum of n terms is the exact sum of terms that are off by a factor of ``1 + d``, ``|d| <= g sqrt(n) u``, with
  probability ``1 - 2 n exp(-g^2 / 2)`` if roundings are independent (Higham and Mary 2019, A New Approach to Probabilistic Rounding
  Error Analysis, SIAM J. Sci. Comput. 41, A2815); u is half of the dtype's ``eps``. Two executors are compared: ``2 u = eps``.
- *Measurement.* The program runs again, held to its own spikes (and to which neuron fired them) so that nothing accumulates, with every
  value moved by ``+- sqrt(n) eps`` of itself, the sign at random for each element; n is the largest number of terms that one of its
  readers adds up (Monte Carlo arithmetic; Parker 1997). What arrives at the membranes and logits has gone through the network's own
  arithmetic, so cancellation and amplification are those of this network. In each place the root mean square of the ``SAMPLES``
  deviations is taken. Neurons inside of an op, as those of the numerators of ``ntc::coded_attention``, are held by nobody, and their ties
  are too rare to be met in so few samples: each result is also moved by one spike of theirs (``OpSpec.one_spike``), of a sign drawn per
  sample and token.
- *Limit.* Of a neuron at a step, ``SAFETY`` (the g above: 8, probability ``n 10^-14``) times its largest deviation at any token, relative
  to its threshold, and ``(T + 4) eps`` for the T additions and subtractions in the membrane. Step by step, since digits have thresholds
  that fall: what rounding does to the last digit excuses nothing in the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops import spec_of
from ntc.program import Program, interpret
from ntc.recording import Recorded, populations, sources

__all__ = ["SAFETY", "SAMPLES", "Limits", "at_threshold", "limits", "margins"]

SAFETY = 8.0
SAMPLES = 4


@dataclass(frozen=True)
class Limits:
    """How far rounding reaches.

    Attributes:
        membranes: By population, of each neuron at each step relative to its threshold, ``[T, C]``.
        values: Of the other values asked for, of each channel, ``[C]``, absolute.
        logits: Absolute.
    """

    membranes: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    logits: float


def limits(program: Program, one: Recorded, wanted: Sequence[str] = ()) -> Limits:
    """Measure on one sequence.

    Args:
        program: A floating-point program.
        one: Its run on one sequence.
        wanted: Nodes among ``one.values`` whose limits are wanted, too.
    """
    generator, told = torch.Generator().manual_seed(0), sources(populations(program).values())
    membranes: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}

    def moved(node: Node, value: Tensor) -> Tensor:
        size = math.sqrt(max((_terms(user, value) for user in node.users), default=1)) * torch.finfo(value.dtype).eps
        signs = torch.randint(0, 2, value.shape, generator=generator, dtype=torch.int8).to(value.dtype) * 2 - 1
        return torch.where(value.isfinite(), value + value * signs.mul_(size), value)  # scores of keys that are not seen: minus infinity

    def visit(node: Node, args: tuple[Any, ...], value: Any) -> Any:
        if node.name in one.trains:
            train = one.trains[node.name]
            fired = train.to(node.meta["val"].dtype)
            spec = spec_of(node)
            if spec is not None and spec.membrane is not None:
                u, levels = spec.membrane(one.arguments[node.name], fired)
                other, _ = spec.membrane(args, fired.expand(-1, SAMPLES, -1, -1))
                deviation = _off(other, u).square_().mean(1).sqrt_() / levels[0]
                membranes[node.name] = SAFETY * deviation.amax(1) + (len(train) + 4) * torch.finfo(fired.dtype).eps
            return moved(node, fired.expand(-1, SAMPLES, -1, -1))
        if node in told:  # the neuron that has fired those spikes, and not the next one
            known = one.values[told[node].name].expand_as(args[node.args.index(told[node])])
            value = node.target(*(known if given is told[node] else a for given, a in zip(node.args, args, strict=True)))  # type: ignore[operator]
        if isinstance(value, Tensor) and value.is_floating_point():
            spec = spec_of(node)
            if spec is not None and spec.one_spike is not None:
                signs = torch.randint(0, 2, (*value.shape[:-1], 1), generator=generator).to(value.dtype) * 2 - 1
                value = value + signs * spec.one_spike(args, value)
            if node.name in wanted:
                values[node.name] = _reach(value, one.values[node.name])
            return moved(node, value)
        return None

    with torch.no_grad():
        logits = interpret(program, one.ids.expand(SAMPLES, -1), visit)
    return Limits(membranes, values, float(_reach(logits, one.logits).max()))


def _reach(samples: Tensor, value: Tensor) -> Tensor:
    """Limit of each channel of a value ``[..., 1, L, C]`` from its samples ``[..., SAMPLES, L, C]``."""
    deviation = _off(samples, value).square_().mean(-3).sqrt_().flatten(0, -2).amax(0)
    largest = torch.where(value.isfinite(), value.abs(), 0).flatten(0, -2).amax(0)
    return SAFETY * deviation + torch.finfo(value.dtype).eps * largest


def _off(samples: Tensor, value: Tensor) -> Tensor:
    """Difference of samples from a value; infinities of one sign are the same number."""
    return torch.where(samples == value, 0, samples - value)


def _terms(reader: Node, value: Tensor) -> int:
    """How many numbers of a value an op adds up for one of its results; of an op that nobody knows, all channels."""
    spec = spec_of(reader)
    kind = "projection" if spec is None else spec.kind
    if kind in ("projection", "norm"):
        return value.shape[-1] if value.dim() else 1
    if kind == "attention":  # channels of a head, then keys
        return sum(value.shape[-2:])
    return value.shape[0] if kind == "decode" else 1


def margins(node: Node, arguments: Sequence[Any], fired: Tensor, places: tuple[Tensor, ...]) -> Tensor | None:
    """How far a population's membranes were from firing another train, relative to their thresholds.

    Each neuron is followed through its T steps with the currents of the program and the resets of the other train. Where it would not
    have fired what that train has, its distance to the threshold in between is what has to be explained.

    Args:
        node: The population.
        arguments: What it was called with.
        fired: The other train ``[T, B, L, C]``.
        places: Sequence, token and neuron of K neurons.

    Returns:
        ``[T, K]``, 0 where it would have fired the same or met the threshold exactly; None if the op does not tell its membrane.
    """
    spec = spec_of(node)
    if spec is None or spec.membrane is None:
        return None

    every: tuple[slice | Tensor, ...] = (slice(None), *places)
    told_by = fired.to(node.meta["val"].dtype)
    with torch.no_grad():
        # Of all neurons: only the op knows which of its arguments are by neuron, by token and group, or a table that all of them share.
        whole, bounds = spec.membrane(arguments, told_by)
        u, levels = whole[every], [level.expand(whole.shape)[every] for level in bounds]
        train = told_by[every]
        told = _reached(train, len(levels))
        own = torch.stack([u >= level for level in levels]).sum(0)
        distance = torch.zeros_like(u)
        for rank, level in enumerate(levels):
            crossed = (own >= len(levels) - rank) != (told >= len(levels) - rank)
            distance = torch.maximum(distance, (u - level).abs() * crossed)
        found: Tensor = distance / levels[0]
    return found


def at_threshold(node: Node, arguments: Sequence[Any], train: Tensor) -> Tensor | None:
    """Neurons ``[B, L, C]`` whose membrane met the threshold exactly in some step: there ``>=`` and ``>`` differ."""
    spec = spec_of(node)
    if spec is None or spec.membrane is None:
        return None
    with torch.no_grad():
        u, levels = spec.membrane(arguments, train.to(node.meta["val"].dtype))
    met: Tensor = (u == levels[0]).any(0)
    return met


def _reached(train: Tensor, levels: int) -> Tensor:
    """How many of its levels a membrane has reached that fired these events: half of them at 0, one more for +-1, +-2, +-4, ... each."""
    return train.sign() * torch.frexp(train.double()).exponent + levels // 2
