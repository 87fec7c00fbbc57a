r"""Rotate the residual stream, and the values of attention, so that no channel stands out.

Before, with norms that have no gain (``fold-norms``)::

    %x = embedding(E, %ids);  %n = rms_norm(%x, [C], None, eps);  %h = linear(%n, W, b);  %y = linear(%a, V, c);  %z = add(%x, %y)

After, the same graph with other weights, Q orthogonal ``[C, C]``::

    E Q,   W Q,   Q^T V,   c Q

Exact: the stream is ``x Q`` everywhere, ``rms_norm(x Q) = rms_norm(x) Q`` because Q keeps lengths, and ``(n Q)(W Q)^T = n W^T``.
Embeddings, the head, output projections of attention and FFN are included. In ``x Q`` an outlier channel is spread over all channels,
so a code of few levels per value loses little (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406). ``kind = principal`` is for a code
of few events per value, and does the opposite: see ``ntc_passes.rotate.principal``.

``values`` rotates the values within each head by R ``[D, D]``: ``R^T`` from the left to each head's rows of the value projection, R from
the right to its columns of the output projection. Attention mixes tokens and not channels: this is exact, too, and costs nothing.

``online`` puts a Hadamard transform in front of linear layers whose input is made element by element, where no weight can take it
(``ntc::hadamard``: sums and differences, counted as accumulates): ``ffn`` in front of the last layer of every FFN, ``all`` also in front of
the output projection of every attention, over all heads. Its inverse goes into the weight behind: ``W H / n``.

A stream that is read or written by anything else is refused: LayerNorm (its mean depends on the basis), norms with gains, norms
behind a layer whose gain is added to the stream (Gemma 2, OLMo 2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import PassError
from ntc.meta import building, where
from ntc.ops import SOFTMAX_ATTENTION, aten
from ntc.ops.hadamard import hadamard_core
from ntc.pipeline import Context, Pass, PassResult
from ntc.program import Program
from ntc_passes.new_weights import NewWeights, constant_weights
from ntc_passes.replace_attention import check_switch
from ntc_passes.residual import Stream, is_norm_of_stream, residual_stream
from ntc_passes.rotate.principal import HeadRotation, principal_axes
from ntc_passes.rotate.rotations import Rotation, hadamard_factors, kronecker, rotation

__all__ = ["Rotate"]


@dataclass(frozen=True)
class Options:
    """Options of ``rotate``.

    Attributes:
        kind: ``hadamard`` (with random signs; where no Hadamard matrix of a width is known, orthogonal) or ``orthogonal`` (at random), both
            of which make channels alike; ``principal``, the axes of calibration text, makes them as different as they get.
        values: Whether to rotate the values of attention within each head.
        online: Where Hadamard transforms are computed while the network runs: ``none``, ``ffn`` or ``all``.
        seed: Of the rotations.
    """

    kind: Literal["hadamard", "orthogonal", "principal"] = "hadamard"
    values: bool = True
    online: Literal["none", "ffn", "all"] = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        check_switch("values", self.values)
        if self.kind not in ("hadamard", "orthogonal", "principal"):
            raise ValueError(f"kind must be 'hadamard', 'orthogonal' or 'principal', got {self.kind!r}")
        if self.online not in ("none", "ffn", "all"):
            raise ValueError(f"online must be 'none', 'ffn' or 'all', got {self.online!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise ValueError(f"seed must be a whole number of at least 0, got {self.seed!r}")


@dataclass
class _Change:
    """What becomes of one linear layer ``y = x W^T + c``.

    Attributes:
        inputs: Rotations of its input, in order: ``W <- W Q``.
        outputs: Rotations of its output: ``W <- Q^T W``, ``c <- c Q``.
        online: Core and doublings of the Hadamard transform in front of it: ``W <- W H / n``.
    """

    inputs: list[Rotation | HeadRotation] = field(default_factory=list)
    outputs: list[Rotation | HeadRotation] = field(default_factory=list)
    online: tuple[Tensor, int] | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for equal changes."""
        online = None if self.online is None else (len(self.online[0]), self.online[1])
        return tuple(r.kind for r in self.inputs), tuple(r.kind for r in self.outputs), online

    def weight(self, w: Tensor) -> Tensor:
        """The new weight, in float64."""
        for rotate in self.inputs:
            w = rotate(w)
        for rotate in self.outputs:
            w = rotate.from_left(w)
        if self.online is not None:
            core, doublings = self.online
            w = kronecker(w, hadamard_factors(core, doublings)) / (len(core) << doublings)
        return w

    def bias(self, c: Tensor) -> Tensor:
        """The new bias, in float64."""
        for rotate in self.outputs:
            c = rotate(c)
        return c


class Rotate(Pass):
    """Fold an orthogonal rotation of the residual stream, and of the values of attention, into the weights."""

    name = "rotate"
    requires = frozenset({"canonical", "norms-folded"})
    provides = frozenset({"rotated"})
    removes = frozenset({"calibrated"})
    exact = True
    required = True
    Options = Options

    def run(self, program: Program, context: Context) -> PassResult:
        """Plan all changes, then make every weight once."""
        options: Options = self.options
        if "rotated" in program.facts:
            return PassResult(False, missed=(("output", "the program is rotated already"),))
        stream = residual_stream(program)
        if stream is None:
            raise PassError(f"rotate finds no residual stream in {program.info.source}: no embedding and no norm of a [B, L, C] value")
        _check(stream)
        changes: dict[Node, _Change] = {}
        missed, turnable = list[tuple[str, str]](), list[Node]()
        for attention in _attentions(program) if options.values else ():
            if reason := _values_not_linear(attention):
                missed.append((attention.name, reason))
            else:
                turnable.append(attention)
        axes = principal_axes(program, stream, turnable, context) if options.kind == "principal" else None
        turn = axes.stream if axes else rotation(stream.width, options.kind, options.seed)
        for layer in _readers(stream):
            changes.setdefault(layer, _Change()).inputs.append(turn)
        tables = [n for n in stream.writers if n.target is aten.embedding.default]
        for layer in (n for n in stream.writers if n.target is aten.linear.default):
            changes.setdefault(layer, _Change()).outputs.append(turn)
        for attention in turnable:
            _rotate_values(attention, changes, axes.values[attention] if axes else _of_a_head(attention, options))
        online = _put_online(stream, changes, options.online)
        made = _make(program, changes, tables, turn)
        notes: dict[str, Any] = {"stream": turn.kind, "values": len(turnable), "online": online}
        if untied := made.untied():
            notes["untied"] = untied
        return PassResult(True, 1 + len(turnable) + len(online), tuple(missed), notes=notes)


def _check(stream: Stream) -> None:
    """Refuse a stream that cannot be rotated.

    Raises:
        PassError: Names the node that reads or writes it otherwise, and what to do.
    """
    for reader, value in stream.readers:
        if reader.target is aten.linear.default and reader.args[0] is value:
            _check_constant(reader)
        elif reader.target is aten.layer_norm.default:
            raise PassError(
                f"rotate cannot pass a LayerNorm, whose mean depends on the basis: {where(reader)}; fold-norms makes it an RMSNorm"
            )
        elif not is_norm_of_stream(reader):
            raise PassError(f"rotate needs a residual stream that only norms and linear layers read, and it is read by {where(reader)}")
        elif len(reader.args) > 2 and reader.args[2] is not None:
            raise PassError(f"rotate cannot pass a norm with a gain for each channel: {where(reader)}; fold-norms folds it if it can")
        else:
            for user in reader.users:
                if user.target is not aten.linear.default or user.args[0] is not reader:
                    raise PassError(f"rotate needs norms that only linear layers read, and {where(reader)} is read by %{user.name}")
                _check_constant(user)
    for writer in stream.writers:
        if writer.target not in (aten.linear.default, aten.embedding.default):
            raise PassError(
                f"rotate needs a residual stream that embeddings and linear layers write, and {where(writer)} is none: "
                "what it computes for single channels (as the gain of a norm behind a layer) has no form in another basis"
            )
        _check_constant(writer)


def _check_constant(layer: Node) -> None:
    if reason := constant_weights(layer):
        raise PassError(f"rotate changes the weights of {where(layer)}, and {reason}")


def _readers(stream: Stream) -> list[Node]:
    """Linear layers that read the stream, at once or through a norm, each once."""
    found = dict[Node, None]()
    for reader, _ in stream.readers:
        found.update(dict.fromkeys([reader] if reader.target is aten.linear.default else reader.users))
    return list(found)


def _attentions(program: Program) -> list[Node]:
    return [n for n in program.graph.nodes if n.target in SOFTMAX_ATTENTION]


def _values_not_linear(attention: Node) -> str:
    """Why the values of an attention cannot be rotated, or an empty string."""
    value = attention.args[2]
    assert isinstance(value, Node)
    if value.target is not aten.linear.default:
        return f"its values %{value.name} are not the result of a linear layer"
    if len(value.users) > 1:
        return f"its values %{value.name} are used elsewhere too"
    others = [u for u in attention.users if u.target is not aten.linear.default or u.args[0] is not attention]
    if others:
        return f"its result goes into %{others[0].name}, not only into linear layers"
    return next((reason for layer in (value, *attention.users) if (reason := constant_weights(layer))), "")


def _of_a_head(attention: Node, options: Options) -> Rotation:
    """One rotation for all heads."""
    value, kv_heads = attention.args[2], attention.args[4]
    assert isinstance(value, Node) and isinstance(kv_heads, int)
    return rotation(int(value.meta["val"].shape[-1]) // kv_heads, options.kind, options.seed)


def _rotate_values(attention: Node, changes: dict[Node, _Change], turn: Rotation | HeadRotation) -> None:
    value = attention.args[2]
    assert isinstance(value, Node)
    changes.setdefault(value, _Change()).outputs.append(turn)
    for layer in attention.users:
        changes.setdefault(layer, _Change()).inputs.append(turn)


def _put_online(stream: Stream, changes: dict[Node, _Change], which: str) -> dict[str, str]:
    """Note Hadamard transforms in front of the layers that write the stream; returns their blocks by name of the layer."""
    found: dict[str, str] = {}
    for layer in stream.writers if which != "none" else ():
        source = layer.args[0]
        if layer.target is not aten.linear.default or not isinstance(source, Node):
            continue
        if which == "ffn" and source.target in SOFTMAX_ATTENTION:
            continue
        core, doublings = _largest_block(int(source.meta["val"].shape[-1]))
        if (size := len(core) << doublings) > 1:
            changes[layer].online = core, doublings
            found[layer.name] = f"hadamard {len(core)} x 2^{doublings}, {int(source.meta['val'].shape[-1]) // size} blocks"
    return found


def _largest_block(width: int) -> tuple[Tensor, int]:
    """The largest Hadamard matrix that divides a width."""
    sizes = (n for n in range(width, 0, -1) if width % n == 0)
    return next(found for n in sizes if (found := hadamard_core(n)) is not None)


def _make(program: Program, changes: dict[Node, _Change], tables: list[Node], turn: Rotation) -> NewWeights:
    weights = NewWeights(program, Rotate.name)
    cores: dict[int, str] = {}
    for table in tables:
        old = table.args[0]
        assert isinstance(old, Node)
        weights.embedding(table, weights.of(old, ((turn.kind,), (), None), turn, table))
    for layer, change in changes.items():
        matrix, source = layer.args[1], layer.args[0]
        offset = layer.args[2] if len(layer.args) > 2 else None
        assert isinstance(matrix, Node) and isinstance(source, Node)
        stored = weights.of(matrix, change.key, change.weight, layer)
        bias = weights.of(offset, change.key, change.bias, layer) if isinstance(offset, Node) else None
        if change.online is not None:
            source = _transformed(program, layer, source, change.online, cores)
        weights.linear(layer, source, stored, bias, [])
    return weights


def _transformed(program: Program, layer: Node, source: Node, online: tuple[Tensor, int], cores: dict[int, str]) -> Node:
    core, doublings = online
    if len(core) not in cores:
        cores[len(core)] = program.add_tensor(f"hadamard_{len(core)}", core, trainable=False)
    with building(program.graph, before=layer, stands_for=[source], by=Rotate.name) as call:
        signs, name = call(cores[len(core)], at=layer), f"{layer.name}_hadamard"
        made = call(torch.ops.ntc.hadamard.default, source, signs, doublings, at=layer, name=name)
    made.meta["val"] = source.meta["val"]
    return made
