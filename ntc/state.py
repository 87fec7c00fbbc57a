"""The state of a streaming program: what it carries from one piece of a sequence to the next.

Such a program has one placeholder for each part of the state, behind ``input_ids``, and returns the same parts as they are after
the tokens given, behind the logits and in the same order. What a part is stands in the metadata of its placeholder
(``ntc.state``), so that it goes wherever the graph goes. Before the first token every part is zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntc.errors import DataError
from ntc.spike_type import NodeType, from_json, to_json

__all__ = ["BATCH", "PAST", "StateSpec"]

BATCH = "B"
"""In a shape: the number of sequences."""

PAST = "P"
"""In a shape: the number of tokens so far."""


@dataclass(frozen=True)
class StateSpec:
    """One part of a state; zero before the first token.

    Attributes:
        name: Name of its placeholder, and of its input in an ONNX model.
        type: Type of its values.
        shape: Sizes, some of them ``B`` or ``P``. What has an axis ``P`` grows with every token; all else never does.
        dtype: Of its values.
    """

    name: str
    type: NodeType
    shape: tuple[int | str, ...]
    dtype: torch.dtype

    @property
    def grows(self) -> bool:
        """Whether it needs more room with every token."""
        return PAST in self.shape

    def sizes(self, batch: int, past: int) -> tuple[int, ...]:
        """The shape in numbers."""
        return tuple(size if isinstance(size, int) else {BATCH: batch, PAST: past}[size] for size in self.shape)

    def bytes(self, past: int) -> int:
        """Size for one sequence after so many tokens."""
        return math.prod(self.sizes(1, past)) * self.dtype.itemsize

    def initial(self, batch: int) -> Tensor:
        """The value before the first token of ``batch`` sequences."""
        return torch.zeros(self.sizes(batch, 0), dtype=self.dtype)

    def check(self, value: Tensor, batch: int, past: int) -> None:
        """Refuse a value that does not fit.

        Raises:
            DataError: Says what was wanted.
        """
        wanted = self.sizes(batch, past)
        if tuple(value.shape) != wanted or value.dtype != self.dtype:
            raise DataError(
                f"the state {self.name} is {value.dtype} of shape {list(value.shape)}; after {past} tokens of {batch} sequence(s) it is "
                f"{self.dtype} of shape {list(wanted)}"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain data; ``from_json`` is its inverse."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"name": self.name, "type": to_json(self.type), "shape": list(self.shape), "dtype": dtype}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> StateSpec:
        """The part that ``to_json`` wrote.

        Raises:
            ValueError: If it is none.
        """
        dtype, shape = getattr(torch, str(data["dtype"]), None), tuple(data["shape"])
        if not isinstance(dtype, torch.dtype) or any(size not in (BATCH, PAST) and not isinstance(size, int) for size in shape):
            raise ValueError(f"no state has the dtype {data['dtype']} and the shape {data['shape']}")
        return cls(str(data["name"]), from_json(data["type"]), shape, dtype)
