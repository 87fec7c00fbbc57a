"""What the tests of training text start from: a tokenizer of letters, and the proof that a stream resumes exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ntc.training.corpus import PackedCorpus, open_corpus

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


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"n": [0, 1, 2], "body": ["one", None, "two\n"]}), path)


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
