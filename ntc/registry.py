"""Passes, recipes, back ends, executors and commands by name, through entry points: ours have no privilege over a stranger's.

Groups: ``ntc.passes``, ``ntc.recipes``, ``ntc.backends``, ``ntc.executors``, ``ntc.commands``. A name that two distributions claim is
an error that names both; a plug-in that cannot be imported is an error when it is asked for, and is listed with its error.

The command line asks this module for the names of commands, so it imports no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ntc.errors import ConfigError

if TYPE_CHECKING:
    from ntc.executors import Executor
    from ntc.pipeline import Pass
    from ntc.program import Program
    from ntc.recipe import Recipe

__all__ = ["Backend", "Listed", "backend", "command", "command_packages", "executor", "find_pass", "listed", "names_of", "recipe"]

_GROUPS = {
    "pass": "ntc.passes", "recipe": "ntc.recipes", "backend": "ntc.backends", "executor": "ntc.executors", "command": "ntc.commands",
}  # fmt: skip


@runtime_checkable
class Backend(Protocol):
    """Writes an artefact of a program: one callable object per ``--emit`` name.

    A back end with something to set is a class with an attribute ``Options``, a frozen dataclass with defaults whose
    ``__post_init__`` raises ``ValueError`` for values that do not fit, and takes such an object as its only argument, as passes do.

    Attributes:
        name: Name for ``--emit``.
        files: Names of the files that it writes.
        summary: One line for ``ntc export --help``.

    One that writes another form of the program has a further attribute ``passes``, the names of those that make it, such as
    ``("to-streaming",)``.

    One that cannot write every program may have a method ``refusal(facts: frozenset[str]) -> str``: why it can write no program of which
    these facts hold (``ntc.Pass.provides``), the end of a sentence, or an empty string if they do not tell. It is asked before a recipe
    runs, with the facts that will hold, so that nobody waits for a compilation that ends in a refusal.
    """

    name: str
    files: tuple[str, ...]
    summary: str

    def emit(self, program: Program, folder: Any, *, analog: Program | None, tokens: Any | None) -> dict[str, Any]:
        """Write the files into ``folder`` and return what was measured while checking them, as plain data.

        Args:
            program: The spiking program.
            folder: An existing folder.
            analog: The canonical program before conversion, for comparisons.
            tokens: Token ids ``[B, L]`` to measure on.
        """


@dataclass(frozen=True)
class Listed:
    """One plug-in as the listing commands show it.

    Attributes:
        name: Registry name.
        value: What it points to.
        distribution: Which package brings it.
        loaded: The object, or None if it could not be imported.
        error: Why not.
    """

    name: str
    value: str
    distribution: str
    loaded: Any | None
    error: str = ""


def _points(kind: str) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=_GROUPS[kind]):
        other = found.get(point.name)
        if other is not None and other.value != point.value:
            raise ConfigError(f"two packages bring a {kind} called {point.name}: {_dist(other)} and {_dist(point)}; remove one")
        found[point.name] = point
    return found


def _dist(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown package"


def _load(kind: str, name: str) -> Any:
    points = _points(kind)
    if name not in points:
        near = difflib.get_close_matches(name, points, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(points)) or 'none: is ntc installed?'}"
        raise ConfigError(f"there is no {kind} called {name!r}; {hint}")
    try:
        return points[name].load()
    except Exception as error:
        raise ConfigError(f"{kind} {name} of {_dist(points[name])} cannot be imported: {error}") from error


def find_pass(name: str) -> type[Pass]:
    """The pass class of that name.

    Raises:
        ConfigError: If there is none, or it cannot be imported, or it is no pass.
    """
    from ntc.pipeline import Pass

    loaded = _load("pass", name)
    if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
        raise ConfigError(f"entry point {name} of group ntc.passes is no subclass of ntc.Pass")
    if loaded.name != name:
        raise ConfigError(f"entry point {name} of group ntc.passes points to a pass that calls itself {loaded.name}")
    return loaded


def recipe(name: str) -> Recipe:
    """The recipe of that name."""
    from ntc.recipe import Recipe

    loaded = _load("recipe", name)
    if not isinstance(loaded, Recipe):
        raise ConfigError(f"entry point {name} of group ntc.recipes is no ntc.Recipe")
    return loaded


def backend(name: str, options: Mapping[str, Any] | None = None) -> Backend:
    """The back end of that name, with those of its options that differ from their defaults.

    Raises:
        ConfigError: If there is none, it cannot be made, or it has no such option or value.
    """
    loaded = _load("backend", name)
    try:
        if options:
            loaded = loaded(_configured(name, loaded, options))
        found: Any = loaded() if isinstance(loaded, type) else loaded
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"backend {name} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(found, Backend):
        raise ConfigError(f"entry point {name} of group ntc.backends is no back end: it needs name, files, summary and emit()")
    return found


def _configured(name: str, loaded: Any, values: Mapping[str, Any]) -> Any:
    """The options of a back end with those values."""
    options = getattr(loaded, "Options", None)
    known = [f.name for f in dataclasses.fields(options)] if isinstance(loaded, type) and dataclasses.is_dataclass(options) else []
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}"
            raise ConfigError(f"back end {name} has no option {key!r}; {hint}")
    try:
        return options(**values)  # type: ignore[misc]  # known is not empty: it is a dataclass
    except (TypeError, ValueError) as error:
        raise ConfigError(f"back end {name}: {error}") from error


def executor(name: str) -> Executor:
    """The executor of that name, made anew: it belongs to one artefact."""
    from ntc.executors import Executor

    loaded = _load("executor", name)
    if not (isinstance(loaded, type) and issubclass(loaded, Executor)):
        raise ConfigError(f"entry point {name} of group ntc.executors is no subclass of ntc.executors.Executor")
    try:
        return loaded()
    except Exception as error:
        raise ConfigError(f"executor {name} cannot be made: {type(error).__name__}: {error}") from error


def command(name: str) -> Callable[[Any], object]:
    """What adds the command of that name to a ``typer.Typer``."""
    loaded = _load("command", name)
    if not callable(loaded):
        raise ConfigError(f"entry point {name} of group ntc.commands is no function: it must add its command to a typer.Typer")
    found: Callable[[Any], object] = loaded
    return found


def command_packages() -> dict[str, str]:
    """Names of the commands that plug-ins bring, and the package of each; nothing is imported."""
    return {name: _dist(point) for name, point in sorted(_points("command").items())}


def names_of(kind: str) -> list[str]:
    """Names of all plug-ins of a kind; nothing is imported."""
    return sorted(_points(kind))


def listed(kind: str) -> list[Listed]:
    """All plug-ins of a kind (``pass``, ``recipe``, ``backend``, ``executor``, ``command``), those with import errors included."""
    rows = []
    for name, point in sorted(_points(kind).items()):
        try:
            rows.append(Listed(name, point.value, _dist(point), point.load()))
        except Exception as error:  # noqa: BLE001 - a broken plug-in must not take the listing down
            rows.append(Listed(name, point.value, _dist(point), None, str(error)))
    return rows
