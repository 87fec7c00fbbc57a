"""Text to token windows: for calibration, evaluation and energy measurement."""

from __future__ import annotations

import hashlib
import lzma
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntc.errors import DataError
from ntc.pipeline import Calibration

__all__ = ["Tokens", "calibration_from", "random_tokens", "read_text", "tokens_from", "tokens_of"]


@dataclass(frozen=True)
class Tokens:
    """Token ids in non-overlapping windows.

    Attributes:
        windows: ``[N, W]``.
        description: Where they come from.
        sha256: Hash of the ids, so that a figure can be tied to its data.
        file_sha256: Hash of the file that they were read from; empty if there is none.
    """

    windows: Tensor
    description: str
    sha256: str
    file_sha256: str = ""

    @property
    def count(self) -> int:
        """Number of tokens."""
        return self.windows.numel()

    def batches(self, rows: int) -> tuple[Tensor, ...]:
        """The windows in batches of at most ``rows``."""
        return tuple(self.windows[i : i + rows] for i in range(0, len(self.windows), rows))

    def first(self, rows: int) -> Tokens:
        """The first windows alone, under a description and a hash of their own."""
        few = _tokens(self.windows[:rows], self.description.rsplit(f", {self.count:,} tokens", 1)[0])
        return replace(few, file_sha256=self.file_sha256)


def read_text(path: Path) -> str:
    """Read UTF-8 text, plain or ``.xz``.

    Raises:
        DataError: If the file is missing, empty, or no UTF-8 text.
    """
    try:
        if path.suffix == ".xz":
            with lzma.open(path, "rt", encoding="utf-8") as file:
                text = file.read()
        else:
            text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read the text {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path} is no UTF-8 text: {error}") from error
    if not text.strip():
        raise DataError(f"the text {path} is empty")
    return text


def tokens_from(path: Path, tokenizer: Any, window: int, max_tokens: int | None = None, vocab_size: int | None = None) -> Tokens:
    """Tokenize a file and cut it into non-overlapping windows; what does not fill a window is left out.

    A text shorter than one window gives one shorter window.

    Args:
        path: UTF-8 text, plain or ``.xz``.
        tokenizer: A Hugging Face tokenizer.
        window: Tokens per window, at least 2.
        max_tokens: Use only so many tokens from the start.
        vocab_size: Refuse ids beyond it: the tokenizer then belongs to another model.

    Raises:
        DataError: If the text cannot be read or holds fewer than two tokens.
    """
    if window < 2:
        raise DataError(f"a window has at least 2 tokens, got {window}")
    if max_tokens is not None and max_tokens < 2:
        raise DataError(f"at least 2 tokens are needed, got {max_tokens}")
    if tokenizer is None:
        raise DataError(f"the model has no tokenizer, so the text {path} cannot be read as tokens")
    text = read_text(path)
    # A token is rarely longer than 16 characters: a short prefix is enough for a few tokens, and long files stay quick.
    lump = text if max_tokens is None else text[: 16 * max_tokens + 4096]
    ids = tokenizer(lump, verbose=False)["input_ids"]
    if max_tokens is not None and len(ids) < max_tokens and len(lump) < len(text):
        ids = tokenizer(text, verbose=False)["input_ids"]
    ids = ids[:max_tokens] if max_tokens is not None else ids
    if len(ids) < 2:
        raise DataError(f"the text {path} gives {len(ids)} token(s); at least 2 are needed")
    if vocab_size is not None and max(ids) >= vocab_size:
        raise DataError(f"the tokenizer belongs to another model: it gives the id {max(ids)}, and the vocabulary has {vocab_size} tokens")
    width = min(window, len(ids))
    flat = torch.tensor(ids[: len(ids) // width * width], dtype=torch.long)
    with path.open("rb") as file:
        return replace(_tokens(flat.view(-1, width), path.name), file_sha256=hashlib.file_digest(file, "sha256").hexdigest())


def random_tokens(vocab_size: int, window: int, count: int, seed: int = 0) -> Tokens:
    """Uniform random ids, for a model without a tokenizer: shapes are real, statistics are not."""
    rows = max(1, count // window)
    ids = torch.randint(0, vocab_size, (rows, window), generator=torch.Generator().manual_seed(seed))
    return _tokens(ids, "random tokens")


def _tokens(windows: Tensor, name: str) -> Tokens:
    digest = hashlib.sha256(windows.numpy().astype("<i8").tobytes()).hexdigest()
    return Tokens(windows, f"{name}, {windows.numel():,} tokens in windows of {windows.shape[1]}", digest)


def tokens_of(calibration: Calibration, count: int) -> Tokens:
    """The first windows of a calibration text, ``count`` tokens or one window."""
    windows = torch.cat([b for b in calibration.batches if b.shape[1] == calibration.batches[0].shape[1]])
    return _tokens(windows[: max(1, count // windows.shape[1])], calibration.description.rsplit(", ", 1)[0])


def calibration_from(tokens: Tokens, rows: int = 4) -> Calibration:
    """Tokens as calibration batches of ``rows`` windows."""
    return Calibration(tokens.batches(rows), tokens.description, tokens.sha256)
