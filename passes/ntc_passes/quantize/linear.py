r"""Linear layers: integer weights with one scale per output channel, biases in the units of the sums.

::

    linear(x, W, b)  ~  s_o (sum_c q_oc n_c + round(b_o / s_o)),        x_c = n_c t_c,   W_oc t_c ~ q_oc s_o

The scales t of the input, one number or one per channel, go into the columns of W before it is rounded. What the sum stands for, s, is
left to its reader: neurons take it into their thresholds, everything else requantizes. Where that is all that happens to a sum, on its
way to the residual stream or to the logits, scales are small multiples of one power of two if that costs little: multipliers have few bits.

Behind spikes the train is summed first, and the layer runs once on counts: ``sum_t W s(t) = W sum_t s(t)``.

A scale is at least so large that no sum, and no membrane that adds T of them, can leave 32 bits, whatever the input. At 8 bits that
binds nowhere; at 16 it costs the last bit or two of wide layers.

The bias also takes back the mean error (Nagel et al. 2019, arXiv 1906.04721): mean over the calibration text of the floating-point layer's
result minus that of the integer one, each in its own network.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import PassError
from ntc.meta import module_of, where
from ntc.ops import aten
from ntc.program import op_name
from ntc_passes.quantize.activations import as_activation
from ntc_passes.quantize.compensation import compensated, rounded, weight_scales
from ntc_passes.quantize.fixed_point import integer_dtype, nearest, short_scales
from ntc_passes.quantize.walk import Constant, Value, Work

__all__ = ["linear", "summed"]

_OPS = torch.ops.ntc
_REGISTER = 1 << 30
"""Of a sum or membrane, half of what 32 bits hold: compensated weights may sum to a little more than those that they stand for."""


def linear(work: Work, node: Node) -> Value:
    """Weights, bias and sums of one layer."""
    source, weight, bias = node.args[0], *_weights(work, node)
    x = work[source]
    if x.kind == "train":
        x = _train(work, x, node)
    else:
        assert isinstance(source, Node)
        x = as_activation(work, x, source)
    options = work.at(node)
    scaled = weight * x.scale  # in units of the integers that come in
    moments, mean = _moments(x)
    least = (scaled.abs().sum(1) * x.bound + bias.abs()) / (_REGISTER / _steps_behind(node) - weight.shape[1] * x.bound)
    if not bool((least >= 0).all()):
        raise PassError(
            f"a sum over {weight.shape[1]} inputs of up to {x.bound} does not fit into 32 bits together with the membrane behind it: "
            f"{where(node)}; take fewer activation_bits or time steps"
        )
    least = torch.where(least > 0, least, torch.ones_like(least))  # a row of zeros
    scale = weight_scales(scaled, moments, options.weight_limit, least)
    if _only_rescaled(node):
        scale = short_scales(scale, scaled.abs().sum(1) * x.bound + bias.abs())
    exact = scaled / scale[:, None]
    limit = options.weight_limit
    whole = compensated(exact, moments, limit) if options.error_compensation else rounded(exact, limit)
    offset = bias
    if options.bias_correction:
        offset = work.floating.mean[node] - (whole @ mean) * scale
    prefix = module_of(node) or node.name
    stored = Constant(_name(node, 1, prefix, "weight"), whole.to(integer_dtype(limit)))
    added = Constant(_name(node, 2, prefix, "bias"), nearest(offset / scale).to(torch.int32))
    result, data = work.emit(node, _OPS.integer_linear.default, x, stored, added)
    wrong = (whole - exact) * scale[:, None]
    asked = ((scaled @ moments) * scaled).sum()
    work.notes[node.name] = {
        "weight_bits": options.weight_bits, "weight_scale": [float(scale.min()), float(scale.max())],
        "relative_squared_error": float(((wrong @ moments) * wrong).sum() / asked.clamp(min=1e-300)),
    }  # fmt: skip
    return work.noted(Value(result, "accumulator", scale, data))


def _weights(work: Work, node: Node) -> tuple[Tensor, Tensor]:
    weight = work.constant(node, node.args[1], "the weight of a linear layer")
    given = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    bias = torch.zeros(len(weight), dtype=torch.float64) if given is None else work.constant(node, given, "the bias of a linear layer")
    return weight, bias


def _name(node: Node, position: int, prefix: str, last: str) -> str:
    """Name of a weight or bias: the one that it had, unless it is shared (tied embeddings, which become two tensors)."""
    given = node.args[position] if len(node.args) > position else None
    return str(given.target) if isinstance(given, Node) and len(given.users) == 1 else f"{prefix}.{last}"


def _train(work: Work, train: Value, node: Node) -> Value:
    """The counts that a layer behind spikes runs on."""
    source = node.args[0]
    assert isinstance(source, Node)
    other = next((u for u in node.users if u.target is not _OPS.decode.default), None)
    if other is not None:
        raise PassError(
            f"a layer behind spikes is decoded in the integer grade, and that of {where(node)} goes into {op_name(other.target)} step by "
            "step: leave the program in floating point"
        )
    return summed(work, train, node, f"{source.name}_counts")


def summed(work: Work, train: Value, at: Node, name: str) -> Value:
    """The decoded value of a train: its sum over the steps, standing for the mean."""
    if "summed" not in train.made:
        node, data = work.emit(at, _OPS.decode.default, train, "count", name=name)
        kind = "product" if train.kind == "product" else "activation"
        made = Value(node, kind, train.scale / train.steps, data, bound=train.bound * train.steps)  # type: ignore[arg-type]
        train.made["summed"] = work.noted(made)
    return train.made["summed"]


def _only_rescaled(node: Node) -> bool:
    """Whether a layer's sums, or their mean over the steps, go to the residual stream or are the logits."""
    users = [v for u in node.users for v in (u.users if u.target is _OPS.decode.default else [u])]
    return all(u.op == "output" or u.target is aten.add.Tensor for u in users)


def _steps_behind(node: Node) -> int:
    """What the membrane of the neurons behind a layer adds up to, in sums: T of them, and its start."""
    steps = [u.args[3] for u in node.users if u.target is _OPS.integrate_fire.default]
    return max((s for s in steps if isinstance(s, int)), default=0) + 2


def _moments(x: Value) -> tuple[Tensor, Tensor]:
    """``mean n n^T`` and ``mean n`` over tokens (and steps) of the integers that come in."""
    total, mean, rows = None, None, 0
    for n in x.data:
        flat = n.flatten(0, -2).double()
        rows += len(flat)
        total = flat.T @ flat if total is None else total.addmm_(flat.T, flat)
        mean = flat.sum(0) if mean is None else mean + flat.sum(0)
    assert total is not None and mean is not None
    return total / rows, mean / rows
