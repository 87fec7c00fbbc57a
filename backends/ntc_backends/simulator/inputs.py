"""Token ids for a simulation: as they are typed, from a file, or of a text with the tokenizer of a compiled folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ntc.errors import ConfigError, DataError
from ntc_backends.netlist_json import one_line
from ntc_backends.simulator.piece import Array

__all__ = ["ids_from_file", "ids_from_list", "ids_from_text"]


def ids_from_list(text: str) -> Array:
    """``5,9,2``.

    Raises:
        DataError: If a part is no number.
    """
    try:
        return np.array([int(part) for part in text.split(",")], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise DataError(f"token ids are numbers with commas between them, such as 5,9,2, and not {one_line(text, 60)!r}") from error


def ids_from_file(path: Path) -> Array:
    """A ``.npy`` file or a JSON list (of lists).

    Raises:
        DataError: If it cannot be read or holds something else.
    """
    import json

    try:
        if path.suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False))
        return np.asarray(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"cannot read the token ids {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError, EOFError) as error:
        raise DataError(f"{path.name} holds no token ids, as .npy or a JSON list: {one_line(error)}") from error


def ids_from_text(path: Path, folder: Path, most: int) -> Array:
    """The first tokens of a UTF-8 text.

    Args:
        path: The text.
        folder: The compiled folder, with ``tokenizer/tokenizer.json``.
        most: So many tokens.

    Raises:
        ConfigError: If the folder has no tokenizer.
        DataError: If the text cannot be read or is empty.
    """
    file = next((f for f in (folder / "tokenizer" / "tokenizer.json", folder / "tokenizer.json") if f.is_file()), None)
    if file is None:
        raise ConfigError(f"{folder} has no tokenizer/tokenizer.json, so a text cannot be read as tokens: give --tokens or --ids")
    from tokenizers import Tokenizer

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read the text {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text: {error}") from error
    try:
        tokenizer: Any = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise ConfigError(f"the tokenizer {file} is damaged: {one_line(error)}") from error
    ids = tokenizer.encode(text[: 16 * most + 4096]).ids[:most]  # a token is rarely longer than 16 characters
    if not ids:
        raise DataError(f"the text {path} gives no tokens")
    return np.array(ids, dtype=np.int64)
