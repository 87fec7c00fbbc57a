"""ntc generate: text as it comes, JSON, standard input, ends, and one sentence for what does not work."""

from __future__ import annotations

import io
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ntc.artifact import load
from tests.cli.conftest import TEXT, run_ntc, save_tokenizer
from tests.cli.test_commands import check_keys, result, shown

PROMPT = "the quick"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As everywhere, but its texts end with the last token of the vocabulary, which it does not choose here."""
    from ntc.testing import tiny_gpt2

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_gpt2(vocab_size=30, n_layer=1, bos_token_id=29, eos_token_id=29).save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "calibration.txt").write_text(TEXT * 10, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def compiled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled") / "tiny"
    ran = run_ntc("compile", model, "-o", folder, "--no-measure")
    assert ran.code == 0, ran.err
    return folder


def greedy(folder: Path, count: int) -> list[int]:
    """By running the compiled program on the whole text each time."""
    from ntc.loading import load_tokenizer

    program, ids = load(folder), load_tokenizer(folder / "tokenizer")(PROMPT)["input_ids"]
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(program(torch.tensor([ids]))[0, -1].argmax()))
    return ids[start:]


def test_json(compiled: Path) -> None:
    data = result("generate", compiled, PROMPT, "--max-tokens", 6)
    check_keys("generate", data)
    assert data["tokens"] == greedy(compiled, 6)
    assert len(data["logprobs"]) == 6
    assert all(p <= 0 for p in data["logprobs"])
    assert data["reason"] == "length"
    assert (data["temperature"], data["top_k"], data["top_p"], data["seed"]) == (0, 0, 1, 0)
    assert 0 < data["firing_rate"] < 1
    assert data["steps"] == 4
    assert data["state_bytes"] > 8
    assert data["state_bytes_per_token"] == 0
    assert data["context"] == 24
    assert data["tokens_per_second"] > 0


def test_text_goes_to_standard_output_and_figures_do_not(compiled: Path) -> None:
    ran = run_ntc("generate", compiled, PROMPT, "--max-tokens", 6)
    assert ran.code == 0
    assert ran.out == result("generate", compiled, PROMPT, "--max-tokens", 6)["text"] + "\n"
    assert re.search(r"6 tokens, [\d.]+ tokens/s; T = 4, [\d.]+ % of the neurons fire at a step", ran.err)


def test_text_comes_piece_by_piece(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntc.cli import generate_command

    written: list[str] = []

    class Watched(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Watched())
    generate_command.generate(compiled, PROMPT, max_tokens=5)
    assert len([text for text in written if text.strip()]) >= 4


def test_draws_and_their_seed(compiled: Path) -> None:
    def drawn(*options: object) -> dict[str, Any]:
        return result("generate", compiled, PROMPT, "--max-tokens", 8, *options)

    first, again, other = drawn("--seed", 1), drawn("--seed", 1), drawn("--seed", 2)
    assert first["tokens"] == again["tokens"] != other["tokens"]
    assert first["temperature"] == 1, "who gives a seed wants draws"
    assert drawn("--top-k", 1)["tokens"] == drawn("--greedy")["tokens"] == greedy(compiled, 8)


def test_the_prompt_from_standard_input(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    data = result("generate", compiled, "-", "--max-tokens", 3)
    assert data["prompt"] == PROMPT
    assert data["tokens"] == greedy(compiled, 3)


def test_the_original_model(model: Path) -> None:
    data = result("generate", model, PROMPT, "--max-tokens", 4)
    check_keys("generate", data)
    assert data["firing_rate"] is None
    assert data["steps"] == 0
    assert data["state_bytes_per_token"] == 2 * 32 * 4, "keys and values of one layer"


def test_ends(compiled: Path) -> None:
    full = run_ntc("generate", compiled, PROMPT)
    assert full.code == 0
    assert "the model's context of 24 tokens is full" in full.err
    data = result("generate", compiled, PROMPT)
    assert data["reason"] == "context"
    assert len(data["prompt_tokens"]) + len(data["tokens"]) == 25
    stop = data["text"][3:6]
    assert stop
    short = result("generate", compiled, PROMPT, "--stop", "zzzz", "--stop", stop)
    assert short["reason"] == "stop"
    assert short["text"] == data["text"][: data["text"].index(stop)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x" * 30], "the prompt has 30 tokens, and the model's context takes 24: shorten it"),
        ([""], "the prompt is empty"),
        ([PROMPT, "--greedy", "--top-k", "3"], "--greedy takes the most probable token, and --top-k is about draws"),
        ([PROMPT, "--temperature", "-1"], "a temperature is a number of at least 0"),
        ([PROMPT, "--top-p", "2"], "top-p is a probability"),
        ([PROMPT, "--max-tokens", "0"], "max-tokens"),
    ],
)
def test_bad_input_is_one_sentence(compiled: Path, arguments: list[str], message: str) -> None:
    ran = run_ntc("generate", compiled, *arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert message in ran.err
    assert len(ran.err.strip().splitlines()) == 1


def test_folders_without_a_program_or_a_tokenizer(compiled: Path, tmp_path: Path) -> None:
    for folder, message in ((tmp_path / "none", "there is no folder"), (tmp_path, "config.json")):
        ran = run_ntc("generate", folder, PROMPT)
        assert ran.code == 2
        assert message in ran.err
    bare = Path(shutil.copytree(compiled, tmp_path / "bare"))
    shutil.rmtree(bare / "tokenizer")
    ran = run_ntc("generate", bare, PROMPT)
    assert ran.code == 2
    assert "holds no tokenizer" in ran.err


def test_help_has_an_example() -> None:
    assert re.search(r"Examples:\s+ntc generate", shown("generate", "--help"))
