"""Text: windows that do not overlap, hashes of ids, one clear sentence for what cannot be read."""

from __future__ import annotations

import hashlib
import lzma
from pathlib import Path

import pytest
import torch

from ntc.errors import DataError
from ntc.text import Tokens, calibration_from, random_tokens, read_text, tokens_from


class Letters:
    """One token per character, as a Hugging Face tokenizer gives them; remembers how much it was asked to read."""

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self.read: list[int] = []

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        self.read.append(len(text))
        return {"input_ids": [ord(c) for c in text[:: self.every]]}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 3, encoding="utf-8")
    return path


def test_windows_follow_one_another_and_the_rest_is_left_out(text: Path) -> None:
    tokens = tokens_from(text, Letters(), window=8)
    assert tokens.windows.shape == (3, 8)
    assert "".join(map(chr, tokens.windows.flatten())) == ("abcdefghij" * 3)[:24]
    assert tokens.count == 24
    assert tokens.description == "text.txt, 24 tokens in windows of 8"
    assert tokens.sha256 == hashlib.sha256(tokens.windows.numpy().astype("<i8").tobytes()).hexdigest()
    assert [len(b) for b in tokens.batches(2)] == [2, 1]


def test_a_short_text_is_one_shorter_window(text: Path) -> None:
    assert tokens_from(text, Letters(), window=100).windows.shape == (1, 30)
    assert tokens_from(text, Letters(), window=8, max_tokens=11).windows.shape == (1, 8)
    assert tokens_from(text, Letters(), window=8, max_tokens=5).windows.shape == (1, 5)


def test_a_few_tokens_of_a_long_text_cost_little(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("ab" * 100_000, encoding="utf-8")
    quick = Letters()
    tokens_from(path, quick, window=10, max_tokens=100)
    assert quick.read == [16 * 100 + 4096]
    rare = Letters(every=1000)  # a tokenizer with very long tokens: the prefix is not enough
    assert tokens_from(path, rare, window=10, max_tokens=100).count == 100
    assert rare.read == [16 * 100 + 4096, 200_000]


def test_compressed_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt.xz"
    path.write_bytes(lzma.compress("Grüße".encode()))
    assert read_text(path) == "Grüße"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="is no UTF-8 text"):
        read_text(path)
    path.write_bytes(b"plain")
    with pytest.raises(DataError, match="is no UTF-8 text"):
        read_text(path)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the text .*absent.txt: No such file"):
        read_text(tmp_path / "absent.txt")
    with pytest.raises(DataError, match="cannot read the text"):
        read_text(tmp_path)
    for content, message in ((b"", "is empty"), (b" \n\t", "is empty"), (b"\xff\xfe\x00\x80", "is no UTF-8 text")):
        path = tmp_path / "bad.txt"
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_text(path)


def test_tokens_that_do_not_fit(text: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a window has at least 2 tokens, got 1"):
        tokens_from(text, Letters(), window=1)
    with pytest.raises(DataError, match="at least 2 tokens are needed, got 1"):
        tokens_from(text, Letters(), window=4, max_tokens=1)
    with pytest.raises(DataError, match="the model has no tokenizer"):
        tokens_from(text, None, window=4)
    with pytest.raises(DataError, match="gives the id 106, and the vocabulary has 106 tokens"):
        tokens_from(text, Letters(), window=4, vocab_size=106)
    assert tokens_from(text, Letters(), window=4, vocab_size=107).count == 28
    one = tmp_path / "one.txt"
    one.write_text("a")
    with pytest.raises(DataError, match=r"gives 1 token\(s\); at least 2 are needed"):
        tokens_from(one, Letters(), window=4)


def test_random_tokens_are_repeatable() -> None:
    a, b = random_tokens(61, 12, 100), random_tokens(61, 12, 100)
    assert a.windows.shape == (8, 12)
    assert a.sha256 == b.sha256 != random_tokens(61, 12, 100, seed=1).sha256
    assert int(a.windows.max()) < 61
    assert random_tokens(61, 12, 5).windows.shape == (1, 12)


def test_calibration_keeps_every_token_and_its_origin() -> None:
    tokens = Tokens(torch.arange(35).view(5, 7), "numbers", "abc")
    calibration = calibration_from(tokens, rows=2)
    assert [len(b) for b in calibration.batches] == [2, 2, 1]
    assert torch.equal(torch.cat(calibration.batches), tokens.windows)
    assert (calibration.tokens, calibration.description, calibration.sha256) == (35, "numbers", "abc")
