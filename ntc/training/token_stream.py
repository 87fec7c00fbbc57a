"""Text to one long stream of token ids: documents one after another, each followed by the tokenizer's end-of-text token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntc.errors import DataError
from ntc.training.sources import Part

__all__ = ["END", "LUMP_LINES", "Lumps", "TokenStream", "check_vocabulary", "tokenizer_sha256"]

#: Ends a document wherever it stands in a text.
END = "<|endoftext|>"
#: Lines that are tokenized at once: the memory of a tokenizer grows with its text.
LUMP_LINES = 2000


class Lumps:
    """Cuts text that comes in pieces into lumps of lines, and says where documents end.

    The first lump of a document is its first ``LUMP_LINES`` lines; each further one begins with the line break before its
    first line. Joined, the lumps are the document. Documents of white space only are left out.
    Pieces may end anywhere but within ``END``.

    Args:
        rest: What ``rest`` was when the reading stopped.
        inside: What ``inside`` was.
    """

    def __init__(self, rest: str = "", inside: bool = False) -> None:
        self.rest = rest  # not yet cut off
        self.inside = inside  # a lump of this document has been cut off already

    def add(self, text: str) -> list[str | None]:
        """The lumps that are complete with this piece; None where a document ends."""
        lumps: list[str | None] = []
        *ended, last = (self.rest + text).split(END)
        for self.rest in ended:
            lumps += self._cut()
            if self.inside or self.rest.strip():
                lumps += [self.rest, None]
            self.inside = False
        self.rest = last
        return lumps + self._cut()

    def _cut(self) -> list[str | None]:
        if not self.inside and not self.rest.strip():
            return []  # whether it is a document at all is not yet known
        lumps: list[str | None] = []
        lines = self.rest.split("\n")
        at = 1 if self.inside else 0  # a further lump begins with a line break: no line stands before it
        while len(lines) - at > LUMP_LINES:
            lumps.append(("\n" if self.inside else "") + "\n".join(lines[at : at + LUMP_LINES]))
            at += LUMP_LINES
            self.inside = True
        self.rest = ("\n" if self.inside else "") + "\n".join(lines[at:])
        return lumps


class TokenStream:
    """The token ids of some sources, once through, with a position from which another stream goes on exactly.

    Args:
        parts: The sources, in order.
        tokenizer: A Hugging Face tokenizer. Without an ``eos_token_id``, nothing stands between documents.
        text_field: Column of the text in formats that have columns.
        vocab_size: Ids beyond it are refused.
        position: Of an earlier stream over the same parts.
    """

    def __init__(
        self, parts: Sequence[Part], tokenizer: Any, text_field: str, vocab_size: int, position: Mapping[str, Any] | None = None
    ) -> None:
        self._parts, self._tokenizer, self._field, self._vocab_size = parts, tokenizer, text_field, vocab_size
        at = dict(position or {"part": 0, "rows": None, "rest": "", "inside": False})
        self.part: int = at["part"]
        self._rows: dict[str, Any] | None = at["rows"]
        self._lumps = Lumps(at["rest"], at["inside"])

    @property
    def position(self) -> dict[str, Any]:
        """Behind the ids that came last: plain data, with at most one lump of text that is read and not yet tokenized."""
        return {"part": self.part, "rows": self._rows, "rest": self._lumps.rest, "inside": self._lumps.inside}

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        """Ids in arrays of no particular size.

        Raises:
            DataError: If a source cannot be read, or the tokenizer gives an id beyond the vocabulary.
        """
        while self.part < len(self._parts):
            part = self._parts[self.part]
            for pieces, behind in part.pieces(self._field, self._rows):
                text = "".join(pieces) if part.kind == "text" else END.join([*pieces, ""])
                lumps, self._rows = self._lumps.add(text), behind
                yield self._ids(lumps)
            self.part, self._rows = self.part + 1, None
            yield self._ids(self._lumps.add(END))  # a file ends its last document

    def _ids(self, lumps: Sequence[str | None]) -> NDArray[np.int64]:
        texts = [lump for lump in lumps if lump is not None]
        if not texts:
            return np.empty(0, np.int64)
        encoded = iter(self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
        eos = self._tokenizer.eos_token_id
        end = [] if eos is None else [eos]
        ids = np.concatenate([np.asarray(end if lump is None else next(encoded), np.int64) for lump in lumps])
        check_vocabulary(int(ids.max(initial=0)), self._vocab_size)
        return ids


def check_vocabulary(highest: int, vocab_size: int) -> None:
    """Refuse ids that the model does not know.

    Raises:
        DataError: If the highest id is none of 0..vocab_size-1.
    """
    if highest >= vocab_size:
        raise DataError(f"the tokenizer belongs to another model: it gives the id {highest}, and the vocabulary has {vocab_size} tokens")


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of everything that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        for how_to_call in ("truncation", "padding"):  # left behind by whoever called it last
            rules.pop(how_to_call, None)
    else:
        rules = [type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps([rules, tokenizer.eos_token_id], sort_keys=True).encode()).hexdigest()
