"""Prove what a piece of graph computes by running it on small concrete tensors.

Models spell the same thing in many ways: ``view``/``transpose``/``flatten`` chains for splitting heads, five ways to mask
scores. Instead of a pattern per spelling, ntc runs the piece on tensors whose elements are all different and compares
with the reference function. Layout operations and masks do not depend on the values, so a few sizes are a proof.
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops import aten
from ntc.program import Program

__all__ = [
    "LAYOUT_OPS", "PROBE_SIZES", "Gathered", "concrete", "equals", "evaluate", "gather_of", "keeps_values", "probe_sizes", "shape_at",
]  # fmt: skip

# Two pairs (B, L) of distinct sizes that are no factor of usual widths.
PROBE_SIZES: tuple[tuple[int, int], ...] = ((3, 7), (2, 5))

LAYOUT_OPS = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int, aten.permute.default,
    aten.flatten.using_ints, aten.unflatten.int, aten.contiguous.default, aten.clone.default, aten.alias.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.expand.default, aten.t.default, aten.detach.default,
    aten.slice.Tensor, aten.lift_fresh_copy.default, aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default,
    aten.repeat.default, aten.repeat_interleave.self_int,
})  # fmt: skip

_CASTS = frozenset({aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default})

_SELECT_OPS = frozenset({
    aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, operator.getitem,
    aten.index.Tensor,
})  # fmt: skip

_SCALE_OPS = frozenset({aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar})


def keeps_values(root: Node, chain: Iterable[Node]) -> bool:
    """Whether the casts among the nodes that lead from a root on leave every value that it can have as it is.

    A cast to a type that cannot hold them all is arithmetic, though the probes, which are whole numbers, pass it unchanged: float to
    int64 rounds towards zero, float32 to bfloat16 to 8 bits.
    """
    narrow = root.meta.get("val")
    wide = [n.meta.get("val") for n in chain if n.target in _CASTS]
    return isinstance(narrow, Tensor) and all(isinstance(value, Tensor) and _holds(value.dtype, narrow.dtype) for value in wide)


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether one type has every value of the other."""
    if narrow in (wide, torch.bool):
        return True
    if narrow.is_complex or wide.is_complex or wide == torch.bool:
        return False
    if narrow.is_floating_point:
        if not wide.is_floating_point:
            return False
        a, b = torch.finfo(wide), torch.finfo(narrow)
        return bool(a.eps <= b.eps and a.max >= b.max and a.tiny <= b.tiny)
    if wide.is_floating_point:
        return bool(torch.iinfo(narrow).max <= 2 / torch.finfo(wide).eps)
    return torch.iinfo(wide).max >= torch.iinfo(narrow).max and torch.iinfo(wide).min <= torch.iinfo(narrow).min


def probe_sizes(program: Program) -> tuple[tuple[int, int], ...]:
    """The sizes (B, L) to probe with: ``PROBE_SIZES``, shortened to what the model's context takes."""
    limit = program.info.context
    if not limit or limit >= max(length for _, length in PROBE_SIZES):
        return PROBE_SIZES
    return ((3, limit), (2, max(1, limit - 1)))


def concrete(program: Program, value: Any, sizes: tuple[int, int]) -> Any:
    """A size or value with the symbols of batch and length replaced by numbers."""
    if not isinstance(value, torch.SymInt):
        return value
    placeholder = next(n for n in program.graph.nodes if n.op == "placeholder")
    symbols = [s.node.expr for s in placeholder.meta["val"].shape]
    return _substituted(value.node.expr, tuple(symbols), sizes)


@functools.lru_cache(maxsize=4096)  # the same few sizes stand in every layer, and sympy is slow
def _substituted(size: Any, symbols: tuple[Any, ...], sizes: tuple[int, int]) -> int:
    return int(size.subs(dict(zip(symbols, sizes, strict=True))))


def shape_at(program: Program, node: Node, sizes: tuple[int, int]) -> tuple[int, ...]:
    """Concrete shape of a node for that batch and length."""
    return tuple(concrete(program, s, sizes) for s in node.meta["val"].shape)


def evaluate(program: Program, node: Node, given: Mapping[Node, Any], sizes: tuple[int, int]) -> Any:
    """Value of a node from the values of the nodes in ``given``, constants and sizes.

    Raises:
        LookupError: If it needs the program's input or too many nodes: then it is not a piece of constant graph.
    """
    memo: dict[Node, Any] = dict(given)
    budget = 100

    def value_of(n: Node) -> Any:
        nonlocal budget
        if n in memo:
            return memo[n]
        budget -= 1
        if n.op == "placeholder" or budget < 0:
            raise LookupError(f"%{node.name} depends on %{n.name}")
        value = n.meta.get("val")
        if n.op == "get_attr":
            memo[n] = program.tensor(n).detach()
        elif isinstance(value, int | torch.SymInt):
            memo[n] = concrete(program, value, sizes)
        else:
            args, kwargs = torch.fx.map_arg((n.args, n.kwargs), value_of)
            memo[n] = n.target(*args, **kwargs)  # type: ignore[operator]
        return memo[n]

    with torch.no_grad(), warnings.catch_warnings():
        # Probes are in float64 and weights are not: that a fused kernel does not take them concerns nobody.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        return value_of(node)


def equals(
    program: Program, root: Node, node: Node, reference: Callable[[Tensor, tuple[int, int]], Tensor]
) -> bool:
    """Whether ``node`` is exactly ``reference(root, sizes)`` for every probed pair of sizes (B, L).

    The probe tensor has all elements different, so equality means that the same elements stand in the same places.
    """
    for sizes in probe_sizes(program):
        probe = index_tensor(shape_at(program, root, sizes))
        try:
            got, expected = evaluate(program, node, {root: probe}, sizes), reference(probe, sizes)
        except (LookupError, RuntimeError, IndexError, ValueError, TypeError):
            return False
        if not isinstance(got, Tensor) or got.shape != expected.shape or not torch.equal(got.double(), expected.double()):
            return False
    return True


def index_tensor(shape: tuple[int, ...]) -> Tensor:
    """A float64 tensor of that shape with elements 1, 2, 3, ..."""
    count = 1
    for size in shape:
        count *= size
    return (torch.arange(count, dtype=torch.float64) + 1).reshape(shape)


@dataclass(frozen=True)
class Gathered:
    """``node[b, h, l, d] = factor * root[b, l, channels[h D + d]]``: heads split off a wider tensor.

    Attributes:
        root: A node of shape ``[B, L, N]``, or one of heads ``[B, G, L, E]``, which stands for ``[B, L, G E]``.
        channels: Which channels of the root, ``[C]``.
        factor: Constant factor.
    """

    root: Node
    channels: Tensor
    factor: float


def gather_of(program: Program, node: Node, view: Callable[[Tensor], Tensor], heads: bool = False) -> Gathered | None:
    """Find where the channels of a node come from.

    Walks back through operations that move, select or scale elements; the farthest ``[B, L, N]`` tensor whose channels
    explain the node wins. This is how fused and interleaved query-key-value projections, head splits, repeated
    key-value heads and folded score scales are all read by one rule.

    Args:
        program: The program.
        node: The node to explain.
        view: Brings its value to ``[B, L, C]``, for example by merging heads.
        heads: Look for a tensor of heads ``[B, G, L, E]`` instead, as rotated queries and keys are.
    """
    chain = [node]
    while (step := _source(chain[-1])) is not None:
        chain.append(step)
    for at, root in reversed(list(enumerate(chain))):
        value = root.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() != (4 if heads else 3) or not keeps_values(root, chain[:at]):
            continue
        if not all(isinstance(value.shape[i], int) for i in ((1, 3) if heads else (2,))):
            continue
        found = _explain(program, root, node, view)
        if found is not None:
            return found
    return None


def _source(node: Node) -> Node | None:
    """The node that ``node`` takes its elements from, if it only moves, selects or scales them."""
    if node.op != "call_function" or not node.args:
        return None
    if node.target in _SCALE_OPS:
        tensors = [a for a in node.args if isinstance(a, Node) and isinstance(a.meta.get("val"), Tensor)]
        moving = [a for a in tensors if a.op != "get_attr"]
        return moving[0] if len(moving) == 1 else None
    if node.target in LAYOUT_OPS or node.target in _SELECT_OPS:
        return node.args[0] if isinstance(node.args[0], Node) else None
    return None


def _explain(program: Program, root: Node, node: Node, view: Callable[[Tensor], Tensor]) -> Gathered | None:
    channels: Tensor | None = None
    factor = 1.0
    for sizes in probe_sizes(program):
        shape = shape_at(program, root, sizes)
        if len(shape) == 4 and (shape[0], shape[2]) != sizes:
            return None
        probe = index_tensor((*sizes, shape[1] * shape[3]) if len(shape) == 4 else shape)
        given = probe.reshape(*sizes, shape[1], shape[3]).transpose(1, 2) if len(shape) == 4 else probe
        try:
            got = view(evaluate(program, node, {root: given}, sizes)).double()
            # Twice the probe plus one tells a pure scaling from anything affine.
            other = view(evaluate(program, node, {root: 2 * given + 1}, sizes)).double()
        except (LookupError, RuntimeError, IndexError, ValueError, TypeError):
            return None
        if got.dim() != 3 or got.shape[:2] != probe.shape[:2]:
            return None
        factor = float((other - 2 * got).flatten()[0])
        if factor == 0 or not torch.allclose(other - 2 * got, torch.full_like(got, factor), rtol=1e-5):
            return None
        index = (got[0, 0] / factor).round().long() - 1
        if channels is not None and not torch.equal(index, channels):
            return None
        channels = index
        if int(index.min()) < 0 or int(index.max()) >= probe.shape[-1] or not torch.allclose(got, factor * probe[..., index], rtol=1e-6):
            return None
    assert channels is not None
    return Gathered(root, channels, factor)
