r"""Fold the gains of norms into the linear layers behind them, and turn LayerNorm into RMSNorm.

Before (a GPT-2 block; those of Llama have RMSNorms)::

    %n = layer_norm(%x, [C], gain, bias, eps)
    %q = linear(%n, W, c)

After::

    %n = rms_norm(%x, [C], None, eps)
    %q = linear(%n, W diag(gain), c + W bias)

Gains and biases: ``W (g * n + b) + c = (W diag(g)) n + (c + W b)``, for every linear layer that reads the norm. A weight that something
else uses too, as an embedding that is tied to the head, is untied: the new one is a tensor of its own, and the history says which.

Means: ``layer_norm(x) = rms_norm(x - mean(x))``, and the mean of the residual stream is zero if everything written into it has mean
zero. So the mean is taken off every row of the embeddings and off what every output projection adds (SliceGPT, arXiv 2401.15024, QuaRot,
arXiv 2404.00456)::

    E' = E (I - 11^T / C),   W' = (I - 11^T / C) W,   c' = c - mean(c)

exact if the stream is read by LayerNorms only, because those do not see a mean; ``centre = false`` leaves it. After it a
norm has no direction of its own, so the stream may be rotated.

Left alone, with the reason: a norm that is read by something else than linear layers (norms of queries and keys, norms behind a layer
as in Gemma 2 and OLMo 2), weights that are computed, a stream whose mean somebody sees. Computed in float64, stored in the weight's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from ntc.meta import building
from ntc.ops import aten
from ntc.pipeline import Context, Pass, PassResult
from ntc.program import Program
from ntc_passes.new_weights import NewWeights, constant_weights
from ntc_passes.replace_attention import check_switch
from ntc_passes.residual import Stream, is_norm_of_stream, streams

__all__ = ["FoldNorms"]

_NORMS = (aten.rms_norm.default, aten.layer_norm.default)


@dataclass(frozen=True)
class Options:
    """Options of ``fold-norms``.

    Attributes:
        centre: Whether to fold the means of LayerNorms into what writes the residual stream, so that they become RMSNorms.
    """

    centre: bool = True

    def __post_init__(self) -> None:
        check_switch("centre", self.centre)


class FoldNorms(Pass):
    """Fold gains, biases and means of norms into the neighbouring linear layers."""

    name = "fold-norms"
    requires = frozenset({"canonical"})
    provides = frozenset({"norms-folded"})
    removes = frozenset({"calibrated"})  # samples are kept on nodes, and those of the folded layers are new
    exact = True
    Options = Options

    def run(self, program: Program, context: Context) -> PassResult:
        """Gains first, then means."""
        weights = NewWeights(program, self.name)
        sites, missed = 0, list[tuple[str, str]]()
        for node in list(program.graph.nodes):
            if node.target not in _NORMS or (_gain(node) is None and _bias(node) is None):
                continue
            if reason := _not_foldable(node):
                missed.append((node.name, reason))
            else:
                _fold(program, node, weights)
                sites += 1
        for stream in streams(program) if self.options.centre else ():
            norms = [n for n, _ in stream.readers if n.target is aten.layer_norm.default and _bias(n) is None]
            if not norms:
                continue
            if reason := _mean_is_seen(stream):
                missed += [(norm.name, reason) for norm in norms]
            else:
                _centre(program, stream, norms, weights)
                sites += len(norms)
        untied = weights.untied() if sites else {}
        return PassResult(sites > 0, sites, tuple(missed), notes={"untied": untied} if untied else {})


def _argument(node: Node, position: int) -> Node | None:
    value = node.args[position] if len(node.args) > position else None
    return value if isinstance(value, Node) else None


def _gain(norm: Node) -> Node | None:
    return _argument(norm, 2)


def _bias(norm: Node) -> Node | None:
    return _argument(norm, 3) if norm.target is aten.layer_norm.default else None


def _eps(norm: Node) -> float | None:
    at = 4 if norm.target is aten.layer_norm.default else 3
    default = 1e-5 if norm.target is aten.layer_norm.default else None
    value = norm.args[at] if len(norm.args) > at else default
    return None if value is None else float(value)  # type: ignore[arg-type]


def _not_foldable(norm: Node) -> str:
    """Why the gain of a norm cannot be folded, or an empty string."""
    if not is_norm_of_stream(norm):
        return "it norms single heads, and what follows is no linear layer"
    for constant in (_gain(norm), _bias(norm)):
        if constant is not None and constant.op != "get_attr":
            return f"%{constant.name}, its gain or bias, is computed and not a constant"
    others = [u for u in norm.users if u.target is not aten.linear.default or u.args[0] is not norm]
    if others or not norm.users:
        return f"its result goes into {'%' + others[0].name if others else 'nothing'}, not only into linear layers"
    return next((reason for user in norm.users if (reason := constant_weights(user))), "")


def _fold(program: Program, norm: Node, weights: NewWeights) -> None:
    gain, bias = _gain(norm), _bias(norm)
    g = program.tensor(gain).detach().double() if gain is not None else None
    b = program.tensor(bias).detach().double() if bias is not None else None
    change = (str(gain and gain.target), str(bias and bias.target))
    with building(program.graph, before=norm, stands_for=[norm], by=FoldNorms.name) as call:
        if norm.target is aten.rms_norm.default:
            bare = call(aten.rms_norm.default, norm.args[0], norm.args[1], None, _eps(norm), name=norm.name)
        else:
            bare = call(aten.layer_norm.default, norm.args[0], norm.args[1], None, None, _eps(norm), False, name=norm.name)
    bare.meta["val"] = norm.meta["val"]
    for layer in list(norm.users):
        matrix, offset = layer.args[1], _argument(layer, 2)
        assert isinstance(matrix, Node)
        stored, added = str(matrix.target), str(offset.target) if offset is not None else None
        if b is not None:
            shift = program.tensor(matrix).detach().double() @ b
            if offset is not None:
                added = weights.of(offset, (*change, stored), lambda c, shift=shift: c + shift, layer)  # type: ignore[misc]
            else:
                added = weights.of(matrix, (*change, "bias"), lambda _, shift=shift: shift, layer, leaf="bias")  # type: ignore[misc]
        if g is not None:
            stored = weights.of(matrix, change, lambda w: w * g, layer)
        weights.linear(layer, bare, stored, added, [norm])
    program.graph.erase_node(norm)


def _mean_is_seen(stream: Stream) -> str:
    """Why the mean of a stream cannot be taken off, or an empty string."""
    for reader, value in stream.readers:
        if reader.target is not aten.layer_norm.default or reader.args[0] is not value or not is_norm_of_stream(reader):
            return f"%{reader.name} reads the residual stream as it is, and would see its mean taken off"
    for writer in stream.writers:
        if writer.target not in (aten.linear.default, aten.embedding.default):
            return f"%{writer.name} writes into the residual stream, and is no linear layer or embedding that could have mean zero"
        if reason := constant_weights(writer):
            return f"%{writer.name} writes into the residual stream: {reason}"
    return ""


def _centre(program: Program, stream: Stream, norms: list[Node], weights: NewWeights) -> None:
    for writer in stream.writers:
        table = writer.args[0 if writer.target is aten.embedding.default else 1]
        assert isinstance(table, Node)
        if writer.target is aten.embedding.default:
            weights.embedding(writer, weights.of(table, "rows have mean zero", lambda e: e - e.mean(-1, keepdim=True), writer))
            continue
        offset, source = _argument(writer, 2), writer.args[0]
        assert isinstance(source, Node)
        matrix = weights.of(table, "columns have mean zero", lambda w: w - w.mean(0), writer)
        bias = weights.of(offset, "mean zero", lambda c: c - c.mean(), writer) if offset is not None else None
        weights.linear(writer, source, matrix, bias, [])
    for norm in norms:
        with building(program.graph, before=norm, stands_for=[norm], by=FoldNorms.name) as call:
            made = call(aten.rms_norm.default, norm.args[0], norm.args[1], _gain(norm), _eps(norm), name=norm.name)
        made.meta["val"] = norm.meta["val"]
        norm.replace_all_uses_with(made)
        program.graph.erase_node(norm)
