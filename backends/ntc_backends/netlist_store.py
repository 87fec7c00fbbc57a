"""The tensor file of a netlist, read with numpy: its header is checked before a byte is believed, tensors are read one at a time.

A safetensors file is 8 bytes length of the header (little-endian), the header as JSON, then the raw bytes of the tensors, one behind
the other. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntc.errors import ArtifactError
from ntc_backends.netlist_json import one_line, parse
from ntc_backends.netlist_schema import Blob, TensorEntry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CODES", "TensorFile", "read_header", "verify_blob"]

CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""Names of dtypes in safetensors."""
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_CHUNK = 1 << 24
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class Stored:
    """One tensor of a file.

    Attributes:
        dtype: As safetensors says it.
        shape: Shape.
        first: Offset of its first byte in the file.
        size: Bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    first: int
    size: int


def read_header(path: Path) -> dict[str, Stored]:
    """What a safetensors file holds, every offset checked against the size of the file.

    Raises:
        ArtifactError: If it is no safetensors file, or its tensors overlap, leave gaps or reach beyond its end.
    """
    with path.open("rb") as file:
        whole = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_LONGEST_HEADER, whole - 8):
            raise ArtifactError(f"{path.name} is cut off or no safetensors file: its header claims {length} bytes")
        text = file.read(length)
    header = parse(text, f"the header of {path.name}")
    if not isinstance(header, dict):
        raise ArtifactError(f"{path.name} is damaged: its header is no JSON object")
    header.pop("__metadata__", None)
    start, found = 8 + length, {key: _stored(key, value, 8 + length, path.name) for key, value in header.items()}
    at = start
    for key, tensor in sorted(found.items(), key=lambda item: (item[1].first, item[1].size)):
        if tensor.first != at:
            raise ArtifactError(f"{path.name} is damaged: {one_line(key)} begins at byte {tensor.first} and should begin at {at}")
        at += tensor.size
    if at != whole:
        raise ArtifactError(f"{path.name} is damaged: its tensors end at byte {at} of {whole}")
    return found


def _stored(key: str, value: Any, start: int, file: str) -> Stored:
    """One entry of a header."""
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(first), int(last)], **more} if not more:
            whole = [n for n in (*shape, first, last) if type(n) is int and 0 <= n < 1 << 62]  # bool is no size
            if len(whole) == len(shape) + 2 and len(shape) <= 8 and dtype in SIZES and last - first == math.prod(shape) * SIZES[dtype]:
                return Stored(dtype, tuple(shape), start + first, last - first)
    raise ArtifactError(f"{file} is damaged: its header describes {one_line(key)} as {one_line(value, 80)}")


def verify_blob(path: Path, blob: Blob, table: Mapping[str, TensorEntry], *, hashes: bool = True) -> dict[str, Stored]:
    """Check place, size, header, shapes, dtypes and (unless switched off) every hash of the tensor file.

    Returns:
        Where each tensor lies, by key.

    Raises:
        ArtifactError: One sentence with the first thing that is wrong; names the tensor where one is.
    """
    try:
        _check_place(path)
        if path.stat().st_size != blob.bytes:
            found = path.stat().st_size
            raise ArtifactError(f"{path.name} has {found} bytes and the netlist says {blob.bytes}: it was cut off or replaced")
        header = read_header(path)
        for name, entry in table.items():
            stored = header.get(entry.key)
            if stored is None:
                raise ArtifactError(f"tensor {one_line(name)} is missing: {path.name} has no key {one_line(entry.key)}")
            if (stored.dtype, list(stored.shape)) != (CODES.get(entry.dtype), entry.shape):
                said = f"{stored.dtype} {list(stored.shape)} in {path.name}"
                raise ArtifactError(f"tensor {one_line(name)} is {one_line(entry.dtype)} {entry.shape} in the netlist and {said}")
        if idle := sorted(header.keys() - {entry.key for entry in table.values()}):
            raise ArtifactError(f"{path.name} holds the tensor {one_line(idle[0])}, which the netlist does not have")
        if hashes:
            _verify_hashes(path, blob, table, header)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    return header


def _check_place(path: Path) -> None:
    """Refuse what is no ordinary file in the folder of the netlist."""
    if not path.is_file():
        raise ArtifactError(f"the netlist's tensor file {path} is missing; it lies beside the netlist it was written with")
    if stat.S_ISLNK(path.lstat().st_mode) and not path.resolve().is_relative_to(path.parent.resolve()):
        raise ArtifactError(f"{path.name} is a link out of its folder; put the file itself there")


def _verify_hashes(path: Path, blob: Blob, table: Mapping[str, TensorEntry], header: Mapping[str, Stored]) -> None:
    done: set[tuple[str, str]] = set()
    with path.open("rb") as file:
        for name, entry in table.items():
            if (entry.key, entry.sha256) in done:
                continue  # the same bytes under another name
            file.seek(header[entry.key].first)
            if _digest(file, header[entry.key].size) != entry.sha256:
                raise ArtifactError(
                    f"tensor {one_line(name)} in {path.name} is not the one the netlist was written with: its SHA-256 differs"
                )
            done.add((entry.key, entry.sha256))
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


class TensorFile:
    """The tensors of a verified file as numpy arrays.

    Attributes:
        path: The file.
        stored: Where each lies, by key.
        table: Entries by name.
    """

    def __init__(self, path: Path, stored: Mapping[str, Stored], table: Mapping[str, TensorEntry]) -> None:
        self.path, self.stored, self.table = path, stored, table

    def read(self, name: str) -> NDArray[Any]:
        """One tensor, read from the file: an array of its own. float16 and bfloat16 come as float32, which holds each of their values.

        Raises:
            ArtifactError: If the file cannot be read any more.
        """
        import numpy as np

        at = self.stored[self.table[name].key]
        try:
            with self.path.open("rb") as file:
                file.seek(at.first)
                raw = np.fromfile(file, dtype=np.uint8, count=at.size)
        except OSError as error:
            raise ArtifactError(f"cannot read {self.path}: {error.strerror or error}") from error
        if raw.size != at.size:
            raise ArtifactError(f"{self.path.name} was cut off while it was read")
        if at.dtype == "BF16":
            return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(at.shape)
        value = raw.view(_NUMPY[at.dtype]).reshape(at.shape)
        return value.astype(np.float32) if at.dtype == "F16" else value

    def bytes_of(self, name: str) -> int:
        """Size of a tensor in the file [bytes]."""
        return self.stored[self.table[name].key].size

    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype that ``read`` gives."""
        import numpy as np

        code = self.stored[self.table[name].key].dtype
        return np.dtype("<f4" if code in ("BF16", "F16") else _NUMPY[code])


_NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1", "U8": "<u1", "BOOL": "|b1",
}  # fmt: skip
