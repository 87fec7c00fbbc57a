"""Windows of token ids, a batch per step: what every corpus can do, and the one whose ids lie in an array."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ntc.errors import DataError
from ntc.text import Tokens

__all__ = ["Corpus", "PackedCorpus"]


class Corpus(ABC):
    """Windows of token ids, a batch per step.

    Attributes:
        window: W, tokens per window.
        seed: Of the order of the windows.
        tokens: N, or None if the text is not read in advance.
        description: Where they come from.
        sha256: Hash of the ids as little-endian int64; when streaming, of what the sources are and how they are read.
    """

    def __init__(self, window: int, seed: int, tokens: int | None, description: str, sha256: str) -> None:
        if window < 2:
            raise DataError(f"a window has at least 2 tokens, got {window}")
        if seed < 0:
            raise DataError(f"the seed of the data is not negative, got {seed}")
        self.window, self.seed, self.tokens, self.description, self.sha256 = window, seed, tokens, description, sha256

    @abstractmethod
    def steps_per_epoch(self, rows: int, world: int = 1) -> int | None:
        """Steps of ``rows`` windows in each of ``world`` processes in one pass over the text; None when streaming.

        Raises:
            DataError: If the text is too short for one step.
        """

    @abstractmethod
    def batch(self, step: int, rows: int, rank: int = 0, world: int = 1) -> Tensor:
        """The windows of one step, ``[rows, W]`` int64.

        Together, processes 0..world-1 with ``rows`` windows each see what one process with ``rows * world`` windows sees.

        Args:
            step: Counted from 0.
            rows: Windows of this process.
            rank: Number of this process.
            world: Number of processes.

        Raises:
            DataError: If the text is too short for one step; when streaming, also if this is not the next step.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold: plain data."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict()`` was taken.

        Raises:
            DataError: If the state is that of another text, or of other windows.
        """
        mine = self.state_dict()
        for key, what in (("sha256", "text or tokenizer"), ("window", "window"), ("seed", "seed"), ("shuffle_buffer", "shuffle buffer")):
            if state.get(key) != mine.get(key):
                raise DataError(
                    f"the run was begun with another {what} than this one ({self.description}, seed {self.seed}): "
                    "go on with the same data, or begin a new run"
                )

    def _check(self, step: int, rows: int, rank: int, world: int) -> None:
        if step < 0 or rows < 1 or not 0 <= rank < world:
            raise DataError(
                f"there is no batch of {rows} windows at step {step} in process {rank} of {world}: "
                "steps and processes count from 0, windows from 1"
            )


class PackedCorpus(Corpus):
    """Windows of an array of ids, in memory or memory-mapped: any step at once.

    Args:
        ids: ``[N]`` integers.
        window: W.
        seed: Of the order of the windows.
        name: Where they come from.
        sha256: Of the ids as little-endian int64.
    """

    def __init__(self, ids: NDArray[Any], window: int, seed: int, name: str, sha256: str) -> None:
        super().__init__(window, seed, len(ids), f"{name}, {len(ids):,} tokens in windows of {window}", sha256)
        self._ids, self._name = ids, name
        self._epoch: int | None = None
        self._starts: NDArray[np.int64] = np.empty(0, np.int64)

    def steps_per_epoch(self, rows: int, world: int = 1) -> int:
        """Steps of ``rows`` windows in each of ``world`` processes in one pass, whatever the offset of the epoch.

        Raises:
            DataError: If the text is too short for one step.
        """
        self._check(0, rows, 0, world)
        steps = (len(self._ids) - self.window) // (self.window * rows * world)
        if steps < 1:
            raise DataError(
                f"{self._name} has {len(self._ids):,} tokens, too few for one step of {rows * world} windows of {self.window}: "
                f"at least {self.window * (rows * world + 1):,} are needed; use more text, or fewer or shorter windows"
            )
        return steps

    def batch(self, step: int, rows: int, rank: int = 0, world: int = 1) -> Tensor:
        """The windows of one step, ``[rows, W]`` int64: a pure function of (ids, window, seed) and the arguments."""
        self._check(step, rows, rank, world)
        epoch, within = divmod(step, self.steps_per_epoch(rows, world))
        if epoch != self._epoch:
            random = np.random.default_rng((self.seed, epoch))
            offset = int(random.integers(self.window))
            self._starts = offset + self.window * random.permutation((len(self._ids) - offset) // self.window)
            self._epoch = epoch
        first = (within * world + rank) * rows
        windows = [self._ids[start : start + self.window] for start in self._starts[first : first + rows]]
        return torch.from_numpy(np.stack(windows).astype(np.int64))

    def split(self, windows: int) -> tuple[PackedCorpus, Tokens]:
        """Hold out the end of the text: the corpus without its last ``windows`` windows, and those, for validation.

        The hash of the rest is derived from that of the whole and the number of tokens held out, not taken over its ids.

        Raises:
            DataError: If nothing is left to train on.
        """
        count = windows * self.window
        if not 0 < count < len(self._ids) - self.window:
            raise DataError(
                f"{self._name} has {len(self._ids):,} tokens, too few to hold out {windows} windows of {self.window} for validation: "
                "give a validation text, or shorter windows"
            )
        digest = hashlib.sha256(f"{self.sha256} without its last {count} tokens".encode()).hexdigest()
        ids = torch.from_numpy(self._ids[-count:].astype(np.int64)).view(windows, self.window)
        held_out = Tokens(ids, f"end of {self._name}, {count:,} tokens in windows of {self.window}", _sha256_of(ids))
        return PackedCorpus(self._ids[:-count], self.window, self.seed, self._name, digest), held_out

    def state_dict(self) -> dict[str, Any]:
        """What the windows depend on: with that and the number of a step, they are known."""
        return {"sha256": self.sha256, "window": self.window, "seed": self.seed}


def _sha256_of(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()
