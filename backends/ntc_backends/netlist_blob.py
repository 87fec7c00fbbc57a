"""The tensors of a netlist as a safetensors file, written one tensor at a time; ``netlist_store`` reads it.

``safetensors.torch.save_file`` collects all bytes before it writes. The format is simple enough to stream: 8 bytes length of
the header (little-endian), the header as JSON, then the raw bytes of each tensor. So a model of any size needs the memory of
its largest tensor more than it has already, and that only if the tensor is not contiguous.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntc.errors import BackendError
from ntc_backends.netlist_schema import Blob, TensorEntry
from ntc_backends.netlist_store import CODES

__all__ = ["dtype_name", "tensor_table", "write_blob"]


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major; a view where the tensor is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy says so from 3.12 on


def tensor_table(tensors: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """Describe tensors; those of equal dtype, shape and bytes share the key of the first name.

    Equality of bytes and not of storage: a program that was saved and loaded again gives the same file.

    Raises:
        BackendError: For a dtype that safetensors does not know.
    """
    keys: dict[tuple[str, tuple[int, ...], str], str] = {}
    table = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        if dtype_name(tensor.dtype) not in CODES:
            raise BackendError(f"tensor {name} has dtype {tensor.dtype}, which safetensors cannot hold; convert it first")
        dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
        sha = hashlib.sha256(_raw(tensor)).hexdigest()
        key = keys.setdefault((dtype, shape, sha), name)
        table[name] = TensorEntry(dtype=dtype, shape=list(shape), key=key, sha256=sha)
    return table


def write_blob(path: Path, name: str, tensors: Mapping[str, Tensor], table: Mapping[str, TensorEntry]) -> Blob:
    """Stream the tensors of a table into a safetensors file.

    Args:
        path: File to write.
        name: What it will be called.
        tensors: Tensors by name.
        table: Their entries; only names that are their own key are written.

    Returns:
        Its name, size and hash.
    """
    # Wide elements first, as the safetensors library orders them, so that every tensor is aligned to its elements.
    names = sorted((n for n, e in table.items() if e.key == n), key=lambda n: (-tensors[n].element_size(), n))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key in names:
        end = offset + tensors[key].numel() * tensors[key].element_size()
        header[key] = {"dtype": CODES[table[key].dtype], "shape": table[key].shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in _parts(text, names, tensors):
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return Blob(file=name, bytes=size, sha256=digest.hexdigest())


def _parts(header: bytes, names: list[str], tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for name in names:
        yield _raw(tensors[name])
