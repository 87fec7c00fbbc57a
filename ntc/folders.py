"""Output folders: refused before any work is done, replaced as a whole, left as they were when anything fails.

A folder is written beside its place and renamed, so that a full disk, an error or Ctrl-C leaves nothing half-written and
nothing existing lost.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ntc.errors import ArtifactError

__all__ = [
    "MANIFEST", "check_output", "check_page", "is_artifact", "reason_of", "replacing_folder", "umask", "undisturbed", "write_page",
]  # fmt: skip

MANIFEST = "manifest.json"


def is_artifact(folder: Path) -> bool:
    """Whether a folder holds a program of ours."""
    try:
        return "ntc_format" in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse an output folder before any work is done.

    Raises:
        ArtifactError: If it is a file, is not empty and may not be overwritten, holds something else than a program, or
            cannot be written.
    """
    try:
        if not folder.exists():
            parent = next(p for p in folder.absolute().parents if p.exists())
            if not parent.is_dir():
                raise ArtifactError(f"cannot write {folder}: {parent} is a file")
            if not os.access(parent, os.W_OK | os.X_OK):
                raise ArtifactError(f"cannot write {folder}: no permission to write in {parent}")
            return
        if not folder.is_dir():
            raise ArtifactError(f"{folder} is a file; give a folder")
        if os.path.ismount(folder):
            raise ArtifactError(f"{folder} is a mount point and cannot be replaced as a whole; give a folder inside of it")
        if not os.access(folder.resolve().parent, os.W_OK | os.X_OK):
            raise ArtifactError(f"cannot write {folder}: no permission to write in {folder.resolve().parent}")
        if not any(folder.iterdir()):
            return
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error.strerror or error}") from error
    if not overwrite:
        raise ArtifactError(f"the folder {folder} is not empty; choose another one, or give --overwrite")
    if not is_artifact(folder):
        raise ArtifactError(f"the folder {folder} holds something else than a compiled program: it is left as it is")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block has ended: a swap of folders or a clean-up is done as a whole or not at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = {number: signal.signal(number, lambda got, _: held.append(got)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if held:
            signal.raise_signal(held[0])


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of ``folder`` when the block ends well, and vanishes when it does not.

    Raises:
        ArtifactError: If the disk is full or the place cannot be written.
    """
    given, folder = folder, folder.resolve()
    beside: Path | None = None
    made = [p for p in folder.parents if not p.exists()]
    try:
        with undisturbed():
            folder.parent.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        os.chmod(beside, 0o777 & ~umask())
        yield beside
        with undisturbed():
            _swap(beside, folder)
    except OSError as error:
        raise ArtifactError(f"cannot write {given}: {error.strerror or error}") from error
    except SafetensorError as error:  # its way of saying that the disk is full
        raise ArtifactError(f"cannot write {given}: {reason_of(error)}") from error
    finally:
        with undisturbed():
            if beside is not None:
                shutil.rmtree(beside, ignore_errors=True)
            for parent in made:  # those that we made, innermost first, as far as they are empty
                with suppress(OSError):
                    parent.rmdir()


def _swap(beside: Path, folder: Path) -> None:
    """Put a finished folder in the place of another one, which is deleted, or kept if that fails."""
    old = beside.with_name(beside.name + ".old")
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(beside, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def umask() -> int:
    """Permissions that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def reason_of(error: BaseException) -> str:
    """What an error of a Rust library means for a person: its texts quote the operating system in debug form."""
    quoted = re.search(r'message: "([^"]*)"', str(error))
    return quoted[1] if quoted else str(error)


def check_page(out: Path, mark: str, command: str, example: str) -> None:
    """Refuse a place for a page that cannot be written, or that holds something else than such a page, before any work is done.

    Args:
        out: The file.
        mark: A comment that every page of the command begins with.
        command: Who makes it.
        example: A name for the file, for the sentence.

    Raises:
        ArtifactError: Says what is there.
    """
    if out.is_dir():
        raise ArtifactError(f"{out} is a folder; give a file, such as {out / example}")
    if not out.absolute().parent.is_dir():
        raise ArtifactError(f"cannot write {out}: there is no folder {out.parent}")
    if out.exists():
        with out.open("rb") as file:
            if mark.encode() not in file.read(400):
                raise ArtifactError(f"{out} is no page of {command}: it is left as it is; give another file")


def write_page(out: Path, html: str) -> None:
    """All or nothing: the page is written beside its place and renamed.

    Raises:
        ArtifactError: If it cannot be written.
    """
    beside = out.with_name(f".{out.name}.partial")
    try:
        beside.write_text(html, encoding="utf-8", newline="\n")
        os.replace(beside, out)
    except OSError as error:
        raise ArtifactError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)
