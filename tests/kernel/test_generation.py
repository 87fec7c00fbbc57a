"""Generation: the parallel program on the whole text each time gives the same tokens; draws; ends; pieces of text are whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import canonical, spiking

import ntc
from ntc.errors import ConfigError, DataError
from ntc.generation import Generated, Pieces, Sampling, generate, streaming_form
from ntc.program import Program
from ntc.testing import NanoGPT, example_ids, tiny_gpt2

PROMPT = example_ids(batch=1, length=5)[0].tolist()


def logits_of(program: Program, ids: list[int]) -> torch.Tensor:
    """Of the last position, the whole text at once."""
    with torch.no_grad():
        return program(torch.tensor([ids]))[0, -1]


def by_whole_texts(program: Program, count: int) -> list[int]:
    ids = list(PROMPT)
    for _ in range(count):
        ids.append(int(logits_of(program, ids).argmax()))
    return ids[len(PROMPT) :]


def tokens(program: Program, **settings: Any) -> list[int]:
    return [new.token for new in generate(program, PROMPT, **settings)]


@pytest.mark.parametrize("program", [canonical, spiking])
def test_greedy_equals_running_the_whole_text_each_time(program: Any) -> None:
    expected = by_whole_texts(program(), 19)
    found = list(generate(program(), PROMPT, max_tokens=19))
    assert [new.token for new in found] == expected
    assert len(set(expected)) > 3, "a text that only repeats itself would prove little"
    for n, new in enumerate(found):
        logprob = logits_of(program(), PROMPT + expected[:n]).double().log_softmax(-1)[new.token]
        assert new.logprob == pytest.approx(float(logprob), abs=1e-4)


def test_a_model_as_it_was_captured_generates_too() -> None:
    captured = ntc.capture(tiny_gpt2())
    assert "canonical" not in captured.facts
    assert tokens(captured, max_tokens=6) == by_whole_texts(captured, 6)
    stream = streaming_form(canonical())
    assert streaming_form(stream) is stream
    assert tokens(stream, max_tokens=6) == by_whole_texts(canonical(), 6)
    nano = ntc.capture(NanoGPT(layers=1), example_ids())
    assert tokens(nano, max_tokens=4) == by_whole_texts(nano, 4)


def test_prompts_as_tensors() -> None:
    for prompt in (torch.tensor(PROMPT), torch.tensor([PROMPT])):
        assert [n.token for n in ntc.generate(canonical(), prompt, max_tokens=4)] == tokens(canonical(), max_tokens=4)
    for wrong in ([], [[1], [2]], [0.5], torch.zeros(2, 3, dtype=torch.long)):
        with pytest.raises(DataError, match=r"a prompt is at least one token id, \[L\] or \[1, L\]"):
            generate(canonical(), torch.tensor(wrong))
    with pytest.raises(DataError, match="token id 61 is outside the vocabulary of 61"):
        next(generate(canonical(), [61]))


def test_draws_are_repeated_by_their_seed() -> None:
    program = streaming_form(canonical())
    drawn = [tokens(program, max_tokens=19, temperature=1.5, seed=seed) for seed in (0, 1, 2, 0)]
    assert drawn[0] == drawn[3]
    assert len({tuple(d) for d in drawn}) == 3
    assert tokens(program, max_tokens=9, temperature=2.0, top_k=1) == tokens(program, max_tokens=9)
    assert tokens(program, max_tokens=9, temperature=2.0, top_p=1e-6) == tokens(program, max_tokens=9)


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.5}])
def test_draws_keep_to_the_most_probable_tokens(settings: dict[str, Any]) -> None:
    program = streaming_form(canonical())
    for seed in range(6):
        ids = list(PROMPT)
        for token in tokens(program, max_tokens=6, temperature=1.7, seed=seed, **settings):
            chances = (logits_of(canonical(), ids) / 1.7).softmax(-1).sort(descending=True)
            kept = 3 if "top_k" in settings else int((chances.values.cumsum(0) < 0.5 - 1e-6).sum()) + 1
            assert token in chances.indices[:kept].tolist()
            ids.append(token)


def test_frequencies_are_those_of_the_softmax() -> None:
    """400 first tokens against their probabilities at a temperature: chi-squared below its 99.9 % quantile."""
    program, temperature = streaming_form(canonical(n_layer=1)), 3.0
    chances = (logits_of(canonical(n_layer=1), PROMPT) / temperature).softmax(-1)
    counts = torch.zeros(61)
    for seed in range(400):
        counts[next(generate(program, PROMPT, max_tokens=1, temperature=temperature, seed=seed)).token] += 1
    likely = chances * 400 >= 5
    groups = [(counts[likely], chances[likely]), (counts[~likely].sum()[None], chances[~likely].sum()[None])]
    chi_squared = sum(float(((c - 400 * p).square() / (400 * p)).sum()) for c, p in groups)
    freedom = int(likely.sum())
    assert chi_squared < freedom + 3.1 * (2 * freedom) ** 0.5 + 8
    assert freedom > 10


def test_how_a_text_ends() -> None:
    program = streaming_form(canonical())
    first, second, third = by_whole_texts(canonical(), 3)
    text = generate(program, PROMPT, max_tokens=2)
    assert [new.token for new in text] == [first, second]
    assert text.reason == "length"
    assert next(text, None) is None
    stop = generate(program, PROMPT, stop=[third])
    assert [new.token for new in stop] == [first, second][: [first, second, third].index(third)]
    assert stop.reason == "stop"
    full = generate(program, PROMPT)
    assert len(list(full)) == 24 - len(PROMPT) + 1, "one more than can be read again"
    assert full.reason == "context"
    assert full.stream.position == len(full.ids) == 24
    assert list(generate(program, PROMPT, max_tokens=0)) == []
    assert len(list(generate(program, example_ids(batch=1, length=24)))) == 1
    with pytest.raises(DataError, match="the prompt has 25 tokens, and the model's context takes 24: shorten it"):
        generate(program, example_ids(batch=1, length=25))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "a temperature is a number of at least 0, got -1.0"),
        ({"temperature": float("nan")}, "a temperature is a number"),
        ({"top_k": -1}, "top-k is a number of tokens, or 0 for all of them, got -1"),
        ({"top_p": 0.0}, r"top-p is a probability in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, "top-p is a probability"),
        ({"max_tokens": -1}, "max_tokens is a number of tokens, got -1"),
    ],
)
def test_settings_are_checked_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(canonical(), PROMPT, **settings)


def test_settings_become_processors_of_transformers() -> None:
    assert [type(p).__name__ for p in Sampling(0.5, 3, 0.9).processors()] == ["TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper"]
    assert list(Sampling(1.0).processors()) == []
    assert Generated(3, -0.5) == Generated(3, -0.5)


# -------------------------------------------------------------------------------------------------------- pieces of text


@pytest.fixture(scope="module")
def by_bytes() -> Any:
    """A tokenizer with one token per byte: every character beyond ASCII is several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def pieces_of(tokenizer: Any, prompt: str, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    pieces = Pieces(tokenizer, tokenizer(prompt)["input_ids"] if prompt else [], stop)
    parts = []
    for token in ids:
        parts.append(pieces.push(token))
        if pieces.stopped:
            break
    return [*parts, pieces.rest()], pieces.stopped


@given(prompt=st.text(max_size=6), text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=12))
def test_characters_come_whole(by_bytes: Any, prompt: str, text: str) -> None:
    prompt = "".join(c for c in prompt if c.isprintable())
    ids = by_bytes(text)["input_ids"] if text else []
    parts, _ = pieces_of(by_bytes, prompt, ids)
    assert "".join(parts) == text
    assert parts[-1] == "", "nothing whole is held back"
    assert len(ids) == len(text.encode())
    given_out = [part for part in parts if part]
    assert given_out == list(text), "each character as soon as its last byte is there"


def test_what_is_no_character_comes_out_too(by_bytes: Any) -> None:
    ids = by_bytes("é")["input_ids"][:1] * 9 + by_bytes("ok")["input_ids"]
    parts, _ = pieces_of(by_bytes, "a", ids)
    assert "".join(parts) == by_bytes.decode(ids)
    assert parts[3], "after the longest character there is nothing to wait for"
    half, _ = pieces_of(by_bytes, "a", by_bytes("a😀")["input_ids"][:3])
    assert "".join(half) == by_bytes.decode(by_bytes("a😀")["input_ids"][:3])


@given(text=st.text("ab", max_size=14), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_the_first_stop_text(by_bytes: Any, text: str, stops: list[str]) -> None:
    parts, stopped = pieces_of(by_bytes, "x", by_bytes(text)["input_ids"] if text else [], tuple(stops))
    # The text ends at the token with which the first stop text is complete; there the leftmost of them counts.
    complete = [text.find(stop) + len(stop) for stop in stops if stop in text]
    seen = text[: min(complete)] if complete else text
    expected = seen[: min(seen.find(stop) for stop in stops if stop in seen)] if complete else text
    assert stopped == bool(complete)
    assert "".join(parts) == expected
