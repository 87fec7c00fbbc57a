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

    y = sum_c W_c d n_c + c,   |x_c - d n_c| <= d / 2   in range        N = 2^T - 1 (phase), T (count)

so the result is off by at most ``d / 2 sum_c |W_c|``, and at random by about ``d / sqrt(12) |W|``. With ``scale = token`` the range is r
times the largest channel of the token; with ``static`` and ``channel`` r times a percentile of the calibration activations. Linear layers
that read one value share its neurons. SDLLM (arXiv 2604.16475) codes by ``count``, LAS (arXiv 2505.09659) by ``phase``; after ``rotate``
no channel stands out, and few steps do.

Everything else stays analog: norms, the products of attention, softmax, activations, the residual stream. Layers whose module has
``convert = false``, whose input spikes already, or that read no ``[B, L, C]`` value, are listed as missed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import PassError
from ntc.meta import TYPE, building
from ntc.ops import aten, timed
from ntc.ops.encode import levels_of
from ntc.pipeline import LEFT_ANALOG, Calibration, Context, Pass, PassResult
from ntc.program import Program, check_ids, interpret
from ntc.spike_type import ANALOG, RateType
from ntc_passes.calibrate import percentile_of, positive_threshold
from ntc_passes.new_weights import NewWeights, constant_weights
from ntc_passes.replace_attention import check_percentile, check_switch

__all__ = ["EncodeLinears"]

_OPS = torch.ops.ntc


@dataclass(frozen=True)
class Options:
    """Options of ``encode-linears``.

    Attributes:
        steps: T, time steps; of the phase code its planes.
        code: ``phase`` (binary, one plane per step: 2^(T+1) - 1 values) or ``count`` (2 T + 1 values).
        scale: Where the step is chosen: for each ``token`` while the network runs, or on calibration text for each ``channel`` or once
            (``static``).
        ratio: Range of the code over the largest value (``token``) or the percentile; below 1 large values are clipped.
        percentile: Of the absolute calibration activations; for ``channel`` and ``static``.
        rows: Most tokens of the calibration text that percentiles are taken of.
        convert: Whether to encode at all: false, set for some modules in an override, leaves their inputs analog.
    """

    steps: int = 5
    code: Literal["phase", "count"] = "phase"
    scale: Literal["token", "channel", "static"] = "token"
    ratio: float = 1.0
    percentile: float = 100.0
    rows: int = 1024
    convert: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "rows"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        levels_of(self.code, self.steps)
        if self.scale not in ("token", "channel", "static"):
            raise ValueError(f"scale must be 'token', 'channel' or 'static', got {self.scale!r}")
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 < self.ratio < float("inf"):
            raise ValueError(f"ratio must be a positive number, got {self.ratio!r}")
        check_percentile(self.percentile)
        check_switch("convert", self.convert)


class EncodeLinears(Pass):
    """Put ternary encoder neurons in front of every linear layer."""

    name = "encode-linears"
    requires = frozenset({"canonical"})
    provides = frozenset({"spiking"})
    required = True
    Options = Options

    def run(self, program: Program, context: Context) -> PassResult:
        """Choose static steps first, on the program as it is; then encode layer by layer."""
        chosen, missed = dict[Node, Options](), list[tuple[str, str]]()
        for layer in program.graph.find_nodes(op="call_function", target=aten.linear.default):
            options = self.at(layer, context)
            reason = _refusal(layer) if options.convert else LEFT_ANALOG
            if reason:
                missed.append((layer.name, reason))
            else:
                chosen[layer] = options
        samples = _samples(program, chosen, context)
        weights, neurons = NewWeights(program, self.name), _Neurons()
        for number, (layer, options) in enumerate(chosen.items()):
            context.progress(self.name, number, len(chosen))
            _encode(program, layer, options, weights, neurons, samples)
        untied = weights.untied() if chosen else {}
        notes: dict[str, Any] = {"layers": len(chosen), "encoders": len(neurons)} if chosen else {}
        if untied:
            notes["untied"] = untied
        return PassResult(bool(chosen), len(chosen), tuple(missed), notes=notes)


def _refusal(layer: Node) -> str:
    """Why a linear layer cannot be driven by encoders, or an empty string."""
    source = layer.args[0]
    assert isinstance(source, Node)
    kind = source.meta.get(TYPE, ANALOG)
    if timed(kind) or isinstance(kind, RateType):
        return f"its input %{source.name} is {kind} already"
    if source.meta["val"].dim() != 3:
        return f"its input %{source.name} is no [B, L, C] value"
    return constant_weights(layer)


def _samples(program: Program, chosen: dict[Node, Options], context: Context) -> dict[Node, Tensor]:
    """Absolute activations ``[rows, C]`` of some tokens in front of the layers that have a step known in advance."""
    wanted: dict[Node, int] = {}
    for layer, options in chosen.items():
        if options.scale != "token":
            source = layer.args[0]
            assert isinstance(source, Node)
            wanted[source] = max(options.rows, wanted.get(source, 0))
    if not wanted:
        return {}
    calibration = context.calibration
    if calibration is None or calibration.tokens == 0:
        raise PassError(
            "encode-linears chooses static steps on calibration text: give --calibration FILE or a Calibration in the context, or choose "
            "scale = token"
        )
    return _run(program, wanted, calibration, context)


def _run(program: Program, wanted: dict[Node, int], calibration: Calibration, context: Context) -> dict[Node, Tensor]:
    for batch in calibration.batches:
        check_ids(batch, program.info)
    order = torch.randperm(calibration.tokens, generator=torch.Generator().manual_seed(0))
    keep, first = order[: max(wanted.values())].sort().values, 0
    parts: dict[Node, list[Tensor]] = {source: [] for source in wanted}
    last = max(wanted, key=list(program.graph.nodes).index)
    with torch.no_grad():
        for number, batch in enumerate(calibration.batches):
            context.progress("measure ranges", number, len(calibration.batches))
            rows = keep[(keep >= first) & (keep < first + batch.numel())] - first
            first += batch.numel()
            if not len(rows):
                continue

            def visit(node: Node, args: tuple[Any, ...], value: Any, rows: Tensor = rows) -> None:
                if node in parts:
                    parts[node].append(value.flatten(0, -2)[rows].abs())

            interpret(program, batch, visit, last=last)
    return {source: torch.cat(found)[: wanted[source]] for source, found in parts.items()}


def _static_step(rows: Tensor, options: Options) -> Tensor:
    """d, ``[C]`` or ``[1]``."""
    values = rows if options.scale == "channel" else rows.reshape(-1, 1)
    (top,) = percentile_of(values, options.percentile)
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
        stored = weights.of(matrix, ("unit", unit), lambda w: w * unit, layer) if unit != 1 else str(matrix.target)
    else:
        columns = program.tensor(step).detach().double() * unit
        stored = weights.of(matrix, ("step", step, unit), lambda w: w * columns, layer)
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
