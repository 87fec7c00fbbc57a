r"""RMSNorm and LayerNorm spelled as arithmetic become one node.

    rms_norm    y = w x / sqrt(mean(x^2) + eps)                                 Zhang and Sennrich 2019
    layer_norm  y = w (x - m) / sqrt(mean((x - m)^2) + eps) + b,   m = mean(x)  Ba et al. 2016

over the last axis, whether that is the width of the stream or a head. Around every reciprocal root the nearest input and the
farthest result are sought between which the graph computes such a norm. Nothing is read off the spelling: w, b and eps are measured
by running it, b at 0, w where ``x^2`` is so large that eps does not count, eps where it does; then the piece of graph and the norm
with these constants are run on numbers of many magnitudes, and have to agree. A constant of the graph that is w or b (also Gemma's
``1 + w``, which is computed from one) is taken as it stands there, so that nothing is rounded twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops import aten
from ntc.probe import evaluate, probe_sizes, shape_at
from ntc.program import Program
from ntc_passes.canonicalize.making import constant, making

__all__ = ["rewrite_norms"]

_ROOTS = frozenset({aten.rsqrt.default, aten.sqrt.default, aten.pow.Tensor_Scalar})
_STEPS = frozenset({
    aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.add.Scalar,
    aten.pow.Tensor_Scalar, aten.square.default, aten.mean.dim, aten.sum.dim_IntList, aten.rsqrt.default, aten.sqrt.default,
    aten.reciprocal.default, aten.to.dtype, aten._to_copy.default, aten.var.correction, aten.var.dim,
})  # fmt: skip
_MOST_STEPS = 16  # LayerNorm in the longest spelling that we have seen has eleven

_SCALES = (1e3, 1.0, 3e-2, 1e-3, 1e-5)
"""Magnitudes of the probes: from where eps does not count to where nothing else does."""

_RTOL = 1e-6
"""Weights and casts of the graph are in float32; an eps that is 1 % off moves the smallest probe by 5e-3."""


@dataclass(frozen=True)
class _Norm:
    """A norm as measured: its kind, and its constants over the last axis, in float64."""

    centred: bool
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.weight * _normal(x, self.centred, self.eps) + self.bias


def rewrite_norms(program: Program) -> tuple[int, list[tuple[Node, str]]]:
    """RMSNorm and LayerNorm spelled as arithmetic; returns how many, and the roots that are none with the reason."""
    count, missed = 0, list[tuple[Node, str]]()
    for root in list(program.graph.nodes):
        if not _is_root(root):
            continue
        if _rewrite(program, root):
            count += 1
        else:
            missed.append((root, "its root is not that of an RMSNorm or LayerNorm over the last axis"))
    program.graph.eliminate_dead_code()
    return count, [(node, reason) for node, reason in missed if node.users]


def _is_root(node: Node) -> bool:
    """A root of one number per row of an activation, as norms have it."""
    value = node.meta.get("val")
    if node.target not in _ROOTS or not isinstance(value, Tensor) or value.dim() < 3 or value.shape[-1] != 1:
        return False
    return node.target is not aten.pow.Tensor_Scalar or abs(float(node.args[1])) == 0.5  # type: ignore[arg-type]


def _rewrite(program: Program, root: Node) -> bool:
    results, sources = _reached(root, forward=True), _reached(root, forward=False)
    for result in reversed(results):
        found = _norm_before(program, sources, result)
        if found is None:
            continue
        source, norm = found
        with making(program, result, [result, root]) as call:
            parts = _constants_between(program, source, result)
            width = [int(result.meta["val"].shape[-1])]
            weight = _stored(program, norm.weight, 1.0, "weight", result, parts, call)
            if norm.centred:
                bias = _stored(program, norm.bias, 0.0, "bias", result, parts, call)
                made = call(aten.layer_norm.default, source, width, weight, bias, norm.eps, False)
            else:
                made = call(aten.rms_norm.default, source, width, weight, norm.eps)
        result.replace_all_uses_with(made)
        program.graph.eliminate_dead_code()
        return True
    return False


def _norm_before(program: Program, sources: list[Node], result: Node) -> tuple[Node, _Norm] | None:
    """Of what the result is a norm, and which.

    The nearest source: in front of it something may be scaled, which would be a norm of another eps. An ``x - mean(x)`` is a source too,
    of an RMSNorm and of a LayerNorm, and x itself is the one that is wanted: then the farthest one with that eps.
    """
    alike = [source for source in sources if _alike(program, source, result)]
    for centred in (True, False):
        found: tuple[Node, _Norm] | None = None
        for source in alike:
            norm = _measured(program, source, result, centred)
            if norm is not None and (found is None or norm.eps == found[1].eps):
                found = source, norm
            if found is not None and not centred:
                break
        if found is not None:
            return found
    return None


def _reached(root: Node, forward: bool) -> list[Node]:
    """Nodes from which the root, or which from the root, is reached by the steps that norms are spelled in, nearest first."""
    found, frontier = dict[Node, None](), [root]
    while frontier and len(found) < _MOST_STEPS:
        node = frontier.pop(0)
        for near in node.users if forward else node.all_input_nodes:
            if near in found or near.op != "call_function":
                continue
            if near.target in _STEPS:
                if forward or not _adds_activations(near):  # in front of a sum there is another layer, and not the norm
                    frontier.append(near)
            elif forward:
                continue
            found[near] = None
    return list(found)


def _adds_activations(node: Node) -> bool:
    """Whether a node adds two values that depend on the input, as a residual stream does."""
    return node.target is aten.add.Tensor and sum(a.op == "call_function" for a in node.all_input_nodes) > 1


def _alike(program: Program, source: Node, result: Node) -> bool:
    a, b = source.meta.get("val"), result.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dtype != b.dtype or not a.is_floating_point() or a.dim() != b.dim():
        return False
    return isinstance(a.shape[-1], int) and a.shape[-1] > 1 and shape_at(program, source, (3, 7)) == shape_at(program, result, (3, 7))


def _normal(x: Tensor, centred: bool, eps: float) -> Tensor:
    centre = x - x.mean(-1, keepdim=True) if centred else x
    return centre / (centre.square().mean(-1, keepdim=True) + eps).sqrt()


def _measured(program: Program, source: Node, result: Node, centred: bool) -> _Norm | None:
    """The norm that the graph computes between two nodes, proved by running it; None if it computes something else."""
    generator, probes = torch.Generator().manual_seed(0), dict[tuple[int, int], Tensor]()
    for sizes in probe_sizes(program):
        probes[sizes] = torch.randn(shape_at(program, source, sizes), generator=generator, dtype=torch.float64)

    def run(x: Tensor, sizes: tuple[int, int]) -> Tensor:
        y: Any = evaluate(program, result, {source: x}, sizes)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            raise LookupError
        return y.double()

    try:
        norm = _guess(run, *next((x, sizes) for sizes, x in probes.items()), centred)
        if norm is not None and all(_agree(norm(scale * x), run(scale * x, sizes)) for sizes, x in probes.items() for scale in _SCALES):
            return norm
    except (LookupError, RuntimeError, TypeError, ValueError, IndexError):
        return None
    return None


def _guess(run: Any, x: Tensor, sizes: tuple[int, int], centred: bool) -> _Norm | None:
    """Constants of the norm if it is one; what it is otherwise is found out by who asks."""
    width = x.shape[-1]
    bias = run(torch.zeros_like(x), sizes).reshape(-1, width)[0]
    large, normal = run(_SCALES[0] * x, sizes) - bias, _normal(_SCALES[0] * x, centred, 0.0)
    weight = (normal * large).reshape(-1, width).sum(0) / normal.square().reshape(-1, width).sum(0)
    small = _SCALES[3] * x
    centre = small - small.mean(-1, keepdim=True) if centred else small
    variance, expected = centre.square().mean(-1), weight * _normal(small, centred, 0.0)
    shrunk = ((run(small, sizes) - bias) * expected).sum(-1) / expected.square().sum(-1)  # sqrt(v / (v + eps))
    eps = float((variance * (shrunk**-2 - 1)).median())
    if not eps > 0 or not bool(weight.isfinite().all() & bias.isfinite().all()) or (bool(bias.any()) and not centred):
        return None  # an RMSNorm has no bias: adding one is another operation
    eps = float(f"{eps:.5g}")  # as people write it; what is between does not show in float32
    large = _SCALES[0] * x  # the weight once more, now that eps is known
    normal = _normal(large, centred, eps)
    weight = (normal * (run(large, sizes) - bias)).reshape(-1, width).sum(0) / normal.square().reshape(-1, width).sum(0)
    return _Norm(centred, weight, bias, eps)


def _agree(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=_RTOL, atol=_RTOL * float(b.abs().max()))


def _constants_between(program: Program, source: Node, result: Node) -> list[tuple[Node, Tensor]]:
    """Constants that come in between two nodes, with their values."""
    found, seen, frontier = list[tuple[Node, Tensor]](), {source}, [result]
    while frontier:
        node = frontier.pop()
        if node in seen:
            continue
        seen.add(node)
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.numel() > 1:
            try:
                found.append((node, evaluate(program, node, {}, (3, 7))))
                continue  # what it is made of is no part of the norm
            except LookupError:
                pass
        frontier.extend(node.all_input_nodes)
    return found


def _stored(
    program: Program, measured: Tensor, neutral: float, what: str, result: Node, constants: list[tuple[Node, Tensor]], call: Any
) -> Node | None:
    """The node of a weight or bias ``[D]``: the graph's own, what it computes from one, or the measured one."""
    dtype = result.meta["val"].dtype
    for node, value in constants:
        if value.numel() == measured.numel() and value.dtype == dtype and _agree(value.reshape(-1).double(), measured):
            if node.op == "get_attr" and value.dim() == 1:
                return node
            return call(constant(program, f"{_owner(node) or what}_t", value.reshape(-1)), at=result)  # type: ignore[no-any-return]
    if _agree(measured, torch.full_like(measured, neutral)):
        return None
    name = next((_owner(node) for node, _ in constants if _owner(node)), what)
    return call(constant(program, f"{name}_t", measured.to(dtype)), at=result)  # type: ignore[no-any-return]


def _owner(node: Node) -> str:
    """Name of the tensor that a constant is computed from; the mark ``_t`` behind it says that it is not that one."""
    frontier = [node]
    while frontier:
        one = frontier.pop(0)
        if one.op == "get_attr":
            return str(one.target)
        frontier.extend(one.all_input_nodes)
    return ""
