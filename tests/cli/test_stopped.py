"""Stopped by a signal: one word, the exit code of that signal, and never an error of the library that was at work."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import run_ntc

SIGNALS = pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])


def stopping(number: int, translate: Callable[[BaseException], BaseException]) -> Callable[..., Any]:
    """A function of a library that is stopped by a signal and makes an error of its own of what its callback raised."""

    def load(*args: Any, **options: Any) -> Any:
        try:
            os.kill(os.getpid(), number)
        except BaseException as error:
            raise translate(error) from error
        raise AssertionError("the signal did not arrive")

    return load


@SIGNALS
@pytest.mark.parametrize("swallowed", [OSError, RuntimeError, None])
def test_while_a_library_reads_a_file(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int, swallowed: type[Exception] | None
) -> None:
    from ntc import artifact

    translate = (lambda error: error) if swallowed is None else lambda error: swallowed("unexpected end of file")
    monkeypatch.setattr(artifact, "load_file", stopping(number, translate))
    before = signal.getsignal(signal.SIGTERM)
    for more in ((), ("--json",), ("-v",)):
        ran = run_ntc("explain", compiled, "lm_head", *more)
        assert (ran.code, ran.err) == (code, "interrupted\n"), ran
        assert ran.out in ("", '{"error": "interrupted"}\n')
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    assert run_ntc("explain", compiled, "lm_head").code == 0, "the next command knows nothing of it"


def test_a_library_that_ends_the_process_by_itself_is_no_signal(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntc import artifact

    def leave(*args: Any) -> Any:
        raise SystemExit(7)

    monkeypatch.setattr(artifact, "load_file", leave)
    assert run_ntc("explain", compiled, "lm_head").code == 7
