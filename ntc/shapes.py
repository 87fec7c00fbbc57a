"""Shapes of a graph with batch and length left open: every node run on fake tensors, equal calls once.

Decoders repeat one block, and what an op makes of a shape depends on nothing but types, shapes and strides. So a call whose op and
arguments are alike to one before gets that one's result: a network of thirty blocks costs little more than one of a single block.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext, free_unbacked_symbols

__all__ = ["Shapes"]


class Shapes(FakeTensorMode):  # type: ignore[no-untyped-call]
    """The mode of one propagation, which its fake tensors lead back to, and what calls on them gave so far."""

    def __init__(self) -> None:
        super().__init__(shape_env=ShapeEnv(), allow_non_fake_inputs=False)
        self.cache_enabled = False  # torch's own: with open sizes it takes longer to look up than to compute
        self._results: dict[Hashable, Any] = {}
        self._keys: dict[int, tuple[Tensor, Hashable]] = {}  # by id; the tensor is held, so that nobody else gets its id

    @classmethod
    def of(cls, value: Tensor) -> Shapes:
        """The propagation that a fake tensor was made in."""
        mode = value.fake_mode  # type: ignore[attr-defined]
        assert isinstance(mode, cls)
        return mode

    def dynamic(self, value: Tensor) -> Tensor:
        """A fake tensor of that type and rank, every size of which is a symbol."""
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * value.dim())
        return self.from_tensor(value, symbolic_context=context)

    def constant(self, value: Tensor) -> Tensor:
        """The fake tensor of a weight; one on the ``meta`` device is a shape and no place, and meets what the graph makes on the CPU."""
        key = ("constant", isinstance(value, nn.Parameter), _metadata(value))
        if key not in self._results:
            if value.is_meta:
                with self:
                    here = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
                self._results[key] = here.requires_grad_(value.requires_grad)
            else:
                self._results[key] = self.from_tensor(value, static_shapes=True)
        found: Tensor = self._results[key]
        return found

    def call(self, node: Node) -> Any:
        """What a ``call_function`` node makes of the ``val`` of its arguments."""
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        key: Hashable = (node.target, self._key(args), self._key(kwargs))
        try:
            if key in self._results:
                return self._results[key]
        except TypeError:  # an argument that has no hash
            key = None
        with self:
            value = node.target(*args, **kwargs)  # type: ignore[operator]
            if free_unbacked_symbols(value):
                # A size that depends on values is another one in every call; torch remembers it by tensor, and weights share theirs.
                args, kwargs = torch.utils._pytree.tree_map_only(Tensor, torch.Tensor.detach, (args, kwargs))
                return node.target(*args, **kwargs)  # type: ignore[operator]
        if key is not None and isinstance(value, Tensor | torch.SymInt | int):
            self._results[key] = value
        return value

    def _key(self, value: Any) -> Hashable:
        """Equal for arguments that no op can tell apart by anything but values."""
        if isinstance(value, Tensor):
            if id(value) not in self._keys:
                self._keys[id(value)] = value, _metadata(value)
            return self._keys[id(value)][1]
        if isinstance(value, torch.SymInt):
            return torch.SymInt, value.node.expr
        if isinstance(value, list | tuple):
            return list, tuple(self._key(v) for v in value)
        if isinstance(value, Mapping):
            return dict, tuple((name, self._key(v)) for name, v in value.items())
        return type(value), value  # 1, 1.0 and True are equal and are not the same


def _metadata(value: Tensor) -> Hashable:
    sizes = (*value.shape, *value.stride(), value.storage_offset())
    exact = tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in sizes)
    return Tensor, value.dtype, value.device, value.layout, value.requires_grad, exact
