"""What the network is run on: a text, token ids, or a sentence of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntc.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ntc_backends.inspect_page.subject import Subject

__all__ = ["SENTENCE", "Prompt", "parse_ids", "prompt_for"]

SENTENCE = "The spider had spun a thread across the window, and in the morning it held a drop of rain."
_MOST = 32


@dataclass(frozen=True)
class Prompt:
    """Token ids to run.

    Attributes:
        ids: Token ids.
        texts: Text of each token, as it stands on the page.
        description: Where they come from.
        option: What to type to have them again.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    description: str
    option: tuple[str, ...] = ()


def parse_ids(text: str) -> list[int]:
    """Token ids of ``1,2,3``.

    Raises:
        DataError: If it holds anything else.
    """
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise DataError(f"--tokens takes token ids with commas between them, such as 1,2,3, and got {text!r}") from error
    if min(ids) < 0:
        raise DataError(f"token ids are not negative, and --tokens has {min(ids)}")
    return ids


def prompt_for(subject: Subject, text: str | None, tokens: str | None) -> Prompt | None:
    """The tokens to run; None if there is only structure to show.

    Args:
        subject: What is inspected.
        text: Of ``--prompt``.
        tokens: Of ``--tokens``.

    Raises:
        ConfigError: If both are given.
        DataError: If the text cannot be read as tokens, or the tokens do not fit the network.
    """
    if text is not None and tokens is not None:
        raise ConfigError("--prompt TEXT and --tokens IDS exclude each other: give one of them")
    tokenizer = _tokenizer(subject.path / "tokenizer" / "tokenizer.json") if subject.program is not None else None
    if tokens is not None:
        ids = parse_ids(tokens)
        return _checked(subject, Prompt(tuple(ids), _texts(tokenizer, ids), "given token ids", ("--tokens", tokens)))
    if subject.program is None:
        if text is not None:
            raise DataError("a netlist has no tokenizer, so it cannot read a text: give --tokens IDS, or the compiled folder")
        return None
    if tokenizer is None:
        if text is not None:
            raise DataError(f"{subject.path} has no tokenizer, so it cannot read a text: give --tokens IDS")
        ids = [int(i) for i in subject.program.example[0]]
        return _checked(subject, Prompt(tuple(ids), _texts(None, ids), "the example of the program, which has no tokenizer"))
    ids = tokenizer.encode(SENTENCE if text is None else text).ids
    if text is None:  # ours has to fit, another one is the user's
        ids = ids[: min(_MOST, subject.model["context"] or _MOST)]
    if not ids:
        raise DataError("the text of --prompt has no tokens")
    given = () if text is None else ("--prompt", text)
    return _checked(subject, Prompt(tuple(ids), _texts(tokenizer, ids), SENTENCE if text is None else text, given))


def _tokenizer(file: Path) -> Any | None:
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library has no error class of its own
        raise DataError(f"cannot read the tokenizer {file}: {error}") from error


def _checked(subject: Subject, prompt: Prompt) -> Prompt:
    """Refuse ids that the network cannot take."""
    context, size = subject.model["context"], subject.model["vocab_size"]
    if context and len(prompt.ids) > context:
        raise DataError(f"{len(prompt.ids)} tokens are more than the model's context of {context}")
    if max(prompt.ids) >= size:
        raise DataError(f"token id {max(prompt.ids)} is outside the vocabulary of {size} tokens")
    return prompt


def _texts(tokenizer: Any | None, ids: Sequence[int]) -> tuple[str, ...]:
    """Each token as a reader sees it: without the blank in front, white space by a sign."""
    if tokenizer is None:
        return tuple(map(str, ids))
    return tuple(_visible(tokenizer.decode([i], skip_special_tokens=False)) or f"#{i}" for i in ids)


def _visible(text: str) -> str:
    shown = text.strip(" ") or ("␣" if text else "")
    return "".join({"\n": "⏎", "\t": "⇥"}.get(c, c if c.isprintable() else "�") for c in shown)
