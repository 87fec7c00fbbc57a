"""Training text: the ids that the tokenizer gives, each window once per epoch, the same windows on every run."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import lzma
import os
import threading
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ntc.errors import DataError
from ntc.training import token_stream
from ntc.training.corpus import PackedCorpus
from ntc.training.token_stream import END, Lumps
from tests.training.corpus_cases import EOS, Letters, check_resuming, opened, text_of, write_parquet

ROOT = Path(__file__).parents[2]
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
    write_parquet(tmp_path / "a.parquet")
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
