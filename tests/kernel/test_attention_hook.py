"""What the attention function refuses while a model is exported, each in one sentence, and what it reads off a mask."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from ntc import CaptureError
from ntc.attention_hook import _attention, _mask, our_attention
from ntc.testing import tiny_gpt2


class Layer(nn.Module):
    """An attention module, as far as the function looks at it."""

    def __init__(self, context: int | None = 24, **more: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=context)
        for name, value in more.items():
            setattr(self, name, value)


def heads() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, H, L, D]`` with two key heads for four."""
    return tuple(torch.randn(2, n, 6, 3, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 2))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("layer", "mask", "given", "sentence"),
    [
        (Layer(is_causal=False), None, {}, "Layer says that it is not causal (is_causal = False): ntc compiles causal language models, not encoders"),
        (Layer(), None, {"s_aux": torch.zeros(4)}, "Layer has attention sinks (s_aux), a score of no token in every softmax"),
        (Layer(), None, {"position_bias": torch.zeros(6, 6)}, "Layer is given position_bias beside queries, keys and values"),
        (Layer(), torch.zeros(6, 6), {}, "Layer is given a mask of the model's own making"),
        (Layer(), _mask(use_vmap=True), {}, "Layer is given a mask of the model's own making"),
        (Layer(), None, {"sliding_window": 4}, "Layer is told of a sliding window of 4 tokens and given a mask with no window"),
        (Layer(), _mask(local_size=3), {"sliding_window": 4}, "a sliding window of 4 tokens and given a mask with one of 3"),
    ],
)
def test_refusals(layer: Layer, mask: Any, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CaptureError) as caught:
        _attention(layer, *heads(), mask, **given)
    assert sentence in str(caught.value)


def test_what_a_model_adds_to_its_mask_is_seen_though_the_example_would_not_show_it() -> None:
    """Through transformers' own functions, which are called with more than we ask for."""
    model = tiny_gpt2(n_layer=1)
    text = {"config": model.config, "inputs_embeds": torch.zeros(1, 6, 32), "attention_mask": None, "past_key_values": None}

    def always(batch: Any, head: Any, query: Any, key: Any) -> Tensor:
        return torch.tensor(True)

    with our_attention(model):
        assert create_causal_mask(**text) is None
        for more in ({"and_mask_function": always}, {"or_mask_function": always}, {"block_sequence_ids": torch.full((1, 6), -1)}):
            with pytest.raises(CaptureError, match="Layer is given a mask of the model's own making"):
                _attention(Layer(), *heads(), create_causal_mask(**text, **more))
        with pytest.raises(CaptureError, match="Layer is given a mask of the model's own making"):
            _attention(Layer(), *heads(), create_bidirectional_mask(model.config, text["inputs_embeds"], None))


def test_a_model_that_computes_with_its_mask_is_told_so() -> None:
    scores = torch.zeros(1, 4, 6, 6)
    for compute in (lambda mask: scores + mask, lambda mask: mask[:, :, :, :6], lambda mask: ~mask, lambda mask: (1 - mask) * -1e9):
        for mask in (_mask(local_size=4), _mask(use_vmap=True)):
            with pytest.raises(TypeError, match="it computes with its mask itself"):
                compute(mask)


def test_chunks_are_refused() -> None:
    chunked = SimpleNamespace(layer_types=["chunked_attention", "full_attention"])
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: chunked))
    with pytest.raises(CaptureError, match=r"SimpleNamespace attends within chunks of its text \(chunked_attention\)"), our_attention(model):
        pass


def test_linear_attention_by_blocks_is_refused() -> None:
    """MiniMax: as captured it holds for the number of blocks of the example, and torch says so in a guard only."""
    blocked = SimpleNamespace(layer_types=["full_attention", "linear_attention"], block_size=256)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: blocked))
    with pytest.raises(CaptureError, match=r"computes linear attention block by block \(block_size 256\)"), our_attention(model):
        pass


@pytest.mark.parametrize("field", ["index_topk", "indexer_budget"])
def test_an_indexer_is_refused(field: str) -> None:
    indexed = SimpleNamespace(**{field: 2048})
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: indexed))
    with pytest.raises(CaptureError, match=rf"SimpleNamespace attends to 2048 tokens that an indexer picks \({field}\)"), our_attention(model):
        pass


@pytest.mark.parametrize(
    ("context", "size", "softcap", "window"),
    [(24, None, None, 0), (24, 4, None, 4), (None, 4, None, 4), (24, 24, None, 0), (24, 4, 0.5, 4), (24, None, 0.5, 0)],
)
def test_window_and_cap_are_what_the_mask_and_the_layer_say(context: int | None, size: int | None, softcap: float | None, window: int) -> None:
    q, k, v = heads()
    got, _ = _attention(Layer(context), q, k, v, _mask(local_size=size), scaling=0.7, softcap=softcap)
    scores = q @ k.repeat_interleave(2, 1).transpose(-2, -1) * 0.7
    scores = torch.tanh(scores / softcap) * softcap if softcap else scores
    distance = torch.arange(6)[:, None] - torch.arange(6)
    hidden = (distance < 0) | ((distance >= window) if window else torch.tensor(False))
    expected = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(got, expected.transpose(1, 2), rtol=0, atol=1e-5)
