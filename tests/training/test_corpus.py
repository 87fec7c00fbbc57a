"""Training text: the ids that the tokenizer gives, each window once per epoch, the same windows on every run."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import lzma
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ntc.errors import DataError
from ntc.training import corpus as corpus_module
from ntc.training import token_stream
from ntc.training.corpus import PackedCorpus, StreamedCorpus, open_corpus
from ntc.training.token_stream import END, Lumps

ROOT = Path(__file__).parents[2]
EOS = 1


class Letters:
    """One token per character, and its number in Unicode; counts what it reads."""

    eos_token_id: int | None = EOS

    def __init__(self, eos: int | None = EOS) -> None:
        self.eos_token_id = eos
        self.read = 0

    def __call__(self, texts: list[str], add_special_tokens: bool, verbose: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        self.read += sum(map(len, texts))
        return {"input_ids": [[ord(c) for c in text] for text in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {"a": 97}


def opened(source: Any, window: int = 8, **options: Any) -> Any:
    return open_corpus(source, options.pop("tokenizer", Letters()), window, **{"seed": 0, "vocab_size": 1 << 16, **options})


def text_of(corpus: PackedCorpus) -> str:
    return "".join("$" if i == EOS else chr(i) for i in corpus._ids)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def example() -> ModuleType:
    """The script that trained the reference model, whose ids and windows ours are compared with."""
    spec = importlib.util.spec_from_file_location("train_gpt2", ROOT / "examples" / "train_gpt2.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(ROOT / "examples" / "gpt2-books")


# ------------------------------------------------------------------------------------------------ ids


def test_ids_and_windows_are_those_of_the_script_that_trained_the_reference(example: ModuleType, tokenizer: Any, tmp_path: Path) -> None:
    """Documents, line breaks in rows, a document of several lumps whose borders fall between them, a blank one."""
    sample = (ROOT / "examples" / "data" / "books-sample.txt").read_text(encoding="utf-8")[:6000]
    text = f"\n \n{sample}{END}\n\n{END}" + "\n\n\nit was\n".join("abcdefg" * 200) + f"\n{END}{END}\nend \u2028\x0c\n\n"
    path = tmp_path / "book.txt"
    path.write_text(text, encoding="utf-8")
    expected = example.encode(text, tokenizer)
    ours = opened(path, 16, tokenizer=tokenizer, vocab_size=len(tokenizer), seed=3)
    assert ours._ids.dtype == expected.dtype == np.uint16
    assert np.array_equal(ours._ids, expected)
    assert Counter(ours._ids.tolist())[tokenizer.eos_token_id] == 3
    assert ours.tokens == len(expected)
    assert ours.sha256 == hashlib.sha256(expected.astype("<i8").tobytes()).hexdigest()
    assert ours.steps_per_epoch(5) == example.steps_per_epoch(len(expected), 5, 16)
    for step in (0, 1, ours.steps_per_epoch(5) - 1, ours.steps_per_epoch(5), 7 * ours.steps_per_epoch(5) + 2, 1):
        assert torch.equal(ours.batch(step, 5), example.batch_at(expected, step, 5, 16, 3))


texts = st.text(st.sampled_from("ab \n\n\n"), max_size=60)


@given(st.lists(texts, min_size=1, max_size=5), st.lists(st.integers(0, 12), max_size=40))
def test_lumps_do_not_depend_on_how_the_text_arrives(documents: list[str], cuts: list[int]) -> None:
    """Oracle: the whole document split at once, as in examples/train_gpt2.py; here with lumps of 3 lines."""
    expected: list[str | None] = []
    for document in documents:
        if document.strip():
            lines = document.split("\n")
            for start in range(0, len(lines), 3):
                lump = "\n".join(lines[start : start + 3])
                expected.append(lump if start == 0 else "\n" + lump)
            expected.append(None)
    pieces = [piece for document in documents for piece in (*document, END)]  # the mark of the end is in one piece
    lumps, found = Lumps(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_stream, "LUMP_LINES", 3)
        for length in [*cuts, len(pieces)]:
            found += lumps.add("".join(pieces[:length]))
            pieces = pieces[length:]
            lumps = Lumps(lumps.rest, lumps.inside)  # a position that was left and taken up again
    assert found == expected
    assert not lumps.rest


def test_documents_end_with_end_of_text_and_windows_run_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"one{END}two\n")
    (tmp_path / "b.txt").write_text("three")
    corpus = opened([tmp_path / "a.txt", tmp_path / "b.txt"], 4)
    assert text_of(corpus) == "one$two\n$three$"
    assert corpus.description == "a.txt and 1 more, 15 tokens in windows of 4"
    assert text_of(opened([tmp_path / "a.txt"], 4, tokenizer=Letters(None))) == "onetwo\n"
    assert corpus.batch(0, 2).dtype == torch.int64


# ------------------------------------------------------------------------------------------------ formats


def _jsonl(field: str = "text") -> bytes:
    return "".join(json.dumps({"n": i, field: t}) + "\n" for i, t in enumerate(("one", None, "two\n", " ", f"th{END}ree"))).encode()


def _parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"n": [0, 1, 2], "body": ["one", None, "two\n"]}), path)


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz"])
def test_every_format_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    pack = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}[suffix]
    odd = tmp_path / "odd [1]* name"
    odd.mkdir()
    (odd / f"a.jsonl{suffix}").write_bytes(pack(_jsonl()))
    (odd / f"a*ö ?.txt{suffix}").write_bytes(pack(f"one{END}two\n{END} {END}th{END}ree".encode()))
    for name in (f"a.jsonl{suffix}", f"a*ö ?.txt{suffix}"):
        assert text_of(opened(odd / name, 2)) == "one$two\n$th$ree$"
    (odd / f"b.jsonl{suffix}").write_bytes(pack(_jsonl("body")))
    assert text_of(opened(odd / f"b.jsonl{suffix}", 2, text_field="body")) == "one$two\n$th$ree$"


def test_parquet_json_and_files_of_other_names(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet")
    assert text_of(opened(tmp_path / "a.parquet", 2, text_field="body")) == "one$two\n$"
    (tmp_path / "a.json").write_text('[{"text": "one"}, {"text": "two"}]')
    assert text_of(opened(tmp_path / "a.json", 2)) == "one$two$"
    (tmp_path / "a[0]").write_bytes(b"one")
    assert text_of(opened(tmp_path / "a[0]", 2)) == "one$"
    (tmp_path / "README").write_bytes(b"one\r\ntwo")
    assert text_of(opened(tmp_path / "README", 2)) == "one\ntwo$"


def test_folders_and_globs(tmp_path: Path) -> None:
    for name, text in (("b.txt", "bb"), ("a.txt", "aa"), ("deep/c.txt", "cc"), (".hidden/d.txt", "dd"), (".e.txt", "ee"), ("f.bin", "ff")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert text_of(opened(tmp_path, 2)) == "aa$bb$cc$"
    assert text_of(opened(str(tmp_path / "*.txt"), 2)) == "aa$bb$"
    assert text_of(opened(str(tmp_path / "**" / "*.txt"), 2)) == "aa$bb$cc$"
    assert text_of(opened([tmp_path / "b.txt", tmp_path / "*.txt"], 2)) == "bb$aa$"  # each once


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set in the cache of ``datasets``, where one that was downloaded lies."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    rows = datasets.Dataset.from_dict({"text": [f"document {i}" for i in range(200)], "n": list(range(200))})
    folder = tmp_path / "hub" / "someone___books" / "default" / "0.0.0" / ("0" * 40)
    folder.mkdir(parents=True)
    with datasets.arrow_writer.ArrowWriter(path=str(folder / "books-train.arrow"), features=rows.features) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    split = {"name": "train", "num_bytes": 1, "num_examples": 200, "dataset_name": "books"}
    info = {"features": rows.features.to_dict(), "builder_name": "json", "dataset_name": "books", "config_name": "default"}
    info |= {"version": {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0}, "splits": {"train": split}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return "someone/books"


def test_hub_data_set_from_the_cache(hub: str) -> None:
    expected = "".join(f"document {i}$" for i in range(200))
    assert text_of(opened(hub)) == expected
    assert opened(hub).description.startswith("someone/books, ")
    with pytest.raises(DataError, match="the data set someone/books has no split 'valid'; it has 'train'"):
        opened(hub, split="valid")
    with pytest.raises(DataError, match=r"someone/books has no field 'body' \(it has 'text', 'n'\)"):
        opened(hub, text_field="body")
    with pytest.raises(DataError, match="the field 'n' of someone/books holds int, not text"):
        opened(hub, text_field="n")
    with pytest.raises(DataError, match="cannot find the data set someone/books"):
        opened(hub + ":other")
    check_resuming(hub, buffer=7, rows=3)


# ------------------------------------------------------------------------------------------------ packed


@given(st.integers(20, 300), st.integers(2, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
def test_an_epoch_gives_each_window_at_most_once_and_processes_share_it(n: int, window: int, rows: int, world: int, seed: int) -> None:
    corpus = PackedCorpus(np.arange(n), window, seed, "numbers", "")
    if (n - window) // (window * rows * world) < 1:
        with pytest.raises(DataError, match=rf"numbers has {n} tokens, too few for one step of {rows * world} windows of {window}"):
            corpus.batch(0, rows, 0, world)
        return
    steps = corpus.steps_per_epoch(rows, world)
    for epoch in (0, 2):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            whole = corpus.batch(step, rows * world)
            assert torch.equal(whole, torch.cat([corpus.batch(step, rows, rank, world) for rank in range(world)]))
            seen.append(whole)
        windows = torch.cat(seen)
        assert windows.shape == (steps * rows * world, window)
        assert torch.equal(windows, windows[:, :1] + torch.arange(window))  # each is a piece of the text
        starts = windows[:, 0].tolist()
        assert len({s % window for s in starts}) == 1  # that do not overlap
        assert len(set(starts)) == len(starts)


def test_seeds_and_epochs_differ_and_a_step_does_not_depend_on_those_before() -> None:
    ids = np.arange(4000, dtype=np.uint32)
    a, b, fresh = (PackedCorpus(ids, 10, seed, "numbers", "") for seed in (0, 1, 0))
    steps = a.steps_per_epoch(4)
    first, later = a.batch(0, 4), a.batch(steps, 4)
    assert not torch.equal(first, b.batch(0, 4))
    assert not torch.equal(first, later)
    assert torch.equal(fresh.batch(steps, 4), later)
    assert torch.equal(fresh.batch(0, 4), first)


def test_cache_is_used_until_something_changes(tmp_path: Path) -> None:
    path, tokenizer, progress = tmp_path / "a.txt", Letters(), []
    path.write_text("abcdefgh" * 9)
    first = opened(path, tokenizer=tokenizer, progress=lambda *p: progress.append(p))
    assert tokenizer.read == 72
    assert progress[-1] == (73, "a.txt")
    assert isinstance(first._ids, np.memmap)
    again = opened(path, 5, tokenizer=tokenizer, seed=7)
    assert tokenizer.read == 72  # the window and the seed are no part of what is kept
    assert (again.sha256, again.tokens) == (first.sha256, 73)
    assert torch.equal(first.batch(0, 3), opened(path, tokenizer=tokenizer).batch(0, 3))
    opened(path, tokenizer=tokenizer, cache_dir=tmp_path / "own")
    assert tokenizer.read == 2 * 72
    assert sorted(p.suffix for p in (tmp_path / "own" / "tokens").iterdir()) != []
    opened(path, tokenizer=Letters(2), cache_dir=tmp_path / "own")
    assert len([p for p in (tmp_path / "own" / "tokens").iterdir() if p.is_dir()]) == 2  # another tokenizer, other ids
    os.utime(path, ns=(1, 1))
    opened(path, tokenizer=tokenizer)
    assert tokenizer.read == 3 * 72


@pytest.mark.parametrize("damage", ["short", "gone", "mixed", "nonsense"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh" * 9)
    before = opened(path, cache_dir=tmp_path)
    (folder,) = (p for p in (tmp_path / "tokens").iterdir() if p.is_dir())
    ids, about = folder / "tokens.npy", folder / "tokens.json"
    if damage == "short":
        ids.write_bytes(ids.read_bytes()[:-2])
    elif damage == "gone":
        ids.unlink()
    elif damage == "mixed":
        np.save(ids, np.full(9, 65, "<u2"))
    else:
        about.write_text("[1]")
    assert np.array_equal(opened(path, cache_dir=tmp_path)._ids, np.frombuffer(b"abcdefgh" * 9 + bytes([EOS]), np.uint8))
    assert opened(path, cache_dir=tmp_path).sha256 == before.sha256


def test_processes_that_open_at_once_wait_for_the_one_that_packs(tmp_path: Path) -> None:
    path, tokenizer, found = tmp_path / "a.txt", Letters(), []
    path.write_text("abcdefgh" * 2000)
    threads = [threading.Thread(target=lambda: found.append(opened(path, tokenizer=tokenizer).sha256)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert tokenizer.read == 16000


def test_a_failure_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"text " * 10 + b"\xff")
    with pytest.raises(DataError, match=r"a.txt is no UTF-8 text"):
        opened(tmp_path / "a.txt", cache_dir=tmp_path)
    assert [p.suffix for p in (tmp_path / "tokens").iterdir() if not p.name.endswith(".lock")] == []


def test_ids_beyond_16_bits(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\U0001f600b" * 9, encoding="utf-8")
    corpus = opened(tmp_path / "a.txt", vocab_size=1 << 17)
    assert corpus._ids.dtype == np.uint32
    assert corpus._ids[:3].tolist() == [ord("a"), 0x1F600, ord("b")]


# ------------------------------------------------------------------------------------------------ streamed


def drawn(corpus: Any, steps: range, rows: int) -> list[list[list[int]]]:
    return [corpus.batch(step, rows).tolist() for step in steps]


def check_resuming(source: Any, buffer: int, rows: int, steps: int = 12, **options: Any) -> None:
    """Stopped before every step and taken up in a new corpus: the same windows."""
    whole = opened(source, streaming=True, shuffle_buffer=buffer, **options)
    states, expected = [], []
    for step in range(steps):
        states.append(json.dumps(whole.state_dict()))
        expected.append(whole.batch(step, rows).tolist())
    for stop in range(steps):
        other = opened(source, streaming=True, shuffle_buffer=buffer, **options)
        other.load_state_dict(json.loads(states[stop]))
        assert other.state_dict() == json.loads(states[stop])
        assert drawn(other, range(stop, steps), rows) == expected[stop:]


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


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("streaming", [False, True])
def test_what_cannot_be_read(tmp_path: Path, streaming: bool) -> None:
    def refused(name: str, content: bytes, message: str, **options: Any) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message) as error:
            opened(tmp_path / name, streaming=streaming, **options).batch(0, 1)
        assert "\n" not in str(error.value)

    too_short = "is too short for windows of 8"
    for content in (b"", b" \n\t\n", f"{END}\n{END}".encode()):
        refused("empty.txt", content, too_short if streaming else "empty.txt: there is no text in it")
    refused("bad.txt", b"\xff\xfe\x00\x80", "bad.txt is no UTF-8 text")
    refused("bad.txt.xz", b"plain", "bad.txt.xz cannot be read as text: Input format not supported")
    refused("cut.txt.xz", lzma.compress(b"text" * 99)[:-8], "cut.txt.xz cannot be read as text: Compressed file ended")
    refused("bad.txt.gz", b"plain", "bad.txt.gz cannot be read as text: Not a gzipped file")
    refused("bad.jsonl", b'{"text": "a"}\nnonsense\n', "bad.jsonl cannot be read as json: JSON parse error")
    refused("bad.parquet", b"plain", "bad.parquet cannot be read as parquet: Parquet")
    refused("field.jsonl", b'{"body": "a"}\n', r"field.jsonl has no field 'text' \(it has 'body'\); name the one .* as text_field")
    refused("number.jsonl", b'{"text": 3}\n', "the field 'text' of number.jsonl holds int, not text; name another text_field")
    _parquet(tmp_path / "field.parquet")
    with pytest.raises(DataError, match=r"field.parquet has no field 'text' \(it has 'n', 'body'\)"):
        opened(tmp_path / "field.parquet", streaming=streaming).batch(0, 1)
    for name in ("a[0].txt.gz", "a\\b.jsonl.xz", "a::b.txt"):
        refused(name, b"", r"holds '.{1,2}' in its name, by which it cannot be read: rename the file")
    refused("short.txt", b"abc", too_short if streaming else r"short.txt has 4 tokens, too few for one step of 1 windows of 8: at least 16")
    refused("words.txt", b"abcdefgh" * 9, "gives the id 104, and the vocabulary has 104 tokens", vocab_size=104)


def test_what_is_not_there(tmp_path: Path) -> None:
    for source in ("absent.txt", "absent.txt.xz", "./absent", "/no/such", "a/b/c", "absent.gz", tmp_path / "absent"):
        with pytest.raises(DataError, match=rf"there is no file or folder {source}$"):
            opened(source)
    for source in ("absent", "someone/absent", "someone/absent-1.0"):
        with pytest.raises(DataError, match=f"there is no file or folder {source}, and no data set of that name in the cache; the hub"):
            opened(source)
    with pytest.raises(DataError, match=r"no file matches .*\*\.txt"):
        opened(str(tmp_path / "*.txt"))
    (tmp_path / "a.bin").touch()
    with pytest.raises(DataError, match=f"the folder {tmp_path} holds no training text"):
        opened(tmp_path)
    with pytest.raises(DataError, match="no training text: name at least one"):
        opened([])


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh" * 9)
    corpus = opened(path)
    with pytest.raises(DataError, match="gives the id 104, and the vocabulary has 104 tokens"):
        opened(path, vocab_size=104)  # from the cache
    assert opened(path, vocab_size=105).tokens == 73
    for bad in ((-1, 2, 0, 1), (0, 0, 0, 1), (0, 2, 1, 1), (0, 2, -1, 1)):
        with pytest.raises(DataError, match="steps and processes count from 0"):
            corpus.batch(*bad)
    with pytest.raises(DataError, match="a window has at least 2 tokens, got 1"):
        opened(path, 1)
    with pytest.raises(DataError, match="the seed of the data is not negative, got -1"):
        opened(path, seed=-1)
    with pytest.raises(DataError, match="a shuffle buffer holds at least 1 window, got 0"):
        opened(path, streaming=True, shuffle_buffer=0)
    with pytest.raises(DataError, match="the model has no tokenizer"):
        opened(path, tokenizer=None)
    with pytest.raises(DataError, match=r"cannot keep the tokens of a.txt in .*a.txt: .*; choose another cache_dir, or stream"):
        opened(path, cache_dir=path)


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, ntc, ntc.cli, ntc.training.corpus, ntc.training.curve\n"
        "found = {'datasets', 'accelerate', 'matplotlib', 'pyarrow', 'pandas', 'filelock'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_a_full_disk_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh" * 9)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus_module, "_write", full)
    with pytest.raises(DataError, match=r"cannot keep the tokens of a.txt in .*: .*No space left on device; choose another cache_dir"):
        opened(tmp_path / "a.txt")
