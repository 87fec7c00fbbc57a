r"""The activation of a feed-forward block becomes integrate-and-fire neurons (NeurTransformer step 2).

Before::

    %h = linear(%x, fc.weight, fc.bias);  %a = gelu(%h);  %y = linear(%a, proj.weight, proj.bias)

After (a rate stands where insert-neurons puts spikes)::

    %h = linear(%x, fc.weight, fc.bias - b)
    %r = ntc.if_rate(%h, threshold, False)            # clip(h / theta, 0, 1)
    %a = mul(%r, value)                               # value = a theta
    %y = linear(%a, proj.weight, proj.bias + proj.weight c)

An IF neuron codes a clipped ReLU. For a ReLU network that is all (a = 1, b = c = 0). GELU is not ReLU; ``activation``
chooses what stands for it:

- ``fit`` (default): per channel the shifted, scaled and offset ReLU that is nearest on the calibration activations,
  ``gelu(x) ~ a clip(x - b, 0, theta) + c``: least squares in a and c in closed form, b from a grid. Shift and offset are
  folded into the biases on either side, so it costs nothing. On the reference GPT-2 most of the loss of plain ReLU goes.
- ``relu``: a = 1, b = c = 0, the literal replacement, for those who fine-tune.

theta is a percentile of the calibration activations ``x - b`` per channel (Rueckauer et al. 2017). What remains is the
rounding to T + 1 levels, which falls with T, and the float limit above, which does not: the program before
insert-neurons *is* that float limit and can be evaluated.

``refit`` fits the linear layer behind to the T-step spikes of the calibration text (``ntc_passes.refit``): its inputs are
``a theta`` times the firing rates, its targets the results of the original layer. That costs nothing either, and takes back more
than half of what coding costs; the float limit is then that of a layer fitted to T steps.

An activation whose module has ``convert = false`` stays as it is and is listed as missed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from ntc.errors import PassError
from ntc.meta import NEURON, STATS, NeuronSpec, block_of, building, where
from ntc.ops import aten
from ntc.pipeline import LEFT_ANALOG, Context, Pass, PassResult
from ntc.program import Program
from ntc_passes.calibrate import percentile_of, positive_threshold, threshold_from
from ntc_passes.refit import Refit, refit
from ntc_passes.replace_attention import check_percentile, check_steps, check_switch

__all__ = ["ActivationFit", "ConvertFfn", "fit_relu"]


_ACTIVATIONS = frozenset({aten.gelu.default, aten.relu.default, aten.silu.default})

_ALONE = "the recipe ssa-only converts the attention alone"


@dataclass(frozen=True)
class Options:
    """Options of ``convert-ffn``.

    Attributes:
        steps: T, time steps of the neurons.
        percentile: Percentile of the activations that becomes the threshold.
        activation: What stands for GELU: ``fit`` or ``relu``.
        refit: Whether to fit the layer behind to the spikes. A layer that several activations share stays as it is.
        convert: Whether to convert at all: false, set for some modules in an override, leaves their activation.
    """

    steps: int = 4
    percentile: float = 99.9
    activation: Literal["fit", "relu"] = "fit"
    refit: bool = False
    convert: bool = True

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_percentile(self.percentile)
        check_switch("refit", self.refit)
        check_switch("convert", self.convert)
        if self.activation not in ("fit", "relu"):
            raise ValueError(f"activation must be 'fit' or 'relu', got {self.activation!r}")


@dataclass(frozen=True)
class ActivationFit:
    """``f(x) ~ gain * clip(x - shift, 0, threshold) + offset`` per channel; all ``[C]``."""

    threshold: Tensor
    gain: Tensor
    shift: Tensor
    offset: Tensor
    residual: float


class ConvertFfn(Pass):
    """Replace the activation of every feed-forward block by IF neurons."""

    name = "convert-ffn"
    requires = frozenset({"canonical", "calibrated"})
    provides = frozenset({"neurons-annotated"})
    removes = frozenset({"thresholds-folded", "spiking"})  # rates again, until insert-neurons
    required = True
    Options = Options

    def run(self, program: Program, context: Context) -> PassResult:
        """Fit and rewrite every linear - activation - linear."""
        sites, missed, residuals, refits = 0, [], {}, {}
        activations = [n for n in program.graph.nodes if n.target in _ACTIVATIONS]
        total = len(activations)
        for node in activations:
            options = self.at(node, context)
            reason = _refusal(node) if options.convert else LEFT_ANALOG
            if reason:
                missed.append((node.name, reason))
                continue
            context.progress(self.name, sites, total)
            place = block_of(node) or node.name
            residuals[place], better = _rewrite(program, node, options)
            if better:
                refits[place] = [{"before": r.before, "after": r.after} for r in better]
            sites += 1
        notes: dict[str, Any] = {"relative_squared_error": residuals} if sites else {}
        if refits:
            notes["refit_squared_error"] = refits
        return PassResult(sites > 0, sites, tuple(missed), notes=notes)


def _refusal(node: Node) -> str:
    """Why an activation is not that of a feed-forward block, or an empty string."""
    if any(_multiplies(user, node) for user in node.users):
        return f"it gates another projection (SwiGLU, GeGLU), and spikes times real values are no spikes; {_ALONE}"
    if node.target is aten.silu.default:
        return f"it is a SiLU, for which no neuron is fitted; {_ALONE}"
    before = node.args[0]
    if not isinstance(before, Node) or before.target is not aten.linear.default:
        return "its input is not the result of a linear layer"
    if len(before.users) > 1:
        return f"its pre-activation %{before.name} is used elsewhere too"
    after = list(node.users)
    if not after or any(u.target is not aten.linear.default or u.args[0] is not node for u in after):
        return "its result goes elsewhere than into a linear layer"
    for part in (a for linear in (before, *after) for a in linear.args[1:3]):
        if isinstance(part, Node) and part.op != "get_attr":
            return f"%{part.name}, a weight or bias of the layers beside it, is computed and not a constant"
    if STATS not in before.meta:
        raise PassError(f"no calibration statistics at {where(before)}: run calibrate right before convert-ffn")
    return ""


def _multiplies(user: Node, gate: Node) -> bool:
    """Whether it is the gate times a value that is no constant."""
    return user.target is aten.mul.Tensor and any(isinstance(a, Node) and a is not gate and a.op != "get_attr" for a in user.args)


def fit_relu(rows: Tensor, target: Tensor, percentile: float, shifts: Tensor) -> ActivationFit:
    """Nearest ``a clip(x - b, 0, theta) + c`` to the target, per channel.

    For each b: theta = percentile of ``max(x - b, 0)``, then with u = clip(x - b, 0, theta) the least-squares solution is
    ``a = cov(u, y) / var(u)``, ``c = mean(y) - a mean(u)``; the b with the least squared error wins.

    Args:
        rows: Pre-activations x, ``[rows, C]``.
        target: Activations y, ``[rows, C]``.
        percentile: In (0, 100].
        shifts: Candidates for b, ``[K]``.

    Returns:
        The fit; channels that never vary get a = 1, c = mean(y).
    """
    x, y = rows.double(), target.double()
    best: dict[str, Tensor] = {}
    error = torch.full((x.shape[1],), torch.inf, dtype=torch.float64)
    candidates = shifts.tolist()
    tops = percentile_of(x, percentile, [lambda v, b=b: (v - b).clamp(min=0) for b in candidates])  # type: ignore[misc]
    for b, top in zip(candidates, tops, strict=True):
        theta = positive_threshold(top)
        u = torch.minimum((x - b).clamp(min=0), theta)
        mean_u, mean_y = u.mean(0), y.mean(0)
        variance = (u * u).mean(0) - mean_u**2
        covariance = (u * y).mean(0) - mean_u * mean_y
        flat = variance <= 1e-12
        a = torch.where(flat, torch.ones_like(variance), (covariance / variance.clamp(min=1e-12)).clamp(min=0))
        c = mean_y - a * mean_u
        e = ((a * u + c - y) ** 2).mean(0)
        found = {"threshold": theta, "gain": a, "shift": torch.full_like(a, b), "offset": c}
        better = e < error
        best = {k: torch.where(better, v, best.get(k, v)) for k, v in found.items()}
        error = torch.where(better, e, error)
    dtype = rows.dtype
    relative = float(error.sum() / (y * y).mean(0).sum().clamp(min=1e-30))
    return ActivationFit(**{k: v.to(dtype) for k, v in best.items()}, residual=relative)


# Half a GELU's transition on either side of zero; finer steps change the error in the fourth digit.
_SHIFTS = torch.linspace(-1.0, 0.75, 15)


def _activation(node: Node, rows: Tensor) -> Tensor:
    """What the node gives for pre-activations ``[N, C]``."""
    if node.target is aten.relu.default:
        return functional.relu(rows)
    return functional.gelu(rows, approximate=str(node.kwargs.get("approximate", "none")))


def _fit(node: Node, rows: Tensor, options: Options) -> ActivationFit:
    target = _activation(node, rows)
    if options.activation == "fit" and node.target is not aten.relu.default:
        return fit_relu(rows, target, options.percentile, _SHIFTS)
    theta = threshold_from(rows, options.percentile, signed=False)
    error = (torch.minimum(rows.clamp(min=0), theta) - target).pow(2).mean() / target.pow(2).mean().clamp(min=1e-30)
    zero = torch.zeros_like(theta)
    return ActivationFit(theta, torch.ones_like(theta), zero, zero, float(error))


def _rewrite(program: Program, node: Node, options: Options) -> tuple[float, list[Refit]]:
    """Returns the error of the fit, and how much nearer the layers behind were brought."""
    before = node.args[0]
    assert isinstance(before, Node)
    rows: Tensor = before.meta.pop(STATS)["rows"]  # used once; in a large network the samples take gigabytes
    fit = _fit(node, rows, options)
    users = list(node.users)
    refits = {user: found for user in users if options.refit and (found := _refitted(program, node, user, rows, fit, options.steps))}
    name = str(before.args[1].target).removesuffix(".weight")  # type: ignore[union-attr]
    with building(program.graph, before=node, stands_for=[before, node], by=ConvertFfn.name) as call:
        current = before
        if bool(fit.shift.any()):
            bias = _bias(program, before) - fit.shift
            stored = call(program.add_tensor(f"{name}.bias", bias))
            current = call(aten.linear.default, before.args[0], before.args[1], stored, name=before.name)
        theta = call(program.add_tensor(f"{name}.threshold", fit.threshold))
        rate = call(torch.ops.ntc.if_rate.default, current, theta, False, at=node, name=f"{node.name}_rate")
        rate.meta[NEURON] = NeuronSpec(steps=options.steps, role="ffn")
        value = call(program.add_tensor(f"{name}.value", fit.gain * fit.threshold), at=node)
        scaled = call(aten.mul.Tensor, rate, value, at=node, name=f"{node.name}_value")
    for user in users:
        if user in refits:
            target = str(user.args[1].target).removesuffix(".weight")  # type: ignore[union-attr]
            with building(program.graph, before=user, stands_for=[user], by=ConvertFfn.name) as call:
                weight, bias = refits[user].weight, refits[user].bias
                user.args = (
                    scaled, call(program.add_tensor(f"{target}.weight", weight)), call(program.add_tensor(f"{target}.bias", bias)),
                )  # fmt: skip
        elif bool(fit.offset.any()):
            weight = program.tensor(user.args[1])  # type: ignore[arg-type]
            bias = (_bias(program, user).double() + weight.detach().double() @ fit.offset.double()).to(weight.dtype)
            target = str(user.args[1].target).removesuffix(".weight")  # type: ignore[union-attr]
            with building(program.graph, before=user, stands_for=[user], by=ConvertFfn.name) as call:
                user.args = (scaled, user.args[1], call(program.add_tensor(f"{target}.bias", bias)))
        else:
            user.update_arg(0, scaled)
    program.graph.erase_node(node)
    return fit.residual, list(refits.values())


def _refitted(program: Program, node: Node, user: Node, rows: Tensor, fit: ActivationFit, steps: int) -> Refit | None:
    """The layer behind, fitted to the spikes of ``rows``."""
    stored = user.args[1]
    assert isinstance(stored, Node)
    readers = [n for n in program.graph.nodes if n.op == "get_attr" and n.target == stored.target for _ in n.users]
    if len(readers) > 1:
        return None
    start = torch.full_like(fit.threshold, NeuronSpec(steps=steps, role="ffn").v0)
    spikes = torch.ops.ntc.integrate_fire(rows - fit.shift, fit.threshold, start, steps, False, False, "atan", 1.0)
    values = spikes.sum(0) * (fit.gain * fit.threshold / steps)
    weight = program.tensor(stored)
    return refit(values, weight, functional.linear(_activation(node, rows), weight, _bias(program, user)))


def _bias(program: Program, linear: Node) -> Tensor:
    """Bias of a linear layer, zeros if it has none."""
    if len(linear.args) > 2 and isinstance(linear.args[2], Node):
        return program.tensor(linear.args[2]).detach()
    weight = program.tensor(linear.args[1])  # type: ignore[arg-type]
    return torch.zeros(weight.shape[0], dtype=weight.dtype)
