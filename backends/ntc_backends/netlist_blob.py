"""The tensors of a netlist as a safetensors file, written and read one tensor at a time.

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

from ntc.errors import ArtifactError, BackendError
from ntc_backends.netlist_schema import Blob, TensorEntry

__all__ = ["dtype_name", "read_header", "tensor_table", "verify_blob", "write_blob"]

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_CHUNK = 1 << 24
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors library


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


_CODES = {dtype_name(dtype): code for dtype, code in _DTYPES.items()}


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
        if tensor.dtype not in _DTYPES:
            raise BackendError(f"tensor {name} has dtype {tensor.dtype}, which safetensors cannot hold; convert it first")
        dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
        sha = hashlib.sha256(_raw(tensor)).hexdigest()
        key = keys.setdefault((dtype, shape, sha), name)
        table[name] = TensorEntry(dtype=dtype, shape=list(shape), key=key, sha256=sha)
    return table


def write_blob(path: Path, tensors: Mapping[str, Tensor], table: Mapping[str, TensorEntry]) -> Blob:
    """Stream the tensors of a table into a safetensors file.

    Args:
        path: File to write.
        tensors: Tensors by name.
        table: Their entries; only names that are their own key are written.

    Returns:
        Size and hash, under the name ``path.name``.
    """
    # Wide elements first, as the safetensors library orders them, so that every tensor is aligned to its elements.
    names = sorted((n for n, e in table.items() if e.key == n), key=lambda n: (-tensors[n].element_size(), n))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        end = offset + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": _CODES[table[name].dtype], "shape": table[name].shape, "data_offsets": [offset, end]}
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
    return Blob(file=path.name, bytes=size, sha256=digest.hexdigest())


def _parts(header: bytes, names: list[str], tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for name in names:
        yield _raw(tensors[name])


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file without ``__metadata__``, and where the data begins [bytes].

    Raises:
        ArtifactError: If it is no safetensors file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_LONGEST_HEADER, path.stat().st_size - 8):
            raise ArtifactError(f"{path.name} is cut off or no safetensors file: its header claims {length} bytes")
        try:
            header: Any = json.loads(file.read(length))
        except ValueError as error:
            raise ArtifactError(f"{path.name} is damaged: its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise ArtifactError(f"{path.name} is damaged: its header is no JSON object")
    header.pop("__metadata__", None)
    return header, 8 + length


def verify_blob(path: Path, blob: Blob, table: Mapping[str, TensorEntry], *, hashes: bool = True) -> None:
    """Check size, header, shapes, dtypes and (unless switched off) every hash of the tensor file.

    Raises:
        ArtifactError: One sentence with the first thing that is wrong; names the tensor where one is.
    """
    if not path.is_file():
        raise ArtifactError(f"the netlist's tensor file {path} is missing; it lies beside the netlist it was written with")
    if path.stat().st_size != blob.bytes:
        raise ArtifactError(f"{path.name} has {path.stat().st_size} bytes and the netlist says {blob.bytes}: it was cut off or replaced")
    header, start = read_header(path)
    for name, entry in table.items():
        stored = header.get(entry.key)
        if stored is None:
            raise ArtifactError(f"tensor {name} is missing: {path.name} has no key {entry.key}")
        found = (stored.get("dtype"), stored.get("shape"))
        if found != (_CODES.get(entry.dtype), entry.shape):
            raise ArtifactError(f"tensor {name} is {entry.dtype} {entry.shape} in the netlist and {found[0]} {found[1]} in {path.name}")
    if hashes:
        _verify_hashes(path, blob, table, header, start)


def _verify_hashes(path: Path, blob: Blob, table: Mapping[str, TensorEntry], header: Mapping[str, Any], start: int) -> None:
    with path.open("rb") as file:
        for name, entry in table.items():
            if entry.key != name and table.get(entry.key) == entry:
                continue  # the same bytes, checked under the name that is the key
            first, last = header[entry.key]["data_offsets"]
            file.seek(start + first)
            if _digest(file, last - first) != entry.sha256:
                raise ArtifactError(f"tensor {name} in {path.name} is not the one the netlist was written with: its SHA-256 differs")
        file.seek(0)
        if _digest(file, blob.bytes) != blob.sha256:
            raise ArtifactError(f"{path.name} is not the file the netlist was written with: its SHA-256 differs")


def _digest(file: Any, size: int) -> str:
    digest = hashlib.sha256()
    while size > 0:
        part = file.read(min(size, _CHUNK))
        if not part:
            break
        digest.update(part)
        size -= len(part)
    return digest.hexdigest()
