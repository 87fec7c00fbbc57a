"""Operations that do nothing: no-ops, chains of layout changes that end where they began, writes in place that nobody else sees."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from ntc.meta import MADE_BY
from ntc.ops import aten
from ntc.probe import LAYOUT_OPS, equals, keeps_values, shape_at
from ntc.program import Program
from ntc_passes.canonicalize.making import NAME

__all__ = ["drop_identity_layouts", "drop_no_ops", "views_to_reshapes", "writes_to_results"]

# Nothing, where the value has the type already.
_COPIES = frozenset({
    aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default, aten.contiguous.default, aten.clone.default,
})  # fmt: skip

_IN_PLACE = {
    aten.add_.Tensor: aten.add.Tensor, aten.sub_.Tensor: aten.sub.Tensor, aten.mul_.Tensor: aten.mul.Tensor,
    aten.div_.Tensor: aten.div.Tensor, aten.relu_.default: aten.relu.default, aten.silu_.default: aten.silu.default,
}  # fmt: skip


def writes_to_results(program: Program) -> int:
    """``x.add_(y)`` is ``x + y`` where nobody else reads x, nor a tensor that x is a view of."""
    count = 0
    for node in program.graph.nodes:
        if node.target in _IN_PLACE and _only_reader(node) and _same_type(node):
            node.target = _IN_PLACE[node.target]
            node.meta[MADE_BY] = tuple(dict.fromkeys((*node.meta[MADE_BY], NAME)))
            count += 1
    return count


def _only_reader(node: Node) -> bool:
    """Whether what it writes into is seen through no other node."""
    written = node.args[0]
    while isinstance(written, Node) and written.op == "call_function" and len(written.users) == 1:
        schema = getattr(written.target, "_schema", None)
        if schema is None:
            return False
        # At inference dropout returns what it is given.
        if written.target is not aten.dropout.default and all(r.alias_info is None for r in schema.returns):
            return True
        written = written.args[0] if written.args else None
    return False


def _same_type(node: Node) -> bool:
    """Whether the sum, say, has the type of what it is written into by itself; a number never widens a floating-point tensor."""
    tensors = [a.meta["val"] for a in node.args if isinstance(a, Node) and isinstance(a.meta["val"], Tensor)]
    return all(t.dtype == tensors[0].dtype and t.is_floating_point() for t in tensors)


def views_to_reshapes(program: Program) -> int:
    """One spelling of a change of shape, and one that does not depend on strides."""
    count = 0
    for node in program.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
            node.meta[MADE_BY] = tuple(dict.fromkeys((*node.meta[MADE_BY], NAME)))
            count += 1
    return count


def drop_no_ops(program: Program) -> int:
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
    if node.target in _COPIES:
        return True
    constant = node.args[1] if len(node.args) > 1 else None
    if isinstance(constant, bool) or not isinstance(constant, int | float):
        return False
    neutral = {aten.add.Tensor: 0, aten.sub.Tensor: 0, aten.mul.Tensor: 1, aten.div.Tensor: 1}
    return node.target in neutral and constant == neutral[node.target] and not node.kwargs


def drop_identity_layouts(program: Program) -> int:
    """A chain of layout operations that ends where it began is nothing."""
    count = 0
    for node in list(program.graph.nodes):
        if node.target not in LAYOUT_OPS or not node.users:
            continue
        chain = [node]
        while chain[-1].target in LAYOUT_OPS and isinstance(chain[-1].args[0], Node):
            chain.append(chain[-1].args[0])
        for at in range(len(chain) - 1, 0, -1):
            root = chain[at]
            if _alike(program, root, node) and keeps_values(root, chain[:at]) and equals(program, root, node, lambda t, _: t):
                node.replace_all_uses_with(root)
                count += 1
                break
    program.graph.eliminate_dead_code()
    return count


def _alike(program: Program, a: Node, b: Node) -> bool:
    """Whether one can stand for the other: equal shapes and types."""
    x, y = a.meta.get("val"), b.meta.get("val")
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return False
    return x.dtype == y.dtype and shape_at(program, a, (3, 7)) == shape_at(program, b, (3, 7))
