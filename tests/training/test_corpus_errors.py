"""Training text that cannot be used: one clear sentence each, packed or streamed."""

from __future__ import annotations

import lzma
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ntc.errors import DataError
from ntc.training import corpus as corpus_module
from ntc.training.token_stream import END
from tests.training.corpus_cases import opened, write_parquet


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))



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
    write_parquet(tmp_path / "field.parquet")
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
