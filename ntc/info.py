"""What is known of a program beside its graph: the model that it came from, and the passes that ran over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ntc.errors import DataError

__all__ = ["ModelInfo", "PassRecord", "check_ids"]


@dataclass(frozen=True)
class ModelInfo:
    """What is known of the model that was captured.

    Attributes:
        source: Path or hub id, or the class name of a module.
        architecture: Class of the model.
        vocab_size: V, size of the last axis of the logits.
        context: Most tokens that the model can take, 0 if not limited.
        parameters: Number of parameters, tied ones counted once.
        config: The Hugging Face config, if there is one.
    """

    source: str
    architecture: str
    vocab_size: int
    context: int = 0
    parameters: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PassRecord:
    """One line of a program's history.

    Attributes:
        name: Name of the pass.
        options: Its options as plain data.
        sites: Places that it rewrote or annotated.
        missed: Places that it left alone, with the reason.
        seconds: Time it took.
        drift: Largest difference of the logits on the example input before and after; None if not measured.
        notes: What the pass measured or decided, as plain data.
    """

    name: str
    options: Mapping[str, Any]
    sites: int
    missed: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    drift: float | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data; timings stay out, so that the same input gives the same bytes."""
        data = asdict(self)
        del data["seconds"]
        data["missed"] = [list(m) for m in self.missed]
        return data


def check_ids(input_ids: Tensor, info: ModelInfo) -> None:
    """Refuse token ids that the network cannot take."""
    if not isinstance(input_ids, Tensor):
        raise DataError(f"a program takes a tensor of token ids of shape [B, L], not a {type(input_ids).__name__}")
    if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise DataError(f"a program takes token ids of shape [B, L], got {input_ids.dtype} of shape {tuple(input_ids.shape)}")
    if not torch.compiler.is_compiling() and not input_ids.numel():
        raise DataError(f"a program takes at least one token, got ids of shape {tuple(input_ids.shape)}")
    if info.context and input_ids.shape[1] > info.context:
        raise DataError(f"{input_ids.shape[1]} tokens are more than the model's context of {info.context}")
    if not torch.compiler.is_compiling():
        low, top = int(input_ids.min()), int(input_ids.max())
        if low < 0 or top >= info.vocab_size:
            raise DataError(f"token id {low if low < 0 else top} is outside the vocabulary of {info.vocab_size} tokens")
