"""Streamed training text: a reading of the whole text in each epoch, taken up again exactly."""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pytest
import torch

from ntc.errors import DataError
from ntc.training import token_stream
from ntc.training.corpus import StreamedCorpus
from ntc.training.token_stream import END
from tests.training.corpus_cases import Letters, check_resuming, drawn, opened


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Three formats, each read in several pieces, with positions in the middle of documents."""
    from ntc.training import sources

    monkeypatch.setattr(sources, "_ROWS", {"text": 3})
    monkeypatch.setattr(sources, "_ROWS_OF_DOCUMENTS", 2)
    monkeypatch.setattr(token_stream, "LUMP_LINES", 2)
    numbers = iter(range(32, 2000))
    (tmp_path / "a.txt").write_text("\n".join("".join(chr(next(numbers)) for _ in range(9)) for _ in range(17)) + END + "\nx\n\n")
    documents = ["\n".join("".join(chr(next(numbers)) for _ in range(11)) for _ in range(n)) for n in (1, 0, 7, 3, 2)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    (tmp_path / "c.txt.xz").write_bytes(lzma.compress("".join(chr(next(numbers)) for _ in range(50)).encode()))
    return tmp_path


@pytest.mark.parametrize(("buffer", "rows"), [(1, 1), (5, 2), (1000, 3), (7, 4)])
def test_streaming_resumes_exactly(several: Path, buffer: int, rows: int) -> None:
    check_resuming(several, buffer, rows, steps=20)


def test_a_streamed_epoch_is_the_whole_text_but_its_ends(several: Path) -> None:
    """The windows of an epoch are those of the files in some order, from some offset, each of them once."""
    files = ("a.txt", "b.jsonl", "c.txt.xz")
    ids = {name: opened(several / name, 2)._ids.tolist() for name in files}
    corpus = opened(several, streaming=True, shuffle_buffer=10, seed=5)
    epochs: dict[int, list[tuple[int, ...]]] = {}
    for step in range(200):
        window = tuple(corpus.batch(step, 1)[0].tolist())
        epochs.setdefault(corpus.state_dict()["epoch"], []).append(window)
    readings = {  # by what a reading of the text gives: in which order and from which offset it was read
        tuple(sorted(tuple(text[s : s + 8]) for s in range(offset, len(text) - 7, 8))): (order, offset)
        for order in permutations(files)
        for text in [[i for name in order for i in ids[name]]]
        for offset in range(8)
    }
    assert list(epochs) == list(range(len(epochs)))
    found = [readings[tuple(sorted(windows))] for windows in list(epochs.values())[:-1]]  # the last one is not at its end
    assert len({order for order, _ in found}) > 1
    assert len({offset for _, offset in found}) > 1


def test_a_streamed_buffer_is_permuted(several: Path) -> None:
    one, many = (opened(several / "a.txt", streaming=True, shuffle_buffer=n, window=4) for n in (1, 12))
    a, b = drawn(one, range(12), 1), drawn(many, range(12), 1)
    assert a != b
    assert sorted(a) == sorted(b)
    again = drawn(many, range(12, 24), 1)
    in_order = drawn(one, range(12, 24), 1)
    assert sorted(again) == sorted(in_order)
    assert [a.index(w) for w in b] != [in_order.index(w) for w in again]  # each bufferful in its own way


def test_streaming_processes_share_each_step(several: Path) -> None:
    whole = opened(several, streaming=True, shuffle_buffer=6)
    shares = [opened(several, streaming=True, shuffle_buffer=6) for _ in range(3)]
    for step in range(5):
        assert torch.equal(whole.batch(step, 6), torch.cat([c.batch(step, 2, rank, 3) for rank, c in enumerate(shares)]))


def test_streaming_refuses_jumps(several: Path, tmp_path: Path) -> None:
    corpus = opened(several, streaming=True)
    assert isinstance(corpus, StreamedCorpus)
    assert corpus.tokens is None
    assert corpus.steps_per_epoch(4) is None
    assert corpus.description == "a.txt and 2 more, streamed in windows of 8"
    corpus.batch(0, 2)
    for step in (0, 2):
        with pytest.raises(DataError, match=f"streamed windows come in order: step 1 is next, not {step}"):
            corpus.batch(step, 2)
    corpus.batch(1, 2)
    assert not list(Path(os.environ["XDG_CACHE_HOME"]).iterdir())


def test_a_state_of_other_data_is_refused(several: Path) -> None:
    for streaming in (False, True):
        state = opened(several, streaming=streaming).state_dict()
        for options, what in (
            ({"window": 9}, "window"), ({"seed": 1}, "seed"), ({"source": several / "a.txt"}, "text or tokenizer"),
            ({"tokenizer": Letters(2)}, "text or tokenizer"), ({"streaming": not streaming}, "text or tokenizer"),
            *([({"shuffle_buffer": 3}, "shuffle buffer")] if streaming else []),
        ):  # fmt: skip
            other = opened(**{"source": several, "streaming": streaming, **options})
            with pytest.raises(DataError, match=f"the run was begun with another {what} than this one"):
                other.load_state_dict(state)
        opened(several, streaming=streaming).load_state_dict(state)
