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
T if not set) and a range of their own that is the row's largest.

Attention that is open already, because ``spike-functions`` has made its softmax spiking, is coded product by product, whatever stands
between them. Before::

    %s = ntc.causal_scores(%q, %k, heads, kv_heads, scale, window);  ...                    # to %p, [B, H L, L]
    %y = ntc.weighted_values(%p, %v, heads, kv_heads, window)

After, numerators with a population that is a node of the graph::

    %s  = ntc.coded_scores(%sq, %sk, %dq, %dk, w, heads, kv_heads, scale / D, window, True);  ...
    %x  = ntc.key_scale(%p, %dv, heads, kv_heads)                                           # times the size of the value behind
    %dx = ntc.token_step(%x, 1 / N');  %m = sum(%x)                                         # step and sum of each row
    %sx = ntc.digit_neuron(%x, %dx, w', theta', True)
    %y  = ntc.coded_values(%sx, %sv, %dx, %m, w', w, heads, kv_heads, window)

Sliding-window attention becomes this form too, its softmax on the host. What stays is listed: attention with capped scores, and modules
with ``convert = false``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.meta import building
from ntc.ops import SOFTMAX_ATTENTION, aten
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
    provides = frozenset({"spiking", "coded", "products-coded"})
    required = True
    Options = Options

    def run(self, program: Program, context: Context) -> PassResult:
        """Choose what is chosen on calibration text first, on the program as it is; then convert op by op."""
        chosen, missed = dict[Node, Options](), list[tuple[str, str]]()
        for node in program.graph.nodes:
            if node.op != "call_function" or node.target not in _FORMS:
                continue
            options = self.at(node, context)
            if not options.convert:
                missed.append((node.name, LEFT_ANALOG))
            elif len(node.args) > 7 and node.args[7]:
                missed.append((node.name, f"{node.target} caps its scores, which has no form on spikes"))
            else:
                chosen[node] = options
        wanted: dict[Node, int] = {}
        for node, options in chosen.items():
            if options.scale != "token" or options.base == "learned":
                for value in _operands(node):
                    wanted[value] = max(options.rows, wanted.get(value, 0))
        samples = sampled(program, wanted, context, self.name, "scale = token and a fixed base")
        bases: dict[str, float] = {}
        for number, (node, options) in enumerate(chosen.items()):
            context.progress(self.name, number, len(chosen))
            with building(program.graph, before=node, stands_for=[node], by=self.name) as call:
                made = _FORMS[node.target](_Site(program, call, node, options, samples, bases))
            node.replace_all_uses_with(made)
            program.graph.erase_node(node)
        notes: dict[str, Any] = {"bases": bases} if bases else {}
        return PassResult(bool(chosen), len(chosen), tuple(missed), notes=notes)


@dataclass(frozen=True)
class _Site:
    """An op that is replaced, and what its replacement is made with.

    Attributes:
        program: Where it stands.
        call: Makes nodes.
        node: The op.
        options: For its module.
        samples: Calibration values of its operands, if their steps or bases are chosen on them.
        bases: Learned bases, by name of the op.
    """

    program: Program
    call: Any
    node: Node
    options: Options
    samples: dict[Node, Tensor]
    bases: dict[str, float]

    @property
    def per_token(self) -> bool:
        """Whether steps are made while the network runs."""
        return self.options.scale == "token"

    def digits(self, *values: tuple[Node, int]) -> Digits:
        """One number system for values whose trains one op reads, each given with its number of heads."""
        o, base = self.options, self.options.base
        if base == "learned":
            rows = [_rows(self.samples[v], o, heads) for v, heads in values]
            ranges = [range_of(x, o.scale, o.percentile, o.ratio) for x in rows]
            base = self.bases[self.node.name] = learned_base(list(zip(rows, ranges, strict=True)), o.steps, o.price)
        return Digits(float(base), o.steps, o.price)

    def numerators(self) -> Digits:
        """The number system of the softmax's numerators."""
        o = self.options
        return Digits(o.probability_base, o.probability_steps or o.steps, o.price)

    def coded(self, value: Node, heads: int, digits: Digits, stem: str, role: str) -> tuple[Node, Node]:
        """Spikes of a value and their step."""
        o, name = self.options, f"{stem}_{role}"
        w, theta = digits.tables(self.program)
        if self.per_token:
            step = self.call(_OPS.token_step.default, value, o.ratio / digits.most, heads, name=f"{name}_step")
        else:
            top = range_of(self.samples[value], o.scale, o.percentile, o.ratio)
            step = self.call(self.program.add_tensor(f"{stem}.{role}_step", top / digits.most))
        args = [value, step, self.call(w), self.call(theta), *([True] if self.per_token else [])]
        return self.call(_OPS.digit_neuron.default, *args, name=f"{name}_spikes"), step

    def spread(self, queries: Node, keys: Node, heads: int, stem: str) -> tuple[Node, Node, float]:
        """Queries and keys, Hadamard-transformed if steps are per token, and what their product is divided by then."""
        width = int(queries.meta["val"].shape[-1]) // heads
        core = hadamard_core(width) if self.per_token and self.options.hadamard else None
        if core is None:
            return queries, keys, 1.0
        stored = f"hadamard_{len(core[0])}"
        if stored not in self.program.tensors:
            self.program.add_tensor(stored, core[0], trainable=False)
        q, k = (
            self.call(_OPS.hadamard.default, x, self.call(stored), core[1], name=f"{stem}_{role}_hadamard")
            for x, role in ((queries, "q"), (keys, "k"))
        )
        return q, k, float(width)


def _operands(node: Node) -> list[Node]:
    """Queries, keys and values among the arguments of an op."""
    if node.target is _OPS.weighted_values.default:
        return [a for a in node.args[1:2] if isinstance(a, Node)]
    return [a for a in node.args[:3] if isinstance(a, Node)]


def _whole(site: _Site) -> Node:
    """``ntc.attention``: both products and its softmax in one op."""
    (query, key, value), (heads, kv_heads, scale) = _operands(site.node), site.node.args[3:6]
    assert isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(scale, float)
    name, numerators = site.node.name, site.numerators()
    digits = site.digits((query, heads), (key, kv_heads), (value, kv_heads))
    (w, _), (levels, thresholds) = digits.tables(site.program), numerators.tables(site.program)
    q, k, factor = site.spread(query, key, heads, name)
    operands = ((q, heads, "q"), (k, kv_heads, "k"), (value, kv_heads, "v"))
    trains, steps = zip(*(site.coded(x, n, digits, name, role) for x, n, role in operands), strict=True)
    tables = [site.call(table) for table in (w, levels, thresholds)]
    rest = [heads, kv_heads, scale / factor, *([True] if site.per_token else [])]
    made: Node = site.call(_OPS.coded_attention.default, *trains, *steps, *tables, *rest, name=name)
    return made


def _windowed(site: _Site) -> Node:
    """``ntc.windowed_attention``: both products apart, its softmax on the host between them."""
    query, key, value, heads, kv_heads, scale, window, _ = site.node.args
    name = site.node.name
    scores = _coded_scores(site, query, key, heads, kv_heads, scale, window, f"{name}_scores")
    softmax = site.call(aten.softmax.int, scores, -1, name=f"{name}_softmax")
    return _coded_values(site, softmax, value, heads, kv_heads, window)


def _scores(site: _Site) -> Node:
    """``ntc.causal_scores``."""
    query, key, heads, kv_heads, scale, window = site.node.args
    return _coded_scores(site, query, key, heads, kv_heads, scale, window, site.node.name)


def _values(site: _Site) -> Node:
    """``ntc.weighted_values``."""
    weights, value, heads, kv_heads, window = site.node.args
    return _coded_values(site, weights, value, heads, kv_heads, window)


def _coded_scores(site: _Site, query: Any, key: Any, heads: Any, kv_heads: Any, scale: Any, window: Any, name: str) -> Node:
    digits, stem = site.digits((query, heads), (key, kv_heads)), name.removesuffix("_scores")
    q, k, factor = site.spread(query, key, heads, stem)
    (sq, dq), (sk, dk) = (site.coded(x, n, digits, stem, role) for x, n, role in ((q, heads, "q"), (k, kv_heads, "k")))
    rest = [heads, kv_heads, scale / factor, window, *([True] if site.per_token else [])]
    made: Node = site.call(_OPS.coded_scores.default, sq, sk, dq, dk, site.call(digits.tables(site.program)[0]), *rest, name=name)
    return made


def _coded_values(site: _Site, weights: Any, value: Any, heads: Any, kv_heads: Any, window: Any) -> Node:
    digits, numerators, name = site.digits((value, kv_heads)), site.numerators(), site.node.name
    (w, _), (levels, thresholds) = digits.tables(site.program), numerators.tables(site.program)
    train, step = site.coded(value, kv_heads, digits, name, "v")
    x = site.call(_OPS.key_scale.default, weights, step, heads, kv_heads, name=f"{name}_sized") if site.per_token else weights
    row = site.call(_OPS.token_step.default, x, 1.0 / numerators.most, name=f"{name}_p_step")
    mass = site.call(aten.sum.dim_IntList, x, [-1], True, name=f"{name}_p_sum")
    spikes = site.call(_OPS.digit_neuron.default, x, row, site.call(levels), site.call(thresholds), True, name=f"{name}_p_spikes")
    given = [spikes, train, row, mass, site.call(levels), site.call(w), heads, kv_heads, window, *([] if site.per_token else [step])]
    made: Node = site.call(_OPS.coded_values.default, *given, name=name)
    return made


_FORMS: dict[Any, Callable[[_Site], Node]] = {
    _OPS.attention.default: _whole, _OPS.windowed_attention.default: _windowed, _OPS.causal_scores.default: _scores,
    _OPS.weighted_values.default: _values,
}  # fmt: skip
assert _FORMS.keys() >= SOFTMAX_ATTENTION


def _rows(sample: Tensor, options: Options, groups: int) -> Tensor:
    """Calibration values ``[rows, C]``; steps per token are per head, so each head of a token is a row then."""
    return sample.reshape(-1, sample.shape[-1] // groups) if options.scale == "token" else sample
