r"""The products of attention on spikes: queries, keys, values and probabilities as ternary digits.

Before::

    %y = ntc.attention(%q, %k, %v, heads, kv_heads, scale)

After, with a step per token and head (``scale = token``; H is a Hadamard transform of each head's D channels)::

    %hq = ntc.hadamard(%q, A, k);  %hk = ntc.hadamard(%k, A, k)               # sums and differences; Q.K / D stays
    %dq = ntc.token_step(%hq, r / N, heads);  ...                             # one per head
    %sq = ntc.digit_neuron(%hq, %dq, w, theta, True);  %sk, %sv likewise      # spikes T ternary fitted
    %y  = ntc.coded_attention(%sq, %sk, %sv, %dq, %dk, %dv, w, w', theta', heads, kv_heads, scale / D, True)

The transform spreads the channels of queries and keys that rotary positions leave outstanding; ``Q.K`` does not see it but for the factor
D. Values need none if ``rotate`` has turned them. With steps that are known (``channel``, ``static``) nothing is measured and nothing
transformed: each channel has a range of its own.

Softmax is an analog island between the two products; its numerators are coded one by one, by neurons with ``probability_steps`` (T' =
T if not set) and a range of their own that is the row's largest. What stays is listed: sliding-window attention, and modules with
``convert = false``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.meta import building
from ntc.ops import SOFTMAX_ATTENTION
from ntc.ops.hadamard import hadamard_core
from ntc.pipeline import LEFT_ANALOG, Context, Pass, PassResult
from ntc.program import Program
from ntc_passes.digits import (
    Base,
    Digits,
    Scale,
    check_base_option,
    check_price,
    check_ratio,
    check_scale,
    check_steps,
    learned_base,
    range_of,
    sampled,
)
from ntc_passes.replace_attention import check_percentile, check_switch

__all__ = ["SpikeProducts"]

_OPS = torch.ops.ntc
_ROLES = ("q", "k", "v")


@dataclass(frozen=True)
class Options:
    """Options of ``spike-products``.

    Attributes:
        steps: T of queries, keys and values.
        probability_steps: T' of the softmax's numerators; 0 = T.
        base: b of queries, keys and values; ``learned`` = for each the one with the least error on calibration text.
        probability_base: b' of the numerators.
        price: Squared steps that a spike must be worth.
        scale: Where steps are chosen: for each ``token`` and head while the network runs, or on calibration text for each ``channel`` or
            once per site (``static``).
        ratio: Range over the largest value (``token``) or the percentile.
        percentile: Of the absolute calibration activations; for ``channel`` and ``static``.
        rows: Most tokens of the calibration text that are looked at.
        hadamard: Whether queries and keys are transformed; with ``scale = token`` only.
        convert: Whether to convert at all: false, set for some modules in an override, leaves their attention analog.
    """

    steps: int = 4
    probability_steps: int = 0
    base: Base = 3.0
    probability_base: float = 3.0
    price: float = 0.0
    scale: Scale = "token"
    ratio: float = 1.0
    percentile: float = 100.0
    rows: int = 1024
    hadamard: bool = True
    convert: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "rows"):
            check_steps(name, getattr(self, name))
        if not isinstance(self.probability_steps, int) or isinstance(self.probability_steps, bool) or self.probability_steps < 0:
            raise ValueError(f"probability_steps must be a whole number of at least 0, got {self.probability_steps!r}")
        check_base_option(self.base, self.steps)
        check_base_option(self.probability_base, self.probability_steps or self.steps)
        check_price(self.price)
        check_scale(self.scale)
        check_ratio(self.ratio)
        check_percentile(self.percentile)
        check_switch("hadamard", self.hadamard)
        check_switch("convert", self.convert)


class SpikeProducts(Pass):
    """Put digit neurons on queries, keys, values and probabilities of softmax attention."""

    name = "spike-products"
    requires = frozenset({"canonical"})
    provides = frozenset({"spiking"})
    required = True
    Options = Options

    def run(self, program: Program, context: Context) -> PassResult:
        """Choose what is chosen on calibration text first, on the program as it is; then convert attention by attention."""
        chosen, missed = dict[Node, Options](), list[tuple[str, str]]()
        for node in program.graph.nodes:
            if node.op != "call_function" or node.target not in SOFTMAX_ATTENTION:
                continue
            options = self.at(node, context)
            if not options.convert or node.target is not _OPS.attention.default:
                missed.append((node.name, LEFT_ANALOG if not options.convert else f"{node.target} has no form on spikes"))
            else:
                chosen[node] = options
        wanted: dict[Node, int] = {}
        for node, options in chosen.items():
            if options.scale != "token" or options.base == "learned":
                for value in node.args[:3]:
                    assert isinstance(value, Node)
                    wanted[value] = max(options.rows, wanted.get(value, 0))
        samples = sampled(program, wanted, context, self.name, "scale = token and a fixed base")
        bases: dict[str, float] = {}
        for number, (node, options) in enumerate(chosen.items()):
            context.progress(self.name, number, len(chosen))
            _convert(program, node, options, samples, bases)
        notes: dict[str, Any] = {"bases": bases} if bases else {}
        return PassResult(bool(chosen), len(chosen), tuple(missed), notes=notes)


def _convert(program: Program, node: Node, options: Options, samples: dict[Node, Tensor], bases: dict[str, float]) -> None:
    heads, kv_heads, scale = node.args[3:6]
    assert isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(scale, float)
    per_token = options.scale == "token"
    values = [a for a in node.args[:3] if isinstance(a, Node)]
    width = int(values[0].meta["val"].shape[-1]) // heads
    core = hadamard_core(width) if per_token and options.hadamard else None
    base = options.base
    if base == "learned":  # one for all three: one op reads their trains
        rows = [_rows(samples[v], options, n) for v, n in zip(values, (heads, kv_heads, kv_heads), strict=True)]
        ranges = [range_of(x, options.scale, options.percentile, options.ratio) for x in rows]
        base = bases[node.name] = learned_base(list(zip(rows, ranges, strict=True)), options.steps, options.price)
    digits = Digits(float(base), options.steps, options.price)
    numerators = Digits(options.probability_base, options.probability_steps or options.steps, options.price)
    (w, theta), (levels, thresholds) = digits.tables(program), numerators.tables(program)
    trains, steps = [], []
    with building(program.graph, before=node, stands_for=[node], by=SpikeProducts.name) as call:
        for value, role, groups in zip(values, _ROLES, (heads, kv_heads, kv_heads), strict=True):
            name, x = f"{node.name}_{role}", value
            if core is not None and role != "v":
                stored = f"hadamard_{len(core[0])}"
                if stored not in program.tensors:
                    program.add_tensor(stored, core[0], trainable=False)
                x = call(_OPS.hadamard.default, value, call(stored), core[1], name=f"{name}_hadamard")
            if per_token:
                step = call(_OPS.token_step.default, x, options.ratio / digits.most, groups, name=f"{name}_step")
            else:
                top = range_of(samples[value], options.scale, options.percentile, options.ratio)
                step = call(program.add_tensor(f"{node.name}.{role}_step", top / digits.most))
            args = [x, step, call(w), call(theta), *([True] if per_token else [])]
            trains.append(call(_OPS.digit_neuron.default, *args, name=f"{name}_spikes"))
            steps.append(step)
        factor = scale / (width if core is not None else 1)
        tables = [call(name) for name in (w, levels, thresholds)]
        made = call(
            _OPS.coded_attention.default, *trains, *steps, *tables, heads, kv_heads, factor, *([True] if per_token else []), name=node.name
        )
    node.replace_all_uses_with(made)
    program.graph.erase_node(node)


def _rows(sample: Tensor, options: Options, groups: int) -> Tensor:
    """Calibration values ``[rows, C]``; steps per token are per head, so each head of a token is a row then."""
    return sample.reshape(-1, sample.shape[-1] // groups) if options.scale == "token" else sample
