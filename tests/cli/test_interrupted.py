"""Ctrl-C: exit code 130, nothing half-written, nothing lost."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import content, start_ntc
from tests.cli.refusals import nothing_left


@pytest.mark.parametrize("moment", ["torch", "capture", "replace-attention", "export"])
def test_interrupt(model: Path, copied: Path, tmp_path: Path, moment: str) -> None:
    """SIGINT while torch is imported, in capture, in passes and while the folder is written."""
    before = content(copied)
    process = start_ntc(
        "compile", model, "-o", copied, "--overwrite", "--emit", "netlist", "--no-measure",
        env={"PYTHONPATH": str(slow_at(tmp_path, moment))}, start_new_session=True,
    )  # fmt: skip
    flag = tmp_path / "slow" / "reached"
    deadline = time.monotonic() + 240
    while not flag.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert flag.exists(), process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    shutil.rmtree(tmp_path / "slow", ignore_errors=True)
    assert process.returncode == 130, (process.returncode, err)
    assert "Traceback" not in err
    assert [line for line in err.splitlines() if line.strip()] == ["interrupted"]
    assert out == ""
    assert content(copied) == before
    nothing_left(tmp_path, copied.name)


def slow_at(tmp_path: Path, stage: str) -> Path:
    """A folder for PYTHONPATH that makes the command wait at a stage, or at the import of torch, until the signal comes."""
    folder = tmp_path / "slow"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"""
import builtins, sys, time
def wait():
    open({str(folder / "reached")!r}, "w").close()
    for _ in range(6000):
        time.sleep(0.01)
class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" == {stage!r}:
            sys.meta_path.remove(self)
            wait()
        if name == "ntc.compiler":
            sys.meta_path.remove(self)
            import ntc.cli.output as output
            session = output.Output.progress
            from contextlib import contextmanager
            @contextmanager
            def progress(self):
                yield lambda label, done, total: wait() if label.startswith({stage!r}) else None
            output.Output.progress = progress
sys.meta_path.insert(0, Hook())
""")
    return folder


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the tests were started in the background and ignore it; SIGTERM ends the process in order."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, act) for number, act in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, leave))}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_signal_while_folders_are_swapped(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, raised: type[BaseException]
) -> None:
    """Ctrl-C or SIGTERM between the two renames waits until both are done."""
    from ntc import folders

    replace = os.replace
    calls = []

    def interrupted_replace(source: Any, target: Any) -> None:
        calls.append(source)
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        replace(source, target)

    monkeypatch.setattr(folders.os, "replace", interrupted_replace)
    with pytest.raises(raised), folders.replacing_folder(copied) as beside:
        (beside / "new.txt").write_text("new")
    assert len(calls) == 2
    assert list(content(copied)) == ["new.txt"]
    nothing_left(tmp_path, copied.name)


@pytest.mark.usefixtures("interruptible")
def test_second_interrupt_does_not_disturb_the_clean_up(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntc import folders

    remove = shutil.rmtree
    before = content(copied)

    def interrupted_rmtree(*args: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        remove(*args, **options)

    monkeypatch.setattr(folders.shutil, "rmtree", interrupted_rmtree)

    def interrupted() -> None:
        with folders.replacing_folder(copied) as beside:
            (beside / "new.txt").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert content(copied) == before
    nothing_left(tmp_path, copied.name)
