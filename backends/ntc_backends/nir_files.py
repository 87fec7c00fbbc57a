"""NIR files on disk: written so that the same graph gives the same bytes, for the version of the nir package that shall read them.

``nir.write`` compresses (ten times slower, and weights do not get smaller) and writes the version that is installed. Here weights stay
as they are, no time is stored, and for ``compat`` = 1.0.4 the fields that this version does not know are left out.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import h5py
import nir
import numpy as np

from ntc.errors import ArtifactError

__all__ = ["UNKNOWN_TO", "digest_of", "read_file", "write_file"]

UNKNOWN_TO = {
    "1.0.6": frozenset[tuple[str, str]](),
    "1.0.4": frozenset({("IF", "v_reset"), ("LIF", "v_reset"), ("Scale", "metadata")}),
}  # fmt: skip
"""Fields of primitives that a version of the package refuses to read."""


def write_file(path: Path, graph: Any, compat: str) -> str:
    """Write a graph; returns the SHA-256 of the file.

    Raises:
        ArtifactError: If the disk is full or the folder cannot be written.
    """
    try:
        with h5py.File(path, "w") as file:
            file.create_dataset("version", data=compat, dtype=h5py.string_dtype())
            _write(file.create_group("node"), graph.to_dict(), UNKNOWN_TO[compat])
        return digest_of(path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error


def _write(group: Any, values: dict[str, Any], unknown: frozenset[tuple[str, str]]) -> None:
    for name, value in values.items():
        if (values.get("type"), name) in unknown or (name == "metadata" and not value):
            continue
        if isinstance(value, dict):
            _write(group.create_group(name), value, unknown)
        elif isinstance(value, str):
            group.create_dataset(name, data=value, dtype=h5py.string_dtype())
        elif isinstance(value, np.ndarray):
            group.create_dataset(name, data=value, dtype=value.dtype)
        else:
            group.create_dataset(name, data=value)  # edges: pairs of names


def read_file(path: Path) -> tuple[Any, str]:
    """The graph of a file, and the version of NIR whose definitions hold for it.

    Raises:
        ArtifactError: If it is no NIR file.
    """
    try:
        return nir.read(path), str(nir.serialization.read_version(path))
    except (OSError, KeyError, AssertionError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as NIR: {error}") from error


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
