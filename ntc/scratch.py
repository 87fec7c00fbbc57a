"""Where the weights of a large network lie while it is compiled: in files that are mapped, not in memory.

Inside ``offered(folder)`` the tensors of a network that is ``considered`` large, and every large tensor that a pass makes of them, are
written to a file each and mapped. The file has no name: it is unlinked as soon as it is mapped, and its space is free again when the last
program that uses the tensor is gone, also after a crash. Pages that were read or written are the kernel's to drop; ``released`` gives them
back at once, so that after a run a program costs no memory.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ntc.errors import ArtifactError

__all__ = ["LARGE_BYTES", "considered", "default_folder", "give_back", "is_mapped", "kept", "offered", "released", "room_for", "unwritable"]

LARGE_BYTES = 2 << 30
"""Networks with more float32 weights than this are kept on disk; below it three generations of weights fit into 8 GiB."""

_LEAST_BYTES = 1 << 20
"""Smaller tensors stay in memory: norms, biases and thresholds of a network of 70 B parameters are some 10 MB."""


@dataclass
class _Scratch:
    folder: Path
    larger_than: int
    least: int
    used: bool = False


_SCRATCH: ContextVar[_Scratch | None] = ContextVar("ntc.scratch", default=None)
_MAPS: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by address


def default_folder() -> Path:
    """``ntc/scratch`` of ``$XDG_CACHE_HOME`` or ``~/.cache``: the system's folder for temporary files may lie in memory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ntc" / "scratch"


@contextmanager
def offered(folder: Path, larger_than: int = LARGE_BYTES, least: int = _LEAST_BYTES) -> Iterator[None]:
    """Keep the weights of large networks in a folder while the block runs.

    Args:
        folder: Made if it is missing; nothing that has a name is left in it.
        larger_than: Bytes of float32 weights above which a network is large.
        least: Bytes of the smallest tensor that gets a file.
    """
    token = _SCRATCH.set(_Scratch(folder, larger_than, least))
    try:
        yield
    finally:
        _SCRATCH.reset(token)


def room_for(elements: int) -> Path | None:
    """The scratch folder, if a network of so many weights is kept there; else None."""
    scratch = _SCRATCH.get()
    return scratch.folder if scratch is not None and 4 * elements > scratch.larger_than else None


def unwritable(folder: Path, error: OSError) -> ArtifactError:
    """What to say of a scratch folder that cannot be written."""
    return ArtifactError(f"cannot keep weights in {folder}: {error.strerror or error}; give another folder, --scratch DIR")


def considered(model: nn.Module, ours: bool) -> bool:
    """Whether a network is large enough to be kept on disk; what passes make of it is, from now on.

    Args:
        model: In float32.
        ours: Nobody else holds its weights, so they are moved, too, one by one.
    """
    scratch = _SCRATCH.get()
    parameters = list(model.parameters())
    if scratch is None or sum(p.numel() * p.element_size() for p in parameters) <= scratch.larger_than:
        return False
    scratch.used = True
    if ours:
        for parameter in parameters:
            moved = kept(parameter.detach())
            # A tensor that is not moved may be a view of a mapped file, all of which it would hold.
            parameter.data = moved if is_mapped(moved) else moved.clone()
    return True


def kept(value: Tensor) -> Tensor:
    """The same values in a mapped file, if weights are kept on disk and the tensor is large; else the tensor itself.

    Raises:
        ArtifactError: If the file cannot be written.
    """
    scratch = _SCRATCH.get()
    if scratch is None or not scratch.used or value.numel() * value.element_size() < scratch.least or is_mapped(value):
        return value
    plain = value.detach().contiguous()
    data: Any = plain.reshape(-1).view(torch.uint8).numpy()
    try:
        scratch.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=scratch.folder) as file:
            file.write(data)  # not through the map: a full disk is an error there
            file.flush()
            pages = mmap.mmap(file.fileno(), plain.numel() * plain.element_size())
    except OSError as error:
        raise unwritable(scratch.folder, error) from error
    made = torch.frombuffer(pages, dtype=plain.dtype).view(plain.shape)
    _MAPS[made.data_ptr()] = pages
    return made


def is_mapped(value: Tensor) -> bool:
    """Whether a tensor lies in a file of ours."""
    return value.device.type == "cpu" and value.untyped_storage().data_ptr() in _MAPS


def give_back() -> None:
    """Give memory of values that are gone back to the system: cycles hold programs, and glibc keeps freed blocks of up to 32 MB."""
    gc.collect()
    with suppress(OSError, AttributeError):  # other libraries of C have no such call
        ctypes.CDLL(None).malloc_trim(0)


def released(tensors: Iterable[Tensor]) -> None:
    """Give back the memory of mapped tensors; their values stay in the file and come back when they are read."""
    if _MAPS:
        for value in tensors:
            pages = _MAPS.get(value.untyped_storage().data_ptr()) if value.device.type == "cpu" else None
            if pages is not None:
                pages.madvise(mmap.MADV_DONTNEED)
