"""Host ops on the page: what they are called, what they read, and which of them share a box."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ntc_backends import netlist_schema as schema

__all__ = ["gathered", "is_plumbing", "tensors_of", "title_of", "values_of"]

_TITLES = {
    "layer_norm": "LayerNorm", "rms_norm": "RMSNorm", "integer_norm": "norm", "linear": "linear", "integer_linear": "linear",
    "embedding": "embedding", "add": "add", "gelu": "GELU", "silu": "SiLU", "relu": "ReLU", "softmax": "softmax",
    "attention": "softmax attention", "requantize": "requantize", "integer_lookup": "lookup table", "from_integer": "to float",
}  # fmt: skip


def _base(op: schema.HostOp) -> str:
    """``layer_norm`` of ``aten.layer_norm.default``."""
    parts = op.op.split(".")
    return parts[1] if len(parts) > 1 else op.op


def title_of(op: schema.HostOp) -> str:
    """What the op is called."""
    return _TITLES.get(_base(op), _base(op).strip("_").replace("_", " "))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _arguments(op: schema.HostOp) -> Iterator[Any]:
    for value in op.arguments.values():
        yield from _leaves(value)


def values_of(op: schema.HostOp) -> list[str]:
    """Names of the computed values that it reads, each once, as its island knows them."""
    return list(dict.fromkeys(a.value for a in _arguments(op) if isinstance(a, schema.ValueRef)))


def tensors_of(op: schema.HostOp) -> set[str]:
    """Names of the constants that it reads."""
    return {a.tensor for a in _arguments(op) if isinstance(a, schema.TensorRef)}


def is_plumbing(op: schema.HostOp) -> bool:
    """Whether an op has no name on the page and no constants: views, sizes, slices, products of values."""
    return _base(op) not in _TITLES and not tensors_of(op)


def gathered(
    order: Iterable[str], inputs: Mapping[str, list[str]], plumbing: Callable[[str], bool], place: Callable[[str], object]
) -> dict[str, str]:
    """Plumbing that hangs together shares a box: for each such op the first one of its box.

    Level of an op: how many boxes with a name lie on its longest way there. Connected plumbing of one level (and one place) can share
    a box, since a way out of it and back in would pass a name and raise the level: no cycle comes of it.

    Args:
        order: All boxes and ops in an order in which they can run.
        inputs: What each of them reads.
        plumbing: Whether one may be merged.
        place: Block and island; only ops of the same place are merged.
    """
    level: dict[str, int] = {}
    leader: dict[str, str] = {}
    for name in order:
        level[name] = max((level[a] + (not plumbing(a)) for a in inputs[name] if a in level), default=0)
        if not plumbing(name):
            continue
        leader[name] = name
        for other in inputs[name]:
            if other in leader and level[other] == level[name] and place(other) == place(name):
                mine, theirs = _root(leader, name), _root(leader, other)
                leader[mine] = theirs
    return {name: _root(leader, name) for name in leader}


def _root(leader: Mapping[str, str], name: str) -> str:
    while leader[name] != name:
        name = leader[name]
    return name
