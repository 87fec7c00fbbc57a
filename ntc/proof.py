"""Every artefact of a compiled folder against its program, on the same tokens: ``ntc verify``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ntc import artifact
from ntc.agreement import Agreement, nothing
from ntc.errors import ArtifactError, BackendError, ConfigError, DisagreementError, NtcError
from ntc.folders import reason_of
from ntc.program import Program
from ntc.recording import grade_of, neurons_of, populations, record
from ntc.registry import Backend, backend, executor, names_of
from ntc.text import Tokens
from ntc.verdict import Verdict

__all__ = ["KEY", "prove"]

KEY = "verification"
"""Where the manifest of a compiled folder has it."""

_HELD = 1 << 24
"""Spikes, or logits, of a batch: 64 MB of the program's, and as many of each executor."""

Progress = Callable[[str, int, int], None]


@dataclass
class _Target:
    """One artefact while it is compared.

    Attributes:
        name: Of its executor and back end.
        agreement: What was found so far; None if it cannot be run.
        verdict: If it cannot be run.
        reason: Likewise.
        written: Whether it was not in the folder and was written to a temporary one.
        files: SHA-256 of its files.
    """

    name: str
    agreement: Agreement | None = None
    verdict: Verdict = "unsupported"
    reason: str = ""
    written: bool = False
    files: dict[str, str] | None = None

    def fails(self, verdict: Verdict, error: Exception) -> None:
        """It is compared no more."""
        self.verdict, self.reason, self.agreement = verdict, " ".join(str(error).split()), None


def prove(
    folder: Path | str,
    tokens: Tokens,
    *,
    targets: Sequence[str] | None = None,
    program: Program | None = None,
    progress: Progress = lambda label, done, total: None,
) -> dict[str, Any]:
    """Run a program and its artefacts on the same tokens, and compare all spikes and logits.

    Args:
        folder: A compiled folder. What it does not have is exported into a temporary folder first.
        tokens: What to run on.
        targets: Names of executors; by default all that there are.
        program: The program of the folder, if it is loaded already.
        progress: Called with (label, done, total).

    Returns:
        Plain data (docs/json.md, ``ntc verify``); nothing in it depends on the time.

    Raises:
        ConfigError: If a target has no executor.
        ArtifactError: If the folder holds no program, the program has no neurons, or an artefact is damaged.
    """
    folder = Path(folder)
    for name in targets or ():
        executor(name)  # one that nobody has costs no time
    chosen = [_Target(name) for name in (names_of("executor") if targets is None else targets)]
    program = program or artifact.load(folder)
    if not populations(program):
        raise ArtifactError(f"the program in {folder} has no neurons, so there are no spikes to compare; compile it with another recipe")
    window = tokens.windows.shape[1]
    with ExitStack() as stack:
        for target in chosen:
            progress(f"prepare {target.name}", 0, 1)
            _prepare(target, folder, program, window, stack)
        _compare(program, chosen, tokens, progress)
        return _report(program, chosen, tokens)


def _prepare(target: _Target, folder: Path, program: Program, window: int, stack: ExitStack) -> None:
    """Find or write the artefact and let its executor read it."""
    try:
        runner, writer = executor(target.name), backend(target.name)
        if not all((folder / name).is_file() for name in writer.files):
            folder, target.written = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ntc-verify-"))), True
            _write(writer, program, folder)
        runner.prepare(folder, program)
        target.files = {name: artifact.sha256_of(folder / name) for name in runner.files}
        target.agreement = Agreement(program, runner, window)
    except DisagreementError as error:
        target.fails("differs", error)
    except (BackendError, ConfigError) as error:
        target.fails("unsupported", error)


def _write(writer: Backend, program: Program, folder: Path) -> None:
    try:
        writer.emit(program, folder, analog=None, tokens=None)
    except (NtcError, OSError):
        raise
    except Exception as error:  # a stranger's back end, or a library with error classes of its own
        raise BackendError(f"back end {writer.name} failed: {type(error).__name__}: {reason_of(error)}") from error


def _compare(program: Program, targets: Sequence[_Target], tokens: Tokens, progress: Progress) -> None:
    """Batch by batch, so that memory does not grow with the text."""
    nodes, window = populations(program).values(), tokens.windows.shape[1]
    per_window = max(sum(int(n.meta["val"].shape[0]) * neurons_of(n, window) for n in nodes), program.info.vocab_size * window)
    batches = tokens.batches(max(1, _HELD // per_window))
    first = 0
    for number, ids in enumerate(batches):
        progress("compare", number, len(batches))
        running = [t for t in targets if t.agreement is not None]
        if not running:
            return
        runners = [t.agreement.executor for t in running if t.agreement is not None]
        wanted = {name for runner in runners for name in (*runner.inputs, *runner.outputs)}
        given = record(program, ids, first, sorted(wanted))
        first += len(ids)
        for target in running:
            assert target.agreement is not None
            try:
                target.agreement.add(given)
            except BackendError as error:
                target.fails("differs", error)
    progress("compare", len(batches), len(batches))


def _report(program: Program, targets: Sequence[_Target], tokens: Tokens) -> dict[str, Any]:
    rows, window = dict[str, Any](), tokens.windows.shape[1]
    for target in targets:
        found = target.agreement.result() if target.agreement is not None else nothing(program, window, target.verdict, target.reason)
        rows[target.name] = {**found, "artefact": "temporary" if target.written else "folder", "files": target.files or {}}
    grade = grade_of(program)
    ran = [row for row in rows.values() if row["verdict"] != "unsupported"]
    return {
        "grade": grade, "agrees": bool(ran) and all(row["agrees"] for row in rows.values()), "tokens": tokens.count,
        "window": window, "data": tokens.description, "data_sha256": tokens.sha256, "steps": program.steps,
        "neurons": round(sum(neurons_of(n, window) for n in populations(program).values()) / window), "targets": rows,
    }  # fmt: skip
