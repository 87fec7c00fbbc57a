"""The application: its commands, and what becomes of their errors."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from ntc.cli import (
    check_command,
    compile_command,
    energy_command,
    evaluate_command,
    explain_command,
    export_command,
    finetune_command,
    generate_command,
    list_commands,
    plan_command,
    quantize_command,
    sweep_command,
    verify_command,
)
from ntc.cli.plugin_commands import CommandGroup
from ntc.errors import NtcError

__all__ = ["app", "run"]

app = typer.Typer(
    name="ntc",
    cls=CommandGroup,
    help="Compile pretrained language models to spiking networks.",
    epilog="Example: ntc compile examples/gpt2-books -o build/demo --steps 4 --emit onnx,netlist,energy",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"ntc {version('ntc-compiler')}")
        raise typer.Exit


@app.callback()
def _ntc(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Compile pretrained language models to spiking networks."""


for _module in (
    check_command, plan_command, compile_command, finetune_command, quantize_command, evaluate_command, generate_command, energy_command,
    sweep_command, export_command, verify_command, explain_command, list_commands,
):  # fmt: skip
    _module.add_to(app)


class _Signals:
    """Ctrl-C and SIGTERM raise as usual, and are remembered: some libraries turn what is raised into an error of their own.

    Attributes:
        code: Exit code of a process that was stopped so; 0 if it was not.
    """

    code = 0

    def on_interrupt(self, number: int, frame: Any) -> None:
        self.code = 128 + number
        raise KeyboardInterrupt

    def on_terminate(self, number: int, frame: Any) -> None:
        self.code = 128 + number
        raise SystemExit(self.code)  # so that temporary folders vanish


@contextmanager
def _signals() -> Iterator[_Signals]:
    signals = _Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = signal.signal(signal.SIGINT, signals.on_interrupt), signal.signal(signal.SIGTERM, signals.on_terminate)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns its exit code."""
    with _signals() as signals:
        try:
            result = app(args=list(arguments), prog_name="ntc", standalone_mode=False)
            sys.stdout.flush()
            if signals.code:  # typer makes an exit code of it, without a word
                return _fail(arguments, "interrupted", signals.code)
            return result if isinstance(result, int) else 0
        except BrokenPipeError:  # the reader has seen enough, as in `ntc passes | head`
            _close_output()
            return 0
        except (KeyboardInterrupt, typer.Abort):
            return _fail(arguments, "interrupted", signals.code or 130)
        except SystemExit:
            if not signals.code:
                raise
            return _fail(arguments, "interrupted", signals.code)
        except Exception as error:  # noqa: BLE001 - whatever it is, the user gets one sentence
            if signals.code:  # torch reads a file through a callback, and would call this file damaged
                return _fail(arguments, "interrupted", signals.code)
            return _fail(arguments, *_explain(error))


def _close_output() -> None:
    """Nothing more can be written to standard output: what Python still holds for it goes nowhere, without another error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(error: Exception) -> tuple[str, int]:
    """The sentence and exit code for an error."""
    if isinstance(error, NtcError):
        return str(error), 2
    usage = getattr(error, "format_message", None)  # of the parser of the command line
    if usage is not None:
        context = getattr(error, "ctx", None)
        see = f" (see {context.command_path} --help)" if context is not None else ""
        return usage().rstrip(".") + see, 2
    if isinstance(error, MemoryError):
        return "there is not enough memory for this model", 2
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""), 2
    if isinstance(error, RuntimeError) and "not enough memory" in str(error):
        return "there is not enough memory for this model", 2
    return f"this is a mistake in ntc: {type(error).__name__}: {error}; please report it with the output of -v", 3


def _fail(arguments: Sequence[str], message: str, code: int) -> int:
    if any(a in ("--verbose", "-v", "-vv") for a in arguments) and code < 128:
        traceback.print_exc()
    message = " ".join(message.split())
    if "--json" in arguments:
        try:
            print(json.dumps({"error": message}), flush=True)
        except OSError:  # it is standard output that fails
            _close_output()
    sys.stderr.write(f"{'' if code > 128 else 'error: '}{message}\n")
    return code
