"""The command line: ``ntc compile``, ``ntc check`` and the rest; one file per command.

Results go to standard output, everything else (progress, warnings, errors) to standard error. Exit codes: 0 success, 1 a
negative answer (``ntc check``), 2 bad input, 3 a mistake of ours, 130 interrupted by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and end the process."""
    try:
        from ntc.cli.app import run

        code = run(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:  # before or after everything that cleans up
        sys.stderr.write("interrupted\n")
        code = 130
    if arguments is None:  # all is done and shown: Ctrl-C while Python winds down has nothing to stop
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # A Ctrl-C that met Python inside an exec() (dataclasses make their methods so) is remembered by the interpreter, which would
        # end the process by that signal and not with our exit code. The next exec() clears that mark.
        exec("")
    raise SystemExit(code)
