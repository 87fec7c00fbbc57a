"""A tiny model with a tiny tokenizer on disk, compiled once, and commands run in this process or in one of their own."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TEXT = "the quick brown fox jumps over the lazy dog and then it sleeps. "


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run_ntc(*arguments: object) -> Ran:
    """``ntc ARGUMENTS`` in this process, as the console script runs it."""
    from ntc.cli import main

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    return Ran(int(stopped.value.code or 0), out.getvalue(), err.getvalue())


def start_ntc(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """``ntc ARGUMENTS`` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-m", "ntc", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options,
    )  # fmt: skip


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder with a hash of its bytes."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def save_tokenizer(folder: Path, vocabulary: int = 30) -> None:
    """One token per character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["?", *"abcdefghijklmnopqrstuvwxyz ."]
    table = {letter: i for i, letter in enumerate(letters)} | {f"<{i}>": i for i in range(len(letters), vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: two-layer GPT-2, 30 tokens, calibration.txt."""
    from ntc.testing import tiny_gpt2

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_gpt2(vocab_size=30).save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "calibration.txt").write_text(TEXT * 10, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text(TEXT[::-1] * 5, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def compiled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model compiled with all artefacts; tests must not write here."""
    folder = tmp_path_factory.mktemp("compiled") / "tiny"
    ran = run_ntc("compile", model, "-o", folder, "--emit", "netlist,energy", "--json")
    assert ran.code == 0, ran.err
    return folder


@pytest.fixture
def copied(compiled: Path, tmp_path: Path) -> Path:
    """A copy of the compiled folder to damage."""
    import shutil

    return Path(shutil.copytree(compiled, tmp_path / "copy"))


@pytest.fixture
def ntc() -> Callable[..., Ran]:
    return run_ntc
