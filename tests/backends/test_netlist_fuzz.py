"""Whatever is in the files of a netlist: reading it ends with a netlist or with one sentence, soon, and touches no other file."""

from __future__ import annotations

import builtins
import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from netlist_cases import cached
from netlist_mutations import STRANGE, mutate
from simulator_cases import integer_case

import ntc
from ntc_backends.netlist_reader import load_netlist
from ntc_backends.simulator import Simulator

SECONDS = 10  # of the processor, for one case; an ordinary one takes a few milliseconds
PATIENCE = 300  # seconds of the clock, if it waits for something


@contextmanager
def limited(what: str) -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise AssertionError(f"{what} takes more than {SECONDS} s")

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, PATIENCE))
    before = [signal.signal(number, stop) for number, _, _ in timers]
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


@contextmanager
def nothing_opened_outside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Any attempt to open a file that is not in the folder fails the test."""
    opened, real = builtins.open, os.open
    io_open = Path.open

    def check(path: Any) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            where = Path(os.path.realpath(os.fsdecode(path)))
            inside = where.is_relative_to(os.path.realpath(folder))
            assert inside or where.suffix in (".py", ".pyc", ".so"), f"{path} was opened"

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", lambda path, *a, **k: (check(path), opened(path, *a, **k))[1])
        patch.setattr(os, "open", lambda path, *a, **k: (check(path), real(path, *a, **k))[1])
        patch.setattr(Path, "open", lambda self, *a, **k: (check(self), io_open(self, *a, **k))[1])
        yield


def one_sentence(error: BaseException) -> None:
    text = str(error)
    assert text and "\n" not in text and len(text) < 700, text
    text.encode("utf-8")  # can be shown on any terminal


def attempt(folder: Path, run: bool) -> bool:
    """Read it, and run what can be read; whether it could be read."""
    try:
        load_netlist(folder)
    except ntc.ArtifactError as error:
        one_sentence(error)
        return False
    if run:
        try:
            Simulator(folder).run([1, 2, 3])
        except (ntc.ArtifactError, ntc.BackendError, ntc.DataError) as error:
            one_sentence(error)
        except MemoryError:
            pass  # the command says it in one sentence too
    return True


def fuzz(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: range) -> tuple[int, int]:
    outside = tmp_path / "outside.safetensors"
    shutil.copy(source / "netlist.safetensors", outside)
    refused = 0
    for seed in seeds:
        folder = tmp_path / f"case{seed % 8}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in ("netlist.json", "netlist.safetensors"):
            shutil.copy(source / name, folder / name)
        (folder / "link").symlink_to(outside)
        os.mkfifo(folder / "fifo")
        what = mutate(folder, random.Random(seed))
        with limited(f"seed {seed} ({what})"), nothing_opened_outside(folder, monkeypatch):
            try:
                refused += not attempt(folder, run=True)
            except Exception as error:
                raise AssertionError(f"seed {seed} ({what}): {type(error).__name__}: {error}") from error
    return refused, len(seeds)


@pytest.mark.parametrize("grade", ["float", "integer"])
def test_damaged_netlists(grade: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = cached("spikes", 1).folder if grade == "float" else integer_case("leaking").folder
    refused, cases = fuzz(source, tmp_path, monkeypatch, range(150) if grade == "float" else range(150, 300))
    assert cases * 0.6 < refused < cases  # most damage is found, and some is none: another role, module, parameter count ...


@pytest.mark.slow
@pytest.mark.parametrize("grade", ["float", "integer"])
def test_two_thousand_damaged_netlists(grade: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = cached("spikes", 1).folder if grade == "float" else integer_case("leaking").folder
    refused, cases = fuzz(source, tmp_path, monkeypatch, range(1000, 2000) if grade == "float" else range(2000, 3000))
    assert cases * 0.6 < refused < cases


def edited(folder: Path, change: Any) -> Path:
    shutil.copytree(integer_case("leaking").folder, folder, dirs_exist_ok=True)
    data = json.loads((folder / "netlist.json").read_text(encoding="utf-8"))
    change(data)
    (folder / "netlist.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(ntc.ArtifactError) as raised:
        load_netlist(folder)
    one_sentence(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b", "..", "", "a\x00b", ".hidden", "a b"])
def test_names_of_files_that_are_paths(tmp_path: Path, name: str) -> None:
    assert "at blob.file" in refusal(edited(tmp_path, lambda d: d["blob"].update(file=name)))


def test_links_out_of_the_folder(tmp_path: Path) -> None:
    folder = edited(tmp_path / "netlist", lambda d: None)
    shutil.move(folder / "netlist.safetensors", tmp_path / "elsewhere")
    (folder / "netlist.safetensors").symlink_to(tmp_path / "elsewhere")
    assert "is a link out of its folder" in refusal(folder)
    (folder / "netlist.safetensors").unlink()
    shutil.move(tmp_path / "elsewhere", folder / "data")
    (folder / "netlist.safetensors").symlink_to("data")  # within it
    load_netlist(folder)


def test_files_that_are_no_files(tmp_path: Path) -> None:
    folder = edited(tmp_path / "netlist", lambda d: None)
    (folder / "netlist.safetensors").unlink()
    os.mkfifo(folder / "netlist.safetensors")
    with limited("a pipe"):
        assert "is missing" in refusal(folder)
    (folder / "netlist.json").unlink()
    os.mkfifo(folder / "netlist.json")
    with limited("a pipe"):
        assert "there is no netlist" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"[" * 200_000, "nested deeper"), (b'{"a":' * 50 + b"1" + b"}" * 50, "nested deeper than 32"), (b'{"format": NaN}', "NaN is no number"),
        (b'{"format": "a", "format": "b"}', "the key 'format' twice"), (b"\xff\xfe", "is no JSON"), (b"", "is no JSON"),
        (b'{"format": ' + b"9" * 5000 + b"}", "is no JSON"), (b"[]", "is no ntc-netlist file"), (b'{"format": "\\ud800"}', "is no ntc-netlist"),
        (b'{"format": "ntc-netlist", "schema_version": ["1.2"]}', "has schema version"),
        (b'{"format": "ntc-netlist", "schema_version": "1.2", "\\ud800": 1}', "does not fit schema 1.2"),
    ],
)  # fmt: skip
def test_texts_that_are_no_netlist(tmp_path: Path, text: bytes, says: str) -> None:
    (tmp_path / "netlist.json").write_bytes(text)
    with limited("a text"):
        assert says in refusal(tmp_path)


def test_every_byte_of_a_tensor_is_under_a_hash(tmp_path: Path) -> None:
    """A changed byte is refused; where it is in a tensor, that is named."""
    folder = edited(tmp_path, lambda d: None)
    blob = folder / "netlist.safetensors"
    raw = blob.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for at in (*range(start, len(raw), 199), len(raw) - 1):
        blob.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        assert "tensor constant_" in refusal(folder)
    for at in range(8, start, 5):  # of the header
        blob.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        refusal(folder)
    for size in range(0, len(raw), 211):
        blob.write_bytes(raw[:size])
        assert "cut off" in refusal(folder)


def test_sizes_that_are_none(tmp_path: Path) -> None:
    paths: tuple[tuple[Any, ...], ...] = (
        ("time", "steps"), ("blob", "bytes"), ("model", "context"), ("populations", 0, "steps"), ("dynamic_products", 0, "heads"),
    )  # fmt: skip
    for path in paths:
        for strange in STRANGE:
            right: list[Any] = []

            def change(data: Any, path: Any = path, strange: Any = strange, right: list[Any] = right) -> None:
                for key in path[:-1]:
                    data = data[key]
                right.append(data[path[-1]])
                data[path[-1]] = strange

            folder = edited(tmp_path, change)
            with limited(f"{path} = {strange!r}"):
                try:
                    load_netlist(folder, verify_hashes=False)
                except ntc.ArtifactError as error:
                    one_sentence(error)
                else:
                    assert type(strange) is int and (strange == right[0] or (path == ("model", "context") and strange >= 0))
