r"""Encoder neurons at the input of linear layers: products with weights become sums of weights.

Before::

    %y = linear(%x, W, c)

After, with a step per token (T planes of the phase code; ``2^T`` undoes its unit)::

    %d = ntc.token_step(%x, r / N)               # one comparison per channel: analog
    %s = ntc.encode(%x, %d, T, 'phase')          # spikes T ternary phase
    %i = linear(%s, 2^T W)                       # current: sums and differences of columns
    %v = ntc.decode(%i, 'phase')
    %y = add(mul(%v, %d), c)

With a step that is known in advance (``static``: one number, ``channel``: one per channel) nothing is measured while the network runs
and nothing is multiplied: ``%i = linear(%s, 2^T W diag(d))``, ``%y = add(decode(%i), c)``.

The code ``digits`` has neurons and a layer of its own, which sum what each step is worth (``ntc.ops.digit_neuron``,
``ntc.ops.spike_linear``)::

    %s = ntc.digit_neuron(%x, %d, w, theta)      # spikes T ternary fitted
    %y = ntc.spike_linear(%s, w, W, %d, c)       # or, d known: (%s, w, W diag(d), None, c)

With ``ranges = 2`` normal values and outliers have neurons of their own, each with a range of its own, and the layer is the sum of both
(outlier-aware neurons: LAS): the first hear ``|x| < split``, the others the rest.

    y = sum_c W_c d n_c + c,   |x_c - d n_c| <= d / 2   in range        N = 2^T - 1 (phase), T (count)

so the result is off by at most ``d / 2 sum_c |W_c|``, and at random by about ``d / sqrt(12) |W|``. With ``scale = token`` the range is r
times the largest channel of the token; with ``static`` and ``channel`` r times a percentile of the calibration activations. Linear layers
that read one value share its neurons. SDLLM (arXiv 2604.16475) codes by ``count``, LAS (arXiv 2505.09659) by ``phase``; after ``rotate``
no channel stands out, and few steps do.

Everything else stays analog: norms, the products of attention, softmax, activations, the residual stream. Layers whose module has
``convert = false``, whose input spikes already, or that read no ``[B, L, C]`` value, are listed as missed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from ntc.meta import TYPE, building
from ntc.ops import aten, timed
from ntc.ops.encode import levels_of
from ntc.pipeline import LEFT_ANALOG, Context, Pass, PassResult
from ntc.program import Program
from ntc.spike_type import ANALOG, RateType
from ntc_passes.calibrate import percentile_of, positive_threshold
from ntc_passes.digits import (
    Base,
    Digits,
    check_base_option,
    check_price,
    check_ratio,
    check_scale,
    check_steps,
    learned_base,
    range_of,
    sampled,
)
from ntc_passes.new_weights import NewWeights, constant_weights, times
from ntc_passes.replace_attention import check_percentile, check_switch

__all__ = ["EncodeLinears", "refusal"]

_OPS = torch.ops.ntc


@dataclass(frozen=True)
class Options:
    """Options of ``encode-linears``.

    Attributes:
        steps: T, time steps; of the phase code its planes.
        code: ``digits`` (ternary digits of any base up to 3: 3^T values), ``phase`` (binary, one plane per step: 2^(T+1) - 1 values) or
            ``count`` (2 T + 1 values).
        scale: Where the step is chosen: for each ``token`` while the network runs, or on calibration text for each ``channel`` or once
            (``static``).
        ratio: Range of the code over the largest value (``token``) or the percentile; below 1 large values are clipped.
        percentile: Of the absolute calibration activations; for ``channel`` and ``static``.
        rows: Most tokens of the calibration text that percentiles are taken of.
        base: Of ``digits``: 3 tells the most values, 2 has the fewest spikes per value; ``learned`` = for each site the one with the least
            error on calibration text.
        price: Of ``digits``: squared steps that a spike must be worth; above 0 small values fall silent. With 1 the largest channel of each
            token lies on the last threshold, where rounding decides.
        ranges: Of ``digits``: 2 gives outliers neurons of their own (``channel`` and ``static``).
        split: With two ranges: percentile of the absolute activations from which on a value is an outlier.
        convert: Whether to encode at all: false, set for some modules in an override, leaves their inputs analog.
    """

    steps: int = 5
    code: Literal["digits", "phase", "count"] = "phase"
    scale: Literal["token", "channel", "static"] = "token"
    ratio: float = 1.0
    percentile: float = 100.0
    rows: int = 1024
    base: Base = 3.0
    price: float = 0.0
    ranges: int = 1
    split: float = 99.9
    convert: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "rows"):
            check_steps(name, getattr(self, name))
        if self.code == "digits":
            check_base_option(self.base, self.steps)
        else:
            levels_of(self.code, self.steps)
        check_price(self.price)
        check_scale(self.scale)
        check_ratio(self.ratio)
        check_percentile(self.percentile)
        if self.ranges not in (1, 2) or isinstance(self.ranges, bool):
            raise ValueError(f"ranges must be 1 or 2, got {self.ranges!r}")
        if self.ranges == 2 and (self.code != "digits" or self.scale == "token"):
            raise ValueError("two ranges need code = digits and a scale that is known in advance: static or channel")
        check_percentile(self.split)
        check_switch("convert", self.convert)

    @property
    def samples(self) -> bool:
        """Whether anything is chosen on calibration text."""
        return self.scale != "token" or (self.code == "digits" and self.base == "learned")


class EncodeLinears(Pass):
    """Put ternary encoder neurons in front of every linear layer."""

    name = "encode-linears"
    requires = frozenset({"canonical"})
    provides = frozenset({"spiking", "coded"})
    required = True
    Options = Options

    def run(self, program: Program, context: Context) -> PassResult:
        """Choose static steps first, on the program as it is; then encode layer by layer."""
        chosen, missed = dict[Node, Options](), list[tuple[str, str]]()
        for layer in program.graph.find_nodes(op="call_function", target=aten.linear.default):
            options = self.at(layer, context)
            reason = refusal(layer) if options.convert else LEFT_ANALOG
            if reason:
                missed.append((layer.name, reason))
            else:
                chosen[layer] = options
        wanted: dict[Node, int] = {}
        for layer, options in chosen.items():
            if options.samples:
                source = layer.args[0]
                assert isinstance(source, Node)
                wanted[source] = max(options.rows, wanted.get(source, 0))
        samples = sampled(program, wanted, context, self.name, "scale = token and a fixed base")
        weights, neurons, digits = NewWeights(program, self.name), _Neurons(), _DigitNeurons()
        for number, (layer, options) in enumerate(chosen.items()):
            context.progress(self.name, number, len(chosen))
            if options.code == "digits":
                _encode_digits(program, layer, options, weights, digits, samples)
            else:
                _encode(program, layer, options, weights, neurons, samples)
        untied = weights.untied() if chosen else {}
        notes: dict[str, Any] = {"layers": len(chosen), "encoders": len(neurons) + sum(map(len, digits.values()))} if chosen else {}
        if learned := {site[0].key: site[0].base for (_, options), site in digits.items() if options.base == "learned"}:
            notes["bases"] = learned
        if untied:
            notes["untied"] = untied
        return PassResult(bool(chosen), len(chosen), tuple(missed), notes=notes)


def refusal(layer: Node) -> str:
    """Why a linear layer cannot be driven by neurons that read its input, or an empty string."""
    source = layer.args[0]
    assert isinstance(source, Node)
    kind = source.meta.get(TYPE, ANALOG)
    if timed(kind) or isinstance(kind, RateType):
        return f"its input %{source.name} is {kind} already"
    if source.meta["val"].dim() != 3:
        return f"its input %{source.name} is no [B, L, C] value"
    return constant_weights(layer)


def _static_step(rows: Tensor, options: Options) -> Tensor:
    """d, ``[C]`` or ``[1]``."""
    values = rows if options.scale == "channel" else rows.reshape(-1, 1)
    (top,) = percentile_of(values.abs(), options.percentile)
    return positive_threshold(top) * (options.ratio / levels_of(options.code, options.steps))


_Neurons: TypeAlias = dict[tuple[Node, Options], tuple[Node, Node | None, str]]


def _encode(
    program: Program, layer: Node, options: Options, weights: NewWeights, neurons: _Neurons, samples: dict[Node, Tensor]
) -> None:
    source, matrix = layer.args[0], layer.args[1]
    bias = layer.args[2] if len(layer.args) > 2 else None
    assert isinstance(source, Node) and isinstance(matrix, Node)
    if (source, options) not in neurons:
        neurons[source, options] = _neurons(program, layer, source, options, samples)
    spikes, per_token, step = neurons[source, options]
    unit = 2.0**options.steps if options.code == "phase" else 1.0
    if per_token is not None:
        stored = weights.of(matrix, ("unit", unit), times(unit), layer) if unit != 1 else str(matrix.target)
    else:
        columns = program.tensor(step).detach().double() * unit
        stored = weights.of(matrix, ("step", step, unit), times(columns), layer)
    with building(program.graph, before=layer, stands_for=[layer], by=EncodeLinears.name) as call:
        current = call(aten.linear.default, spikes, call(stored, at=layer), name=layer.name)
        value = call(_OPS.decode.default, current, options.code, name=f"{layer.name}_decoded")
        if per_token is not None:
            value = call(aten.mul.Tensor, value, per_token, name=f"{layer.name}_scaled")
        if isinstance(bias, Node):
            value = call(aten.add.Tensor, value, bias, name=f"{layer.name}_shifted")
    layer.replace_all_uses_with(value)
    program.graph.erase_node(layer)


def _neurons(program: Program, layer: Node, source: Node, options: Options, samples: dict[Node, Tensor]) -> tuple[Node, Node | None, str]:
    """Spikes of a value, its step per token if that is measured, and the name of its step if that is known."""
    with building(program.graph, before=layer, stands_for=[source], by=EncodeLinears.name) as call:
        if options.scale == "token":
            factor = options.ratio / levels_of(options.code, options.steps)
            step = per_token = call(_OPS.token_step.default, source, factor, name=f"{source.name}_step")
            stored = ""
        else:
            stored = program.add_tensor(f"{source.name}.step", _static_step(samples[source], options))
            step, per_token = call(stored), None
        spikes = call(_OPS.encode.default, source, step, options.steps, options.code, name=f"{source.name}_spikes")
    return spikes, per_token, stored


@dataclass(frozen=True)
class _Site:
    """Digit neurons of one value.

    Attributes:
        spikes: Their train.
        weights: Name of w.
        step: Where it is measured: its node.
        known: Where it is known: its name.
        key: Name of the value.
        base: b.
    """

    spikes: Node
    weights: str
    step: Node | None
    known: str
    key: str
    base: float


_DigitNeurons: TypeAlias = dict[tuple[Node, Options], tuple[_Site, ...]]


def _encode_digits(
    program: Program, layer: Node, options: Options, weights: NewWeights, neurons: _DigitNeurons, samples: dict[Node, Tensor]
) -> None:
    source, matrix = layer.args[0], layer.args[1]
    bias = layer.args[2] if len(layer.args) > 2 else None
    assert isinstance(source, Node) and isinstance(matrix, Node)
    if (source, options) not in neurons:
        neurons[source, options] = tuple(_sites(program, layer, source, options, samples.get(source)))
    sites = neurons[source, options]
    stored = [str(matrix.target)] * len(sites)
    for i, site in enumerate(sites):
        if site.known:
            columns = program.tensor(site.known).detach().double()
            stored[i] = weights.of(matrix, ("step", site.known), times(columns), layer, "outliers" if i else "")
    with building(program.graph, before=layer, stands_for=[layer], by=EncodeLinears.name) as call:
        parts = []
        for i, (site, name) in enumerate(zip(sites, stored, strict=True)):
            args = [site.spikes, call(site.weights, at=layer), call(name, at=layer), site.step, None if i else bias]
            while args[-1] is None:
                args.pop()
            parts.append(call(_OPS.spike_linear.default, *args, name=f"{layer.name}_outliers" if i else layer.name))
        value = parts[0] if len(parts) == 1 else call(aten.add.Tensor, *parts, name=f"{layer.name}_both")
    layer.replace_all_uses_with(value)
    program.graph.erase_node(layer)


def _sites(program: Program, layer: Node, source: Node, options: Options, rows: Tensor | None) -> Iterator[_Site]:
    bounds: list[tuple[str, float, float]] = [("", 0.0, 0.0)]
    if options.ranges == 2:
        assert rows is not None
        split = float(range_of(rows, "static", options.split, 1.0))
        bounds = [("", 0.0, split), ("_outlier", split, 0.0)]
    for name, low, high in bounds:
        heard = rows
        if rows is not None and options.ranges == 2:
            size = rows.abs()
            heard = rows * (size < high if high else size >= low)
        top = None if heard is None else range_of(heard, options.scale, 100.0 if name else options.percentile, options.ratio)
        base = options.base
        if base == "learned":
            assert heard is not None and top is not None
            base = learned_base([(heard, top)], options.steps, options.price)
        system = Digits(float(base), options.steps, options.price)
        w, theta = system.tables(program)
        with building(program.graph, before=layer, stands_for=[source], by=EncodeLinears.name) as call:
            step, known = None, ""
            if options.scale == "token":
                at = step = call(_OPS.token_step.default, source, options.ratio / system.most, name=f"{source.name}_step")
            else:
                assert top is not None
                known = program.add_tensor(f"{source.name}{name}.step", top / system.most)
                at = call(known)
            args = [source, at, call(w), call(theta), *([True] if step is not None else [])]
            args += [False, low, high] if options.ranges == 2 else []
            key = f"{source.name}{name}"
            yield _Site(call(_OPS.digit_neuron.default, *args, name=f"{key}_spikes"), w, step, known, key, system.base)
