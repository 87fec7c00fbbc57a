"""Text from a program, token by token: its streaming form with a state, a rule that picks the next token, pieces of text.

>>> import ntc
>>> for token in ntc.generate(program, prompt_ids, max_tokens=20, temperature=0.8, seed=1): ...    # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntc.errors import ConfigError, DataError
from ntc.pipeline import run_pipeline
from ntc.program import Program
from ntc.registry import find_pass
from ntc.streaming import Stream

__all__ = ["Generated", "Generation", "Pieces", "Sampling", "generate", "streaming_form"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked from logits.

    Attributes:
        temperature: Divides the logits; 0 takes the most probable token, whatever the rest says.
        top_k: Draw from so many most probable tokens only; 0 = from all.
        top_p: Draw from the most probable tokens that have this probability together; 1 = from all.
        seed: Of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"a temperature is a number of at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"top-k is a number of tokens, or 0 for all of them, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p is a probability in (0, 1], got {self.top_p}")

    def processors(self) -> Any:
        """The logits processors of transformers that it stands for, in transformers' order."""
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        chosen = LogitsProcessorList()
        if self.temperature not in (0.0, 1.0):
            chosen.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            chosen.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            chosen.append(TopPLogitsWarper(self.top_p))
        return chosen


@dataclass(frozen=True)
class Generated:
    """One token.

    Attributes:
        token: Its id.
        logprob: Logarithm of its probability by the program, before temperature and top-k or top-p [nats].
    """

    token: int
    logprob: float


class Generation(Iterator[Generated]):
    """A text in progress: an iterator over its new tokens.

    Attributes:
        stream: The program with its state.
        ids: All tokens that the program has been given, the prompt first.
        reason: Why it ended: ``length``, ``stop`` (a stop token, which is left out) or ``context``; empty while it goes on.
    """

    def __init__(self, program: Program, prompt: Tensor, max_tokens: int | None, sampling: Sampling, stop: Collection[int]) -> None:
        self.stream, self.ids, self.reason = Stream(program), [], ""
        self._next: Tensor | None = prompt
        self._left, self._stop, self._greedy = max_tokens, frozenset(stop), sampling.temperature == 0
        self._processors = sampling.processors()
        self._generator = torch.Generator().manual_seed(sampling.seed)

    ids: list[int]

    def __next__(self) -> Generated:
        if self.reason or self._left == 0:
            self.reason = self.reason or "length"
            raise StopIteration
        assert self._next is not None
        if self.stream.program.info.context and self.stream.position + self._next.shape[1] > self.stream.program.info.context:
            self.reason = "context"
            raise StopIteration
        logits = self.stream(self._next)[:, -1]
        self.ids += self._next[0].tolist()
        token = self._pick(logits)
        if token in self._stop:
            self.reason = "stop"
            raise StopIteration
        self._left = None if self._left is None else self._left - 1
        self._next = torch.tensor([[token]])
        return Generated(token, float(logits[0].double().log_softmax(-1)[token]))

    def _pick(self, logits: Tensor) -> int:
        if self._greedy:
            return int(logits[0].argmax())
        scores = self._processors(torch.tensor([self.ids]), logits)
        return int(torch.multinomial(scores[0].softmax(-1), 1, generator=self._generator))


def generate(
    program: Program,
    ids: Tensor | Sequence[int],
    *,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Collection[int] = (),
) -> Generation:
    """Continue a sequence of tokens: the first run takes all of ``ids``, every other one token.

    The same arguments give the same tokens.

    Args:
        program: Any program; one that does not stream yet is turned into one that does.
        ids: Token ids of the prompt, ``[L]`` or ``[1, L]``.
        max_tokens: Most new tokens; by default as many as the context takes, without end if it is not limited.
        temperature: Of the draws; 0 takes the most probable token.
        top_k: Draw from so many most probable tokens; 0 = from all.
        top_p: Draw from the most probable tokens with that probability together.
        seed: Of the draws.
        stop: Tokens that end the text; they are not part of it.

    Returns:
        An iterator over the new tokens (see ``Generation``).

    Raises:
        ConfigError: For a setting out of range.
        DataError: If there is no prompt, or the context does not take it.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    if max_tokens is not None and max_tokens < 0:
        raise ConfigError(f"max_tokens is a number of tokens, got {max_tokens}")
    prompt = torch.as_tensor(ids)
    prompt = prompt.unsqueeze(0) if prompt.dim() == 1 else prompt
    if prompt.dim() != 2 or len(prompt) != 1 or not prompt.numel() or prompt.is_floating_point():
        raise DataError(f"a prompt is at least one token id, [L] or [1, L], got {prompt.dtype} of shape {list(prompt.shape)}")
    context = program.info.context
    if context and prompt.numel() > context:
        raise DataError(f"the prompt has {prompt.numel()} tokens, and the model's context takes {context}: shorten it")
    return Generation(streaming_form(program), prompt, max_tokens, sampling, stop)


def streaming_form(program: Program) -> Program:
    """The program with a state; itself if it has one.

    Raises:
        PassError: If it holds something that has no streaming form.
    """
    if "streaming" in program.facts:
        return program
    names = [*([] if "canonical" in program.facts else ["canonicalize"]), "to-streaming"]
    return run_pipeline(program, [find_pass(name)() for name in names])


class Pieces:
    """Text of tokens as they come, given out when it is certain: no half characters, nothing of a stop text.

    Args:
        tokenizer: A Hugging Face tokenizer.
        prompt: Tokens before the first one; some tokenizers write a space between two tokens only.
        stop: Texts that end the text; they are not part of it.

    Attributes:
        stopped: Whether a stop text has come.
    """

    _TAIL, _LONGEST = 8, 4  # tokens of the prompt that are decoded along; bytes of a character

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop, self.stopped = tokenizer, [text for text in stop if text], False
        self._ids = list(prompt)[-self._TAIL :]
        self._from, self._read = 0, len(self._ids)  # decoded along; given out
        self._held = ""  # decoded, but perhaps the beginning of a stop text

    def push(self, token: int) -> str:
        """What has become certain with one more token."""
        self._ids.append(token)
        return self._decoded(whole=False)

    def rest(self) -> str:
        """What was held back, when no token will follow."""
        text = self._decoded(whole=True)
        if self.stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _decoded(self, whole: bool) -> str:
        if self.stopped or self._read == len(self._ids):
            return ""
        known, text = self._text(self._from, self._read), self._text(self._from, len(self._ids))
        # The replacement character stands for the bytes of a character that is not whole yet, or never will be.
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not whole and len(self._ids) - self._read < self._LONGEST:
            return ""
        self._from, self._read = self._read, len(self._ids)
        return self._before_stop(text[len(known) :])

    def _text(self, start: int, stop: int) -> str:
        return str(self.tokenizer.decode(self._ids[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _before_stop(self, piece: str) -> str:
        text = self._held + piece
        if found := [at for at in (text.find(stop) for stop in self.stop) if at >= 0]:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        begun = max((n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]
