"""One spelling per operation, so that later passes stay short.

Before (a Hugging Face GPT-2 MLP)::

    %view = view(%ln_2, [-1, 64])
    %addmm = addmm(c_fc.bias, %view, c_fc.weight)          # Conv1D: weight [in, out]
    %view_1 = view(%addmm, [%b, %l, 256])
    %mul = mul(%view_1, 0.5);  %pow = pow(%view_1, 3.0);  ...;  %tanh = tanh(...);  ...     # gelu, tanh form

After::

    %h_0_mlp_c_fc = linear(%h_0_ln_2, mlp.c_fc.weight, mlp.c_fc.bias)
    %h_0_mlp_act = gelu(%h_0_mlp_c_fc, approximate='tanh')

Likewise every spelling of causal softmax attention becomes one ``ntc::attention`` and every fused query-key-value
projection three linears. A spelling that is not recognized is left as it is and reported with the reason; nothing is
guessed: each rewrite is proved by running both sides on small tensors (``ntc.probe``).
"""

from __future__ import annotations

import builtins
import keyword
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from ntc.meta import MADE_BY, building, module_of
from ntc.ops import aten
from ntc.ops.attention import merge_heads
from ntc.pipeline import Context, Pass, PassResult
from ntc.probe import LAYOUT_OPS, Gathered, equals, evaluate, gather_of, probe_sizes, shape_at
from ntc.program import Program, op_name

__all__ = ["Canonicalize"]

_ARITHMETIC = frozenset({
    aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar, aten.neg.default,
    aten.tanh.default, aten.erf.default, aten.rsub.Scalar, aten.mul.Scalar, aten.pow.Tensor_Tensor,
})  # fmt: skip

_MASKING = _ARITHMETIC | {
    aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther, aten.to.dtype,
    aten._to_copy.default, aten.where.Scalar, aten.clone.default, aten.contiguous.default,
}  # fmt: skip


class Canonicalize(Pass):
    """Bring every spelling of an operation to one small dialect."""

    name = "canonicalize"
    requires = frozenset({"captured"})
    provides = frozenset({"canonical"})
    exact = True

    def run(self, program: Program, context: Context) -> PassResult:
        """Apply the rules in order; each leaves a program that computes the same."""
        sites, missed = 0, list[tuple[Node, str]]()
        # Views first: a view is only valid on the strides that the copies gave it, and copies are dropped next.
        for rule in (_views_to_reshapes, _drop_no_ops, _drop_identity_layouts, _rewrite_linears, _drop_identity_layouts, _rewrite_gelus):
            sites += rule(program)
        for node in list(program.graph.nodes):
            if node.target in _SOFTMAX or node.target is aten.scaled_dot_product_attention.default:
                reason = _rewrite_attention(program, node)
                if reason:
                    missed.append((node, reason))
                else:
                    sites += 1
        sites += _drop_identity_layouts(program)
        sites += _split_fused_projections(program)
        program.graph.eliminate_dead_code()
        sites += _tidy_names(program)
        return PassResult(modified=sites > 0, sites=sites, missed=tuple((node.name, reason) for node, reason in missed))


@contextmanager
def _building(program: Program, before: Node, stands_for: Iterable[Node]) -> Iterator[Callable[..., Node]]:
    """``ntc.meta.building`` whose nodes have their shapes at once, because the next rule asks for them."""
    with building(program.graph, before=before, stands_for=stands_for, by=Canonicalize.name) as call:

        def make(target: Any, *args: Any, **options: Any) -> Node:
            node = call(target, *args, **options)
            program.infer(node)
            return node

        yield make


def _views_to_reshapes(program: Program) -> int:
    """One spelling of a change of shape, and one that does not depend on strides."""
    count = 0
    for node in program.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
            node.meta[MADE_BY] = tuple(dict.fromkeys((*node.meta[MADE_BY], Canonicalize.name)))
            count += 1
    return count


def _drop_no_ops(program: Program) -> int:
    """Dropout at inference, checks, copies, conversions to the same dtype, adding 0, multiplying by 1."""
    count = 0
    for node in list(program.graph.nodes):
        source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        if node.target is aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
        elif source is not None and _is_no_op(node, source):
            node.replace_all_uses_with(source)
            program.graph.erase_node(node)
        else:
            continue
        count += 1
    return count


def _is_no_op(node: Node, source: Node) -> bool:
    if node.target is aten.dropout.default:
        return not (len(node.args) > 2 and node.args[2])  # dropout(x, p, train): capture is in evaluation mode
    if node.target in (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default):
        return True
    value, before = node.meta.get("val"), source.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(before, Tensor) or value.dtype != before.dtype:
        return False
    if node.target in (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.contiguous.default, aten.clone.default):
        return True
    constant = node.args[1] if len(node.args) > 1 else None
    if isinstance(constant, bool) or not isinstance(constant, int | float):
        return False
    neutral = {aten.add.Tensor: 0, aten.sub.Tensor: 0, aten.mul.Tensor: 1, aten.div.Tensor: 1}
    return node.target in neutral and constant == neutral[node.target] and not node.kwargs


def _drop_identity_layouts(program: Program) -> int:
    """A chain of layout operations that ends where it began is nothing."""
    count = 0
    for node in list(program.graph.nodes):
        if node.target not in LAYOUT_OPS or not node.users:
            continue
        chain = [node]
        while chain[-1].target in LAYOUT_OPS and isinstance(chain[-1].args[0], Node):
            chain.append(chain[-1].args[0])
        for root in reversed(chain[1:]):
            if _same_shape(program, root, node) and equals(program, root, node, lambda t, _: t):
                node.replace_all_uses_with(root)
                count += 1
                break
    program.graph.eliminate_dead_code()
    return count


def _same_shape(program: Program, a: Node, b: Node) -> bool:
    if not (isinstance(a.meta.get("val"), Tensor) and isinstance(b.meta.get("val"), Tensor)):
        return False
    return shape_at(program, a, (3, 7)) == shape_at(program, b, (3, 7))


def _constant_matrix(program: Program, node: object) -> tuple[Node, Tensor, bool] | None:
    """A weight matrix (in, out) behind a node: (its get_attr, value, whether the stored tensor is already (out, in))."""
    if not isinstance(node, Node):
        return None
    base = node
    while base.target in (aten.t.default, aten.transpose.int, aten.permute.default, aten.contiguous.default):
        base = base.args[0]  # type: ignore[assignment]
    if base.op != "get_attr" or base.meta["val"].dim() != 2:
        return None
    value: Tensor = evaluate(program, node, {}, (3, 7))
    stored = program.tensor(base).detach()
    # Shape alone would take a square matrix for its own transpose: the strides tell.
    reusable = value.data_ptr() == stored.data_ptr() and value.shape == stored.T.shape and value.stride() == stored.T.stride()
    return base, value, reusable


def _rewrite_linears(program: Program) -> int:
    """addmm, mm and matmul with a weight become ``linear(x, weight [out, in], bias)`` on ``[..., in]``."""
    count = 0
    for node in list(program.graph.nodes):
        if node.target is aten.addmm.default:
            bias, x, matrix = node.args
            if node.kwargs or not (isinstance(bias, Node) and bias.op == "get_attr" and bias.meta["val"].dim() == 1):
                continue
        elif node.target in (aten.mm.default, aten.matmul.default):
            (x, matrix), bias = node.args, None
        else:
            continue
        weight = _constant_matrix(program, matrix)
        if weight is None or not isinstance(x, Node):
            continue
        base, value, reusable = weight
        source = _unflattened(program, x)
        with _building(program, node, [node]) as call:
            stored = base if reusable else call(_constant(program, f"{base.target}_t", value.T.contiguous()), at=base)
            result = call(aten.linear.default, source, stored, *([bias] if bias is not None else []))
            if source is not x:  # the old node was [B * L, out]: what follows sees that, and the chain cancels later
                result = call(aten.reshape.default, result, [-1, value.shape[1]])
        node.replace_all_uses_with(result)
        program.graph.erase_node(node)
        count += 1
    return count


def _unflattened(program: Program, x: Node) -> Node:
    """The node of which ``x [M, C]`` is the flattened form, or x."""
    if x.meta["val"].dim() != 2:
        return x
    source = x
    while source.target in LAYOUT_OPS and isinstance(source.args[0], Node):
        source = source.args[0]
        if source.meta["val"].dim() > 2 and equals(program, source, x, lambda t, _: t.reshape(-1, t.shape[-1])):
            return source
    return x


def _rewrite_gelus(program: Program) -> int:
    """GELU spelled as arithmetic with tanh or erf becomes one node."""
    count = 0
    probe = torch.linspace(-8, 8, 1025, dtype=torch.float64)
    for node in list(program.graph.nodes):
        if node.target not in (aten.tanh.default, aten.erf.default):
            continue
        approximate = "tanh" if node.target is aten.tanh.default else "none"
        expected = functional.gelu(probe, approximate=approximate)
        found = _region(program, node, probe, expected)
        if found is None:
            continue
        source, last = found
        with _building(program, last, [node, last]) as call:
            gelu = call(aten.gelu.default, source, approximate=approximate)
        last.replace_all_uses_with(gelu)
        count += 1
    program.graph.eliminate_dead_code()
    return count


def _region(program: Program, middle: Node, probe: Tensor, expected: Tensor) -> tuple[Node, Node] | None:
    """The nodes x and y around ``middle`` with ``y = f(x)`` and ``f(probe) == expected``."""
    sources: list[Node] = []
    frontier = [middle]
    while frontier and len(sources) < 12:
        for a in frontier.pop(0).all_input_nodes:
            if a not in sources and a.op == "call_function":
                sources.append(a)
                if a.target in _ARITHMETIC:
                    frontier.append(a)
    results: list[Node] = []
    frontier = [middle]
    while frontier and len(results) < 12:
        for u in frontier.pop(0).users:
            if u not in results and u.target in _ARITHMETIC:
                results.append(u)
                frontier.append(u)
    for source in sources:
        for result in results:
            try:
                got = evaluate(program, result, {source: probe}, (3, 7))
            except (LookupError, RuntimeError, TypeError):
                continue
            # 1e-6 is far above what the order of float64 operations moves, far below the difference of the two forms.
            if isinstance(got, Tensor) and got.shape == expected.shape and torch.allclose(got, expected, rtol=0, atol=1e-6):
                return source, result
    return None


# exp of it is 0 in fp32 whatever the other scores are; hand-written masks use -1e4 at least.
_NEGLIGIBLE = -9e3

_SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})


def _rewrite_attention(program: Program, node: Node) -> str:
    """Causal softmax attention around a softmax or SDPA node becomes ``ntc::attention``; returns why not."""
    parts = _hand_written(program, node) if node.target in _SOFTMAX else _sdpa(program, node)
    if isinstance(parts, str):
        return parts
    query, key, value, scale, result, transposed_key = parts
    if any(x.meta["val"].dim() != 4 for x in (query, key, value)):
        return "queries, keys and values are not [B, H, L, D]"
    heads = result.meta["val"].shape[1]

    def merge(t: Tensor) -> Tensor:
        return merge_heads(t)

    q = gather_of(program, query, merge)
    k = gather_of(program, key, lambda t: merge_heads(t.transpose(-2, -1)) if transposed_key else merge_heads(t))
    v = gather_of(program, value, merge)
    if q is None or k is None or v is None:
        return f"{'queries' if q is None else 'keys' if k is None else 'values'} are not heads split off a [B, L, C] tensor"
    if v.factor != 1.0:
        return "values are scaled"
    (k, kv_heads), (v, v_heads) = _ungrouped(k, key.meta["val"].shape[1]), _ungrouped(v, value.meta["val"].shape[1])
    if kv_heads != v_heads:
        return "keys and values have different numbers of heads"
    with _building(program, result, [node, result]) as call:
        three = [_channels(program, g, part, call) for g, part in zip((q, k, v), "qkv", strict=True)]
        if any(t is None for t in three):
            return "queries, keys or values are scattered channels of a tensor that is no linear layer's result"
        y = call(torch.ops.ntc.attention.default, *three, heads, kv_heads, scale * q.factor * k.factor, at=node)
        split = call(aten.transpose.int, call(aten.unflatten.int, y, -1, [heads, -1]), 1, 2)
    result.replace_all_uses_with(split)
    program.graph.erase_node(result)  # torch counts SDPA as random, so dead-code elimination keeps it
    program.graph.eliminate_dead_code()
    return ""


def _sdpa(program: Program, node: Node) -> tuple[Node, Node, Node, float, Node, bool] | str:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    query, key, value = given["query"], given["key"], given["value"]
    mask = given.get("attn_mask")
    if mask is not None:
        reason = _masking(program, mask, None)
        if isinstance(reason, str):
            return reason
    elif not given.get("is_causal"):
        return "it is not causal"
    if given.get("dropout_p"):
        return "it drops probabilities at random"
    scale = given.get("scale")
    width = query.meta["val"].shape[-1]
    return query, key, value, float(scale) if scale is not None else float(width) ** -0.5, node, False


def _hand_written(program: Program, softmax: Node) -> tuple[Node, Node, Node, float, Node, bool] | str:
    """matmul, scale, mask, softmax over keys, matmul."""
    scores_in = softmax.args[0]
    dim = softmax.args[1]
    assert isinstance(scores_in, Node)
    if dim not in (-1, scores_in.meta["val"].dim() - 1):
        return "its softmax is not over the last axis"
    after = softmax
    while len(after.users) == 1 and next(iter(after.users)).target in (aten.to.dtype, aten._to_copy.default, aten.clone.default):
        after = next(iter(after.users))
    products = [u for u in after.users if u.target in _PRODUCTS and u.args[0] is after]
    if len(products) != 1 or len(after.users) != 1:
        return "its probabilities are used by something else than one product with the values"
    product, scores = products[0], _product_behind(scores_in)
    if scores is None:
        return "its scores are no product of queries and keys"
    scale = _masking(program, scores_in, scores)
    if isinstance(scale, str):
        return scale
    query: Any = scores.args[0]
    key: Any = scores.args[1]
    value: Any = product.args[1]
    return query, key, value, scale, product, True


def _product_behind(node: Node) -> Node | None:
    """The nearest product that a node is made of by scaling and masking."""
    frontier = [node]
    while frontier:
        n = frontier.pop(0)
        if n.target in _PRODUCTS:
            return n
        if n.target in _MASKING:
            frontier.extend(n.all_input_nodes)
    return None


def _masking(program: Program, masked: Node, scores: Node | None) -> float | str:
    """The factor c if ``masked`` is ``c * scores`` where j <= i and very negative elsewhere, else what is wrong.

    Without scores: 1.0 if ``masked`` alone is a causal mask, boolean or to be added.
    """
    factor = 1.0
    for sizes in probe_sizes(program):
        length, inputs, values = sizes[1], {}, torch.zeros((), dtype=torch.float64)
        if scores is not None:
            # All scores differ, so that a factor that depends on the place, a bias or a soft cap is seen.
            count = math.prod(shape := shape_at(program, scores, sizes))
            inputs[scores] = values = torch.linspace(1, 2, count, dtype=torch.float64).reshape(shape)
        try:
            got = evaluate(program, masked, inputs, sizes)
        except LookupError:
            return "its mask depends on the input"
        except (RuntimeError, TypeError, ValueError):
            return "its mask could not be evaluated"
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        if got.shape[-2:] != causal.shape:
            return "its mask is not the causal one"
        if got.dtype == torch.bool:
            got = torch.zeros_like(got, dtype=torch.float64).masked_fill(~got, float("-inf"))
        if not bool((got[..., ~causal] <= _NEGLIGIBLE).all()):
            return "its mask is not the causal one: later tokens are seen"
        if scores is not None:
            factor = float((got / values)[..., 0, 0].flatten()[0])
        if not torch.allclose(got[..., causal].double(), (factor * values).expand(got.shape)[..., causal], rtol=1e-6, atol=1e-12):
            return "its scores are not only scaled and causally masked"
    return factor


def _ungrouped(g: Gathered, heads: int) -> tuple[Gathered, int]:
    """Repeated key-value heads back to the distinct ones."""
    rows = g.channels.reshape(heads, -1)
    distinct = torch.tensor(list(dict.fromkeys(map(tuple, rows.tolist()))))
    if heads % len(distinct) == 0 and torch.equal(distinct.repeat_interleave(heads // len(distinct), dim=0), rows):
        return Gathered(g.root, distinct.flatten(), g.factor), len(distinct)
    return g, heads


def _channels(program: Program, g: Gathered, part: str, call: Callable[..., Node]) -> Node | None:
    """A node that holds the chosen channels of a root: itself, rows of its linear layer, or a slice.

    ``part`` (``q``, ``k`` or ``v``) names the rows.
    """
    width = g.root.meta["val"].shape[-1]
    if torch.equal(g.channels, torch.arange(width)):
        return g.root
    if g.root.target is aten.linear.default:
        arguments: list[Any] = [g.root.args[0]]
        for tensor in g.root.args[1:]:
            if isinstance(tensor, Node):
                rows = program.tensor(tensor).detach()[g.channels]
                arguments.append(call(_constant(program, _row_name(str(tensor.target), part), rows), at=g.root))
        return call(aten.linear.default, *arguments, at=g.root)
    first = int(g.channels[0])
    if torch.equal(g.channels, torch.arange(first, first + len(g.channels))):
        return call(aten.slice.Tensor, g.root, -1, first, first + len(g.channels))
    return None


def _row_name(tensor: str, part: str) -> str:
    """``c_attn.weight`` (``c_attn.weight_t`` if we turned it) becomes ``c_attn.q.weight``, a bare ``w_qkv`` ``w_qkv_q``."""
    owner, _, leaf = tensor.removesuffix("_t").rpartition(".")
    return f"{owner}.{part}.{leaf}" if owner and leaf in ("weight", "bias") else f"{tensor.removesuffix('_t')}_{part}"


def _constant(program: Program, name: str, value: Tensor) -> str:
    """Name of a constant of that value: the one that is there if two places share it, else a new one."""
    known = program.tensor_or_none(name)
    if known is not None and known.shape == value.shape and torch.equal(known, value):
        return name
    return program.add_tensor(name, value)


def _split_fused_projections(program: Program) -> int:
    """``ntc::attention`` of slices of one fused projection: each gets the rows of the weight that it uses."""
    count = 0
    for node in list(program.graph.nodes):
        if node.target is not torch.ops.ntc.attention.default:
            continue
        for at, part in enumerate("qkv"):
            argument = node.args[at]
            found = gather_of(program, argument, lambda t: t)
            if found is None or found.factor != 1.0 or found.root is argument:
                continue
            with _building(program, node, [found.root, argument]) as call:
                replacement = _channels(program, found, part, call)
            if replacement is not None:
                node.update_arg(at, replacement)
                count += 1
    return count


_SPECIAL = re.compile(r"\W+")
_LAYERS = frozenset({aten.layer_norm.default, aten.rms_norm.default, aten.embedding.default, aten.gelu.default, aten.relu.default})
# torch.fx gives these another name whenever it copies a graph.
_RESERVED = frozenset({*dir(builtins), *keyword.kwlist, "self", "torch", "device", "inf", "nan", "fx_pytree", "pytree", "operator"})


def _tidy_names(program: Program) -> int:
    """Names that a person recognizes: nodes after their modules, weights without marks of how they were made."""
    graph = program.graph
    tensors, count = _tidy_tensors(program)
    modules = {m for n in graph.nodes if n.op == "call_function" for m in _parents(module_of(n))}
    wanted = {n: _wanted_name(n, leaf=module_of(n) not in modules) for n in graph.nodes if n.op == "call_function"}
    # All names are given anew, in graph order: what a node was called before has no influence.
    taken = {n.name for n in graph.nodes if n.op not in ("call_function", "get_attr")}
    for node in graph.nodes:
        if node.op not in ("call_function", "get_attr"):
            continue
        base = wanted[node] if node in wanted else _identifier(f"p_{node.target}")
        unique, number = base, 0
        while unique in taken or unique in _RESERVED:
            number += 1
            unique = f"{base}_{number}"
        taken.add(unique)
        count += unique != node.name
        node.name = unique
    if count:
        program.module = program.with_graph(graph, tensors).module
    return count


def _tidy_tensors(program: Program) -> tuple[dict[str, Tensor], int]:
    """Drop the mark ``_t`` of weights that this pass turned, unless the unturned one is still in use."""
    attributes = [n for n in program.graph.nodes if n.op == "get_attr"]
    targets, count = {str(n.target) for n in attributes}, 0
    tensors: dict[str, Tensor] = {}
    for node in attributes:
        old = str(node.target)
        new = old.removesuffix("_t")
        if new in targets or Canonicalize.name not in node.meta[MADE_BY]:
            new = old
        tensors[new] = program.tensor(old)
        node.target = new
        count += new != old
    return tensors, count


def _parents(module: str) -> Iterator[str]:
    """``a.b`` and ``a`` for ``a.b.c``."""
    while "." in module:
        module = module.rpartition(".")[0]
        yield module
    if module:
        yield ""


def _wanted_name(node: Node, leaf: bool) -> str:
    """What to call a node: its module if that is nothing but this op, else module and op."""
    module, kind = _short(module_of(node)), op_name(node.target).rpartition(".")[2]
    if node.target is aten.linear.default and isinstance(node.args[1], Node):
        # Where a fused projection was split, the weight says which part; a tied weight says less than the module.
        weight = _short(str(node.args[1].target).removesuffix(".weight"))
        return _identifier(weight if not module or weight.startswith(module) else module)
    named_by_module = leaf and module and node.target in _LAYERS
    return _identifier(module if named_by_module else f"{module}.{kind}" if module else kind)


def _short(name: str) -> str:
    return name.removeprefix("transformer.").removeprefix("model.")


def _identifier(text: str) -> str:
    name = _SPECIAL.sub("_", text).strip("_").lower()
    return name if name and not name[0].isdigit() else f"n_{name}"
