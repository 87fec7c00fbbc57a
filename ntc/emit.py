"""Back ends at work: what can never be written of a recipe is refused before it runs; artefacts are written and measured.

Before a recipe runs, its passes say which facts will hold of the program (``ntc.pipeline.facts_after``), and a back end may say of a set of
facts why it cannot write such a program (``refusal`` of ``ntc.registry.Backend``). What facts do not tell is refused when the program is
there, by ``emit`` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ntc.errors import BackendError, NtcError, PassError
from ntc.folders import reason_of
from ntc.pipeline import facts_after, run_pipeline
from ntc.program import Program
from ntc.recipe import Recipe, Settings
from ntc.registry import Backend, backend, find_pass

__all__ = ["CAPTURED", "check_facts", "check_recipe", "emit_all", "emitters"]

CAPTURED = frozenset({"captured"})
"""Facts of a network as ``ntc.capture`` gives it."""


def emitters(names: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None = None) -> list[Backend]:
    """The back ends of those names, with their options.

    Raises:
        ConfigError: If there is no such back end or option.
    """
    return [backend(name, (options or {}).get(name)) for name in names]


def check_facts(chosen: Sequence[Backend], facts: frozenset[str], program: str = "this program") -> None:
    """Refuse back ends that can write no program of those facts.

    Args:
        chosen: The back ends.
        facts: What holds, or will hold, of the program.
        program: What to call it.

    Raises:
        BackendError: For the first one that says why it cannot.
    """
    for emitter in chosen:
        if reason := _refusal(emitter, facts):
            raise BackendError(f"{emitter.name} cannot be written of {program}: {reason}")


def check_recipe(recipe: Recipe, settings: Settings, chosen: Sequence[Backend], facts: frozenset[str] = CAPTURED) -> None:
    """Refuse a recipe whose passes do not fit together, or whose program a back end can never write; nothing of it is run.

    Args:
        recipe: What would be run.
        settings: Its settings.
        chosen: Back ends that are to write the program.
        facts: Of the network that the recipe is for.

    Raises:
        ConfigError: For an unknown pass, option or value.
        PassError: If a pass cannot take what those before it leave.
        BackendError: If a back end cannot write what they make.
    """
    check_facts(chosen, facts_after(recipe.build(settings, find_pass), facts), f"what recipe {recipe.name} makes")


def emit_all(
    chosen: Sequence[Backend], program: Program, folder: Path, analog: Program | None, tokens: Tensor | None,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:  # fmt: skip
    """Write the artefacts of a program into a folder; returns what each back end measured.

    Raises:
        BackendError: If a back end cannot express the program or fails, or an artefact disagrees with it.
    """
    results: dict[str, Any] = {}
    for number, emitter in enumerate(chosen):
        progress(f"export {emitter.name}", number, len(chosen))
        try:
            # A back end may say which passes make the form that it writes, such as the streaming one.
            form = run_pipeline(program, [find_pass(name)() for name in getattr(emitter, "passes", ())])
            results[emitter.name] = emitter.emit(form, folder, analog=analog, tokens=tokens)
        except (NtcError, OSError):
            raise
        except Exception as error:  # a stranger's back end, or a library with error classes of its own
            raise BackendError(f"back end {emitter.name} failed: {type(error).__name__}: {reason_of(error)}") from error
    progress("done", len(chosen), len(chosen))
    return results


def _refusal(emitter: Backend, facts: frozenset[str]) -> str:
    """Why a back end, or a pass that makes its form of the program, can take no program of those facts; empty if none says so."""
    ask: Callable[[frozenset[str]], str] = getattr(emitter, "refusal", lambda facts: "")
    try:
        return ask(facts_after([find_pass(name)() for name in getattr(emitter, "passes", ())], facts))
    except PassError as error:
        return str(error)
    except NtcError:
        raise
    except Exception as error:  # a stranger's back end
        raise BackendError(f"back end {emitter.name} failed: {type(error).__name__}: {reason_of(error)}") from error
