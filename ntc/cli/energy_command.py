"""``ntc energy``: operations and energy of a compiled program against the network that it came from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ntc.cli.energy_tables import show_constants, show_energy
from ntc.cli.output import JsonFlag, Output, VerboseFlag, session
from ntc.cli.texts import tokens_for
from ntc.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ntc.energy import EnergyReport
    from ntc.text import Tokens

__all__ = ["add_to"]

_MAX_TOKENS = 2048


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        "energy",
        epilog="Examples:\n\n"
        "ntc energy build/demo --data examples/data/books-sample.txt\n\n"
        "ntc energy build/demo --constants horowitz-45nm-int8 --memory horowitz-45nm-dram --reuse 64 --sensitivity\n\n"
        "ntc energy build/demo --data examples/data/books-sample.txt --quality --report energy.html\n\n"
        "ntc energy build/demo --strict 0.1% --json\n\n"
        "ntc energy --list-constants\n\n"
        "What is counted and assumed: docs/energy.md.",
    )(energy)


def energy(
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="A compiled folder, as ntc compile writes it.", show_default=False)
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Text to measure firing rates on (default: the model's calibration.txt).")] = None,
    max_tokens: Annotated[int, typer.Option(help="Read only so many tokens.")] = _MAX_TOKENS,
    constants: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Energies per operation (default: horowitz-45nm-fp32), or a TOML file.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Energies of moving data (default: horowitz-45nm-sram), or a TOML file.")
    ] = None,
    reuse: Annotated[
        int | None, typer.Option(help="Tokens that share one read of a weight: 1 = decoding, more = prefill (default: the table's).", min=1)
    ] = None,
    sensitivity: Annotated[bool, typer.Option("--sensitivity", help="Also with constants low and high, and one by one.")] = False,
    quality: Annotated[bool, typer.Option("--quality", help="Also run the original, for its perplexity on the same tokens.")] = False,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the whole report as one HTML page without a network.")
    ] = None,
    strict: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Fail if more of the dense multiply-accumulates are not counted, such as 0.1%.")
    ] = None,
    list_constants: Annotated[bool, typer.Option("--list-constants", help="List the tables of constants that ship with ntc.")] = False,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Count operations, bytes and energy per token, with the firing rates that the program really has.

    Two columns, compute only and compute with memory, against the original network in the same arithmetic, in fp32, in 8 bits, and in
    as many bits as T steps have levels. Nothing is measured on a chip: joules are counts times published energies.
    """
    with session(as_json, verbose) as output:
        if list_constants:
            listed = _tables()
            output.result(listed, lambda console: show_constants(console, listed))
            return
        if folder is None:
            raise ConfigError("ntc energy takes DIR, a folder that ntc compile wrote; --list-constants lists tables of constants")
        allowed = None if strict is None else _share(strict)
        if report is not None:
            from ntc.energy.document import MARK
            from ntc.folders import check_page

            check_page(report, MARK, "ntc energy", "report.html")
        measured = _measured(output, folder, data, max_tokens, constants, memory, reuse, quality)
        if allowed is not None:
            measured.require_counted(allowed)
        result = {"folder": str(folder), "report": None if report is None else str(report), **measured.to_json(sensitivity)}
        if report is not None:
            tables = {"--constants": constants or measured.constants.id, "--memory": memory or measured.memory.id, "--reuse": reuse}
            options = {"--data": data, "--max-tokens": max_tokens, **tables, "--strict": strict}
            _write(report, folder, measured, options, quality)
        output.result(result, lambda console: show_energy(console, result))


def _measured(
    output: Output, folder: Path, data: Path | None, max_tokens: int, constants: str | None, memory: str | None, reuse: int | None,
    quality: bool,
) -> EnergyReport:  # fmt: skip
    from ntc import artifact
    from ntc.energy import load_constants, load_memory, measure_energy

    numbers, hierarchy = load_constants(constants), load_memory(memory, reuse)
    with output.progress() as report:
        report("load", 0, 1)
        program, analog = artifact.load(folder), artifact.load_analog(folder)
        if analog is None:
            raise ArtifactError(f"{folder} has no analog.json, which energy is compared with; compile again")
        if constants is None and "integer" in program.facts:
            output.warn(f"{folder} computes with integers and is costed as fp32: give --constants horowitz-45nm-int8")
        tokens = tokens_for(output, folder, program, data, max_tokens, "firing rates are those of random tokens")
        report("energy", 0, len(tokens.windows))
        measured = measure_energy(
            program, analog, tokens, numbers, hierarchy, progress=lambda done, total: report("energy", done, total)
        )  # fmt: skip
        if not quality:
            return measured
        report("original", 0, 1)
        return replace(measured, perplexity_ann=_perplexity(folder, program.info.source, tokens))


def _perplexity(folder: Path, source: str, tokens: Tokens) -> float:
    """Of the original, where it was when it was compiled.

    Raises:
        ArtifactError: If it is not there any more.
    """
    from ntc.frontend import capture
    from ntc.quality import perplexity

    if not Path(source).exists():
        raise ArtifactError(f"the model {source} that {folder} was compiled from is not there, and has no perplexity: leave --quality out")
    return perplexity(capture(source), tokens)


def _write(out: Path, folder: Path, measured: EnergyReport, options: Mapping[str, object], quality: bool) -> None:
    """The page, with the command line that makes it again."""
    import shlex
    from importlib.metadata import version

    from ntc.energy.document import page
    from ntc.folders import write_page

    given = {**options, "--report": out}
    words = ["ntc", "energy", str(folder), *["--quality"] * quality, *(w for k, v in given.items() if v is not None for w in (k, str(v)))]
    versions = {name: version(name) for name in ("ntc-compiler", "torch")}
    write_page(out, page(measured.to_json(sensitivity=True), folder.name, shlex.join(words), versions))


def _share(text: str) -> float:
    """A share such as ``0.1%`` or ``0.001``.

    Raises:
        ConfigError: If it is none.
    """
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"--strict takes a share such as 0.1% or 0.001, from 0 to 100%, got {text!r}")
    return share


def _tables() -> dict[str, Any]:
    from ntc.energy import list_constants, list_memories

    return {"constants": [c.to_json() for c in list_constants()], "memories": [m.to_json() for m in list_memories()]}
