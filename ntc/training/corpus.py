r"""The training text as windows of token ids: any size of corpus, the same windows on every run.

A corpus is the stream of ids of its documents, cut into windows of W tokens. With N tokens, R windows per step and the seed
s, epoch e has (N - W) // (W R) steps. Its windows start at o + W p_k: the offset o, uniform in [0, W), and the permutation p
of the (N - o) // W windows behind it are drawn from a generator seeded with (s, e). So the windows of a step are a pure
function of (s, step): a run that was killed goes on with the same data, in whatever process.

Packed, the ids lie in one memory-mapped file, which is made once and kept in a cache: any step is there at once, and memory
holds 8 bytes per window. Streamed, nothing is kept on disk; the windows come in order through a shuffle buffer.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntc.errors import ArtifactError, DataError
from ntc.folders import replacing_folder
from ntc.training.sources import Part, find_parts, names_of
from ntc.training.streamed import StreamedCorpus
from ntc.training.token_stream import END, LUMP_LINES, TokenStream, check_vocabulary, tokenizer_sha256
from ntc.training.windows import Corpus, PackedCorpus

__all__ = ["Corpus", "PackedCorpus", "StreamedCorpus", "open_corpus"]

_FORMAT = 1  # of the cache: with another number, everything is packed anew
_IDS, _ABOUT = "tokens.npy", "tokens.json"


def _nothing(tokens: int, source: str) -> None:
    return None


def open_corpus(
    sources: str | Path | Sequence[str | Path],
    tokenizer: Any,
    window: int,
    *,
    seed: int,
    vocab_size: int,
    text_field: str = "text",
    split: str = "train",
    streaming: bool = False,
    shuffle_buffer: int = 2048,
    cache_dir: str | Path | None = None,
    progress: Callable[[int, str], None] = _nothing,
) -> Corpus:
    """Open training text.

    Documents end at ``<|endoftext|>``, at the end of a file, and with the row in formats that have rows; the tokenizer's
    end-of-text token, if it has one, follows each of them. Windows run on over the ends of documents and leave nothing out
    but the tail.

    Args:
        sources: Files (plain text, ``.jsonl``, ``.json``, each also ``.xz`` or ``.gz``; ``.parquet``), folders and globs of
            such files, data sets on the Hugging Face hub (``name`` or ``owner/name``, with ``:config`` behind it).
        tokenizer: A Hugging Face tokenizer.
        window: W, tokens per window, at least 2.
        seed: Of the order of the windows, not negative.
        vocab_size: Tokens that the model knows; ids beyond are refused.
        text_field: Column of the text, in formats that have columns.
        split: Split of a hub data set.
        streaming: Read in order and keep nothing on disk, instead of packing the ids into a file first.
        shuffle_buffer: Windows that are permuted at a time when streaming.
        cache_dir: Where packed ids are kept [default: ``ntc`` in ``$XDG_CACHE_HOME`` or ``~/.cache``]. Any of it may be
            deleted; it is made again. Processes that open the same text at once wait for the one that packs it.
        progress: Called while packing, with (tokens so far, name of the source).

    Raises:
        DataError: If a source is missing or cannot be read, holds no text or no such field, if the ids are those of another
            model's tokenizer, or if the cache cannot be written.
    """
    if tokenizer is None:
        raise DataError("the model has no tokenizer, so no text can be read as tokens")
    if window < 2:
        raise DataError(f"a window has at least 2 tokens, got {window}")
    parts = find_parts(sources, split)
    if streaming:
        return StreamedCorpus(parts, tokenizer, window, seed, vocab_size, text_field, shuffle_buffer)
    root = Path(cache_dir) if cache_dir is not None else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ntc"
    ids, sha256 = _pack(parts, tokenizer, vocab_size, text_field, root.expanduser(), progress)
    return PackedCorpus(ids, window, seed, names_of(parts), sha256)


def _pack(
    parts: Sequence[Part], tokenizer: Any, vocab_size: int, text_field: str, root: Path, progress: Callable[[int, str], None]
) -> tuple[NDArray[Any], str]:
    """The ids of all parts in one memory-mapped array, from the cache or into it; and their hash."""
    from filelock import FileLock

    kind = np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")
    what = [_FORMAT, [p.identity for p in parts], tokenizer_sha256(tokenizer), text_field, END, LUMP_LINES, kind.str]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    folder = root / "tokens" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', parts[0].name)[:60]}-{key[:16]}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            packed = _load(folder, key)
            if packed is None:
                with replacing_folder(folder) as beside:
                    _write(TokenStream(parts, tokenizer, text_field, vocab_size), parts, beside, key, kind, progress)
                packed = _load(folder, key)
    except (OSError, ArtifactError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot keep the tokens of {names_of(parts)} in {root}: {reason}; choose another cache_dir, or stream") from error
    if packed is None:
        raise DataError(f"the tokens in {folder} cannot be read back: delete that folder, or choose another cache_dir")
    ids, sha256, highest = packed
    check_vocabulary(highest, vocab_size)
    return ids, sha256


def _write(
    stream: TokenStream, parts: Sequence[Part], folder: Path, key: str, kind: np.dtype[Any], progress: Callable[[int, str], None]
) -> None:
    digest, count, highest = hashlib.sha256(), 0, 0
    header = {"descr": kind.str, "fortran_order": False}
    with (folder / _IDS).open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (0,)})
        begin = file.tell()
        for ids in stream:
            file.write(ids.astype(kind).tobytes())
            digest.update(ids.astype("<i8").tobytes())
            count, highest = count + len(ids), max(highest, int(ids.max(initial=0)))
            progress(count, parts[min(stream.part, len(parts) - 1)].name)
        file.seek(0)  # numpy leaves room for the array to grow: the header is as long as before
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (count,)})
        if file.tell() != begin:
            raise RuntimeError("the header of a .npy file grew over its data")
    if not count:
        raise DataError(f"{names_of(parts)}: there is no text in it")
    about = {"key": key, "tokens": count, "highest": highest, "sha256": digest.hexdigest()}
    (folder / _ABOUT).write_text(json.dumps(about) + "\n", encoding="utf-8")


def _load(folder: Path, key: str) -> tuple[NDArray[Any], str, int] | None:
    """What was packed under this key; None if there is nothing, or something else than was written."""
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        ids = np.load(folder / _IDS, mmap_mode="r", allow_pickle=False)
        if about["key"] == key and ids.shape == (about["tokens"],):
            return ids, str(about["sha256"]), int(about["highest"])
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        pass
    return None
