"""Weight files of a large network in float32, written tensor by tensor before they are loaded.

transformers makes float32 copies in memory of weights that are stored in another type. A file that holds float32 it maps, so a network
whose weights are to lie on disk (``ntc.scratch``) is loaded from such a one, which lies in the scratch folder meanwhile.
"""

from __future__ import annotations

import json
import math
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ntc.scratch import room_for, unwritable

__all__ = ["in_float32"]

_NARROW = frozenset({"BF16", "F16"})


@contextmanager
def in_float32(folder: Path) -> Iterator[Path]:
    """A folder with the same network whose weights are in float32: another one if it is large and has some that are not.

    Args:
        folder: A Hugging Face folder; what is no safetensors file is linked to.

    Raises:
        ArtifactError: If the scratch folder cannot be written.
    """
    shards = [path for path in sorted(folder.iterdir()) if path.suffix == ".safetensors"] if folder.is_dir() else []
    rows = [row for path in shards for row in _rows(path).values()]
    room = room_for(sum(math.prod(shape) for _, shape in rows)) if any(kind in _NARROW for kind, _ in rows) else None
    if room is None:
        yield folder
        return
    try:
        room.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(dir=room)
    except OSError as error:
        raise unwritable(room, error) from error
    with beside as name:
        try:
            for path in folder.iterdir():
                if path in shards:
                    _widen(path, Path(name) / path.name)
                else:
                    (Path(name) / path.name).symlink_to(path.absolute())
        except OSError as error:
            raise unwritable(room, error) from error
        yield Path(name)


def _rows(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of each tensor of a file."""
    with safe_open(path, "pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        return {name: (part.get_dtype(), list(part.get_shape())) for name, part in parts.items()}


def _widen(source: Path, target: Path) -> None:
    """The same file with float32 in place of 16-bit floats (https://github.com/huggingface/safetensors#format)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    with safe_open(source, "pt") as file, target.open("wb") as out:
        at = 0
        for name, (kind, shape) in _rows(source).items():
            wide = "F32" if kind in _NARROW else kind
            size = math.prod(shape) * (4 if kind in _NARROW else file.get_tensor(name).element_size())
            header[name] = {"dtype": wide, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        out.write(struct.pack("<Q", len(text)) + text)
        for name in list(header)[1:]:
            value = file.get_tensor(name)
            data: Any = (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).contiguous().reshape(-1)
            out.write(data.view(torch.uint8).numpy())
