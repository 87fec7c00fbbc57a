"""A corpus that is read in order and never kept: for text that is not to be copied, or of which only a little will be read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ntc.errors import DataError
from ntc.training.sources import Part, names_of
from ntc.training.token_stream import TokenStream, tokenizer_sha256
from ntc.training.windows import Corpus

__all__ = ["StreamedCorpus"]


class StreamedCorpus(Corpus):
    """Windows in the order of the text, permuted a bufferful at a time.

    A buffer is filled, permuted by a generator seeded with (seed, epoch, number of the buffer) and emptied. So a position is a
    place in the text and how much of the buffer has been given out; the buffer itself is read again. Each epoch goes
    through the sources in another order and begins at another offset. Every process reads the whole text.

    Args:
        parts: The sources.
        tokenizer: A Hugging Face tokenizer.
        window: W.
        seed: Of the order of the windows.
        vocab_size: Ids beyond it are refused.
        text_field: Column of the text in formats that have columns.
        shuffle_buffer: Windows per buffer.
    """

    def __init__(
        self, parts: Sequence[Part], tokenizer: Any, window: int, seed: int, vocab_size: int, text_field: str, shuffle_buffer: int
    ) -> None:
        if shuffle_buffer < 1:
            raise DataError(f"a shuffle buffer holds at least 1 window, got {shuffle_buffer}")
        what = json.dumps([[p.content for p in parts], tokenizer_sha256(tokenizer), text_field])
        self._name = names_of(parts)
        super().__init__(
            window, seed, None, f"{self._name}, streamed in windows of {window}", hashlib.sha256(what.encode()).hexdigest()
        )
        self._parts, self._tokenizer, self._vocab_size, self._field = parts, tokenizer, vocab_size, text_field
        self._size, self._step = shuffle_buffer, 0
        self._begin(0)

    def steps_per_epoch(self, rows: int, world: int = 1) -> None:
        """None: how long the text is shows at its end."""
        self._check(0, rows, 0, world)

    def batch(self, step: int, rows: int, rank: int = 0, world: int = 1) -> Tensor:
        """The windows of the next step, ``[rows, W]`` int64.

        Raises:
            DataError: If this is not the next step, or the text is shorter than a window.
        """
        self._check(step, rows, rank, world)
        if step != self._step:
            raise DataError(
                f"streamed windows come in order: step {self._step} is next, not {step}; load the state that was saved at that step, "
                "or open the text without streaming"
            )
        windows = [self._next() for _ in range(rows * world)]
        self._step += 1
        return torch.from_numpy(np.stack(windows[rank * rows : (rank + 1) * rows]))

    def state_dict(self) -> dict[str, Any]:
        """The step, the buffer, and the place in the text where that buffer begins."""
        return {
            "sha256": self.sha256, "window": self.window, "seed": self.seed, "shuffle_buffer": self._size, "step": self._step,
            "epoch": self._epoch, "buffer": self._buffer, "given": self._given, "position": self._place[0], "skip": self._place[1],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict()`` was taken.

        Raises:
            DataError: If the state is that of another text, or of other windows.
        """
        super().load_state_dict(state)
        self._step = state["step"]
        self._begin(state["epoch"], (state["position"], state["skip"]))
        if state["buffer"] >= 0:
            self._fill(state["buffer"])
        self._given = state["given"]

    def _begin(self, epoch: int, place: tuple[dict[str, Any] | None, int] | None = None) -> None:
        random = np.random.default_rng((self.seed, epoch, 0))
        parts = [self._parts[i] for i in random.permutation(len(self._parts))]
        position, skip = place or (None, int(random.integers(self.window)))
        self._reader = _Reader(TokenStream(parts, self._tokenizer, self._field, self._vocab_size, position), skip)
        self._place: tuple[dict[str, Any] | None, int] = (position, skip)
        self._epoch, self._buffer, self._given = epoch, -1, 0
        self._windows: NDArray[np.int64] = np.empty((0, self.window), np.int64)

    def _fill(self, number: int) -> None:
        """Read the next buffer, shorter at the end of the text; what does not fill a window there is left out."""
        self._place = self._reader.place
        ids = self._reader.take(self._size * self.window)
        windows = ids[: len(ids) // self.window * self.window].reshape(-1, self.window)
        self._windows = np.random.default_rng((self.seed, self._epoch, 1 + number)).permutation(windows)
        self._buffer, self._given = number, 0

    def _next(self) -> NDArray[np.int64]:
        if self._given == len(self._windows):
            self._fill(self._buffer + 1)
        if not len(self._windows) and self._buffer > 0:
            self._begin(self._epoch + 1)
            self._fill(0)
        if not len(self._windows):
            raise DataError(
                f"{self._name} is too short for windows of {self.window} tokens: at least {2 * self.window - 1} tokens are "
                "needed; use more text, or shorter windows"
            )
        self._given += 1
        window: NDArray[np.int64] = self._windows[self._given - 1]
        return window


class _Reader:
    """Takes ids from a stream by number; the first ``skip`` are left out, when first something is taken.

    Attributes:
        place: (position, skip) with which another reader over the same parts would go on here.
    """

    def __init__(self, stream: TokenStream, skip: int) -> None:
        self._stream, self._arrays, self._skip = stream, iter(stream), skip
        self._before, self._array, self._at = stream.position, np.empty(0, np.int64), 0

    @property
    def place(self) -> tuple[dict[str, Any], int]:
        return self._before, self._at + self._skip

    def take(self, count: int) -> NDArray[np.int64]:
        """The next ids, fewer at the end of the text."""
        skip, self._skip = self._skip, 0
        if skip:
            self.take(skip)
        taken = [np.empty(0, np.int64)]
        while count:
            if self._at == len(self._array):
                before = self._stream.position
                array = next(self._arrays, None)
                if array is None:
                    break
                self._before, self._array, self._at = before, array, 0
            some = self._array[self._at : self._at + count]
            taken.append(some)
            count, self._at = count - len(some), self._at + len(some)
        return np.concatenate(taken)
