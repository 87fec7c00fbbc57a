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

import re

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from ntc.meta import building, module_of
from ntc.ops import aten
from ntc.ops.attention import merge_heads
from ntc.pipeline import Context, Pass, PassResult
from ntc.probe import LAYOUT_OPS, Gathered, equals, evaluate, gather_of, shape_at
from ntc.program import Program

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
        sites, missed = 0, []
        for rule in (_drop_no_ops, _drop_identity_layouts, _rewrite_linears, _drop_identity_layouts, _rewrite_gelus):
            sites += rule(program)
            program.propagate()
        for node in list(program.graph.nodes):
            if node.target in _SOFTMAX or node.target is aten.scaled_dot_product_attention.default:
                reason = _rewrite_attention(program, node)
                if reason:
                    missed.append((node.name, reason))
                else:
                    sites += 1
        program.propagate()
        sites += _drop_identity_layouts(program)
        sites += _split_fused_projections(program)
        program.graph.eliminate_dead_code()
        sites += _tidy_names(program)
        return PassResult(modified=sites > 0, sites=sites, missed=tuple(missed))


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
    if node.target in (aten.dropout.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default):
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
    base, transposed = node, False
    while base.target in (aten.t.default, aten.transpose.int, aten.permute.default, aten.contiguous.default):
        base = base.args[0]  # type: ignore[assignment]
        transposed = True
    if base.op != "get_attr" or base.meta["val"].dim() != 2:
        return None
    value: Tensor = evaluate(program, node, {}, (3, 7))
    stored = program.tensor(base).detach()
    return base, value, transposed and value.shape == stored.T.shape and value.data_ptr() == stored.data_ptr()


def _rewrite_linears(program: Program) -> int:
    """addmm, mm and matmul with a weight become ``linear(x, weight [out, in], bias)`` on ``[..., in]``."""
    count = 0
    for node in list(program.graph.nodes):
        if node.target is aten.addmm.default:
            bias, x, matrix = node.args
            if node.kwargs or not (isinstance(bias, Node) and bias.op == "get_attr"):
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
        with building(program.graph, before=node, stands_for=[node], by=Canonicalize.name) as call:
            if reusable:
                stored = base
            else:
                stored = call(program.add_tensor(f"{base.target}_t", value.T.contiguous()), at=base)
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
        with building(program.graph, before=last, stands_for=[node, last], by=Canonicalize.name) as call:
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
    results, frontier = [], [middle]
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


_SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})


def _rewrite_attention(program: Program, node: Node) -> str:
    """Causal softmax attention around a softmax or SDPA node becomes ``ntc::attention``; returns why not."""
    if node.target in _SOFTMAX:
        parts = _hand_written(program, node)
    else:
        parts = _sdpa(program, node)
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
    (k, kv_heads), (v, v_heads) = _ungrouped(k, heads), _ungrouped(v, heads)
    if kv_heads != v_heads:
        return "keys and values have different numbers of heads"
    with building(program.graph, before=result, stands_for=[node, result], by=Canonicalize.name) as call:
        three = [_channels(program, g, call) for g in (q, k, v)]
        if any(t is None for t in three):
            return "queries, keys or values are scattered channels of a tensor that is no linear layer's result"
        y = call(torch.ops.ntc.attention.default, *three, heads, kv_heads, scale * q.factor * k.factor, at=node)
        split = call(aten.transpose.int, call(aten.unflatten.int, y, -1, [heads, -1]), 1, 2)
    result.replace_all_uses_with(split)
    program.graph.eliminate_dead_code()
    program.propagate()
    return ""


def _sdpa(program: Program, node: Node) -> tuple[Node, Node, Node, float, Node, bool] | str:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    query, key, value = given["query"], given["key"], given["value"]
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    mask = given.get("attn_mask")
    if mask is not None:
        reason = _not_causal(program, mask, {}, None)
        if reason:
            return reason
    elif not given.get("is_causal"):
        return "it is not causal"
    scale = given.get("scale")
    width = query.meta["val"].shape[-1]
    return query, key, value, float(scale) if scale is not None else float(width) ** -0.5, node, False  # type: ignore[arg-type]


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
    product, found, frontier = products[0], [], [scores_in]
    while frontier and not found:
        n = frontier.pop(0)
        if n.target in _PRODUCTS:
            found.append(n)
        elif n.target in _MASKING:
            frontier.extend(n.all_input_nodes)
    if not found:
        return "its scores are no product of queries and keys"
    scores = found[0]
    factor = _not_causal(program, scores_in, {}, scores)
    if isinstance(factor, str) and factor:
        return factor
    scale = _score_scale(program, scores_in, scores)
    query, key, value = scores.args[0], scores.args[1], product.args[1]
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    return query, key, value, scale, product, True


def _not_causal(program: Program, masked: Node, given: dict[Node, Tensor], scores: Node | None) -> str:
    """Run the masking on zero scores: 0 must come out where j <= i and very negative elsewhere. Says what is wrong."""
    for sizes in ((3, 7), (2, 5)):
        length = sizes[1]
        inputs = dict(given)
        if scores is not None:
            inputs[scores] = torch.zeros(shape_at(program, scores, sizes))
        try:
            got = evaluate(program, masked, inputs, sizes)
        except (LookupError, RuntimeError, TypeError):
            return "its mask depends on the input"
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        if got.dtype == torch.bool:
            fits = bool((got == causal).all())
        else:
            fits = bool((got[..., causal] == 0).all()) and bool((got[..., ~causal] < -1e4).all())
        if not fits:
            return "its mask is not the causal one"
    return ""


def _score_scale(program: Program, masked: Node, scores: Node) -> float:
    """Factor between the product of queries and keys and the softmax input."""
    ones = torch.ones(shape_at(program, scores, (3, 7)), dtype=torch.float64)
    got = evaluate(program, masked, {scores: ones}, (3, 7))
    return float(got[..., 0, 0].flatten()[0])


def _ungrouped(g: Gathered, heads: int) -> tuple[Gathered, int]:
    """Repeated key-value heads back to the distinct ones."""
    rows = g.channels.reshape(heads, -1)
    distinct = torch.tensor(list(dict.fromkeys(map(tuple, rows.tolist()))))
    if heads % len(distinct) == 0 and torch.equal(distinct.repeat_interleave(heads // len(distinct), dim=0), rows):
        return Gathered(g.root, distinct.flatten(), g.factor), len(distinct)
    return g, heads


def _channels(program: Program, g: Gathered, call) -> Node | None:  # type: ignore[no-untyped-def]
    """A node that holds the chosen channels of a root: itself, rows of its linear layer, or a slice."""
    width = g.root.meta["val"].shape[-1]
    if torch.equal(g.channels, torch.arange(width)):
        return g.root
    if g.root.target is aten.linear.default:
        weight = program.tensor(g.root.args[1])  # type: ignore[arg-type]
        base = str(g.root.args[1].target).removesuffix("_t")  # type: ignore[union-attr]
        part = _part_name(g.channels, width)
        rows = program.add_tensor(f"{base.removesuffix('.weight')}.{part}.weight", weight.detach()[g.channels])
        arguments = [g.root.args[0], call(rows, at=g.root)]
        if len(g.root.args) > 2 and isinstance(g.root.args[2], Node):
            bias = program.tensor(g.root.args[2]).detach()[g.channels]
            name = program.add_tensor(f"{base.removesuffix('.weight')}.{part}.bias", bias)
            arguments.append(call(name, at=g.root))
        return call(aten.linear.default, *arguments, at=g.root)  # type: ignore[no-any-return]
    first = int(g.channels[0])
    if torch.equal(g.channels, torch.arange(first, first + len(g.channels))):
        return call(aten.slice.Tensor, g.root, -1, first, first + len(g.channels))  # type: ignore[no-any-return]
    return None


def _part_name(channels: Tensor, width: int) -> str:
    """``q``, ``k`` or ``v`` for the thirds of a fused projection by their first channel, else its number."""
    if width == 3 * len(channels):
        # Interleaved layouts start at 0, D, 2 D; stacked ones at 0, C, 2 C: the order tells.
        first = int(channels[0])
        return "q" if first == 0 else "k" if 2 * first < width and (first * 3 <= width) else "v"
    return f"from{int(channels[0])}"


def _split_fused_projections(program: Program) -> int:
    """``ntc::attention`` of slices of one fused projection: each gets the rows of the weight that it uses."""
    count = 0
    for node in list(program.graph.nodes):
        if node.target is not torch.ops.ntc.attention.default:
            continue
        with building(program.graph, before=node, stands_for=[node], by=Canonicalize.name) as call:
            for at, part in enumerate("qkv"):
                argument = node.args[at]
                found = gather_of(program, argument, lambda t: t)
                if found is None or found.factor != 1.0 or found.root is argument:
                    continue
                replacement = _channels(program, found, call)
                if replacement is not None:
                    replacement.meta |= {k: v for k, v in found.root.meta.items() if k.startswith("ntc.")}
                    replacement.meta["ntc.part"] = part
                    node.update_arg(at, replacement)
                    count += 1
    return count


_SPECIAL = re.compile(r"\W+")


def _tidy_names(program: Program) -> int:
    """Names that a person recognizes: nodes after their modules, weights without marks of how they were made."""
    count, graph = 0, program.graph
    tensors: dict[str, Tensor] = {}
    renames: dict[str, str] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            old = str(node.target)
            new = renames.setdefault(old, old.removesuffix("_t") if old.removesuffix("_t") not in tensors else old)
            tensors[new] = program.tensor(old)
            count += new != old
            node.target = new
    taken: set[str] = {n.name for n in graph.nodes}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        module = module_of(node).removeprefix("transformer.").removeprefix("model.")
        kind = str(node.target).split(".")[-2] if "." in str(node.target) else str(node.target)
        linear = node.target is aten.linear.default
        if linear:  # where a fused projection was split, the weight says which part; a tied weight says less than the module
            weight = str(node.args[1].target).removesuffix(".weight").removeprefix("transformer.").removeprefix("model.")
            module = weight if weight.startswith(module) else module
        leaf = linear or node.target in (aten.layer_norm.default, aten.embedding.default, aten.gelu.default, aten.relu.default)
        wanted = _SPECIAL.sub("_", module if leaf and module else f"{module}.{kind}" if module else kind).strip("_").lower()
        if wanted and wanted[0].isdigit():
            wanted = f"n_{wanted}"
        unique, number = wanted, 1
        while unique in taken and unique != node.name:
            unique, number = f"{wanted}_{number}", number + 1
        if unique != node.name:
            taken.discard(node.name)
            taken.add(unique)
            node.name = unique
            count += 1
    program.module = program.with_graph(graph, tensors).module
    return count

