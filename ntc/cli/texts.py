"""The text that a command runs a compiled program on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ntc.cli.output import Output

if TYPE_CHECKING:
    from ntc.program import Program
    from ntc.text import Tokens

__all__ = ["tokens_for"]


def tokens_for(output: Output, folder: Path, program: Program, data: Path | None, max_tokens: int, otherwise: str) -> Tokens:
    """Tokens to run on: of the text given, else of the model's ``calibration.txt`` if it is there, else random ones, with a warning.

    Args:
        output: Where the warning goes.
        folder: The compiled folder, for its tokenizer.
        program: Its program.
        data: The text given.
        max_tokens: Most tokens; one window at least.
        otherwise: What random tokens mean for this command, as in "there is no text to run on, so ...".

    Raises:
        DataError: If the text cannot be used.
    """
    from ntc.compiler import default_calibration
    from ntc.loading import load_tokenizer
    from ntc.text import random_tokens, tokens_from

    info = program.info
    window = min(256, info.context or 256)
    tokenizer = load_tokenizer(folder / "tokenizer") if (folder / "tokenizer").is_dir() else None
    path = data if data is not None else default_calibration(info.source) if tokenizer is not None else None
    if path is not None:
        return tokens_from(path, tokenizer, window, max_tokens, info.vocab_size)
    output.warn(f"there is no text to run on, so {otherwise}: give --data FILE")
    return random_tokens(info.vocab_size, window, max(window, max_tokens))
