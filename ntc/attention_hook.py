"""What attention of a Hugging Face model becomes while it is exported: one op of ours, and no mask arithmetic.

transformers lets attention be a function of choice, and asks a second function for the mask that the first is given. Ours makes no mask:
for a sliding window it hands on a token that says how wide, and the attention function reads it. So the window that is captured is the
one that the model masks with, also where the example is too short to show the difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import ntc.ops
from ntc.errors import CaptureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["our_attention"]

_NAME = "ntc"

_NOT_CAPTURED = ("position_bias", "sinks", "indices", "block_indices")
"""What attention functions of transformers are given beside the usual: numbers added to scores or keys, and tokens picked."""

_PICKED = ("index_topk", "indexer_budget")
"""Fields of a config that say how many tokens an indexer leaves to attend to."""


class _NoTensor:
    """Stands where transformers hands on a mask: the attention function reads it, and a model that computes with its mask cannot."""

    def _refused(self, *args: Any) -> Any:
        raise TypeError("it computes with its mask itself, where ntc has the attention function read it")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refused
    __and__ = __rand__ = __or__ = __ror__ = __invert__ = __getitem__ = _refused


@dataclass(frozen=True)
class _Window(_NoTensor):
    """A sliding window: the number of tokens that a token sees, itself among them."""

    tokens: int


class _Other(_NoTensor):
    """A mask that is neither the causal one nor one of a sliding window."""


def _mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> _Window | _Other | None:
    """The mask function that transformers calls while we export; None is the causal mask.

    What a model adds to its mask (``or_mask_function``, ``and_mask_function``, blocks that see all of themselves) comes as another
    function, and masks of encoders with an option of their own. Such a mask may be the causal one on a short example, and another one on a
    long text.
    """
    kind = getattr(kwargs.get("mask_function"), "__qualname__", "")
    if kwargs.get("use_vmap") or "allow_is_bidirectional_skip" in kwargs or kind.startswith("or_masks"):
        return _Other()
    return None if local_size is None else _Window(int(local_size))


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function that transformers calls while we export: heads ``[B, H, L, D]`` in, ``[B, L, H, D]`` out."""
    name = type(module).__name__
    if getattr(module, "is_causal", True) is False:
        raise CaptureError(f"{name} says that it is not causal (is_causal = False): ntc compiles causal language models, not encoders")
    if kwargs.get("s_aux") is not None:
        raise CaptureError(f"{name} has attention sinks (s_aux), a score of no token in every softmax, which ntc does not capture")
    more = next((given for given in _NOT_CAPTURED if kwargs.get(given) is not None), None)
    if more:
        raise CaptureError(f"{name} is given {more} beside queries, keys and values, which ntc does not capture")
    mask = attention_mask  # some models give it by this name
    if mask is not None and not isinstance(mask, _Window):
        raise CaptureError(f"{name} is given a mask of the model's own making; ntc captures causal masks, with or without a sliding window")
    window, told = _seen(module, mask.tokens if mask is not None else None), _seen(module, kwargs.get("sliding_window"))
    if told and told != window:
        had = f"one of {window}" if window else "no window"
        raise CaptureError(f"{name} is told of a sliding window of {told} tokens and given a mask with {had}; ntc cannot tell which holds")

    def merged(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    arguments = (merged(query), merged(key), merged(value), query.shape[1], key.shape[1], float(scale))
    softcap = float(kwargs.get("softcap") or 0.0)
    bounds = (window, softcap) if window or softcap else ()
    y: Tensor = (torch.ops.ntc.windowed_attention if bounds else torch.ops.ntc.attention)(*arguments, *bounds)
    return y.unflatten(-1, (query.shape[1], -1)), None  # type: ignore[no-untyped-call]


def _seen(module: nn.Module, window: Any) -> int:
    """The window in tokens; 0 for none, or for one that holds all tokens that the model takes."""
    limit = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    return 0 if window is None or (limit and int(window) >= int(limit)) else int(window)


@contextmanager
def our_attention(model: PreTrainedModel) -> Iterator[None]:
    """Switch a model to our attention function, and back.

    Raises:
        CaptureError: If its attention cannot be replaced, or is none that can be told by a window.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ()
    if "chunked_attention" in kinds:
        raise CaptureError(f"{type(model).__name__} attends within chunks of its text (chunked_attention), which ntc does not capture")
    if "linear_attention" in kinds and getattr(config, "block_size", None):  # torch takes the number of blocks for a constant
        name = type(model).__name__
        raise CaptureError(f"{name} computes linear attention block by block (block_size {config.block_size}), which ntc does not capture")
    for field in _PICKED:
        if picked := getattr(config, field, None):
            name = type(model).__name__
            raise CaptureError(f"{name} attends to {picked} tokens that an indexer picks ({field}), which ntc does not capture")
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(_NAME)
    except Exception as error:
        raise CaptureError(f"{type(model).__name__} does not let its attention be replaced: {error}") from error
    try:
        yield
    finally:
        model.set_attn_implementation(before or "eager")


_ = ntc.ops  # registers the ops that it makes
