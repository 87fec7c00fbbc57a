"""A recipe: a published conversion method as a named list of passes with options, one screen long."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ntc.errors import ConfigError
from ntc.pipeline import Override, Pass

__all__ = ["Recipe", "Settings", "Step", "load_settings"]


@dataclass(frozen=True)
class Step:
    """One pass of a recipe and the options that differ from its defaults.

    Attributes:
        which: Registry name of the pass, or its class: a pass of your own needs no registration to be tried.
        options: Options that differ from its defaults.
    """

    which: str | type[Pass]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Registry name of the pass."""
        return self.which if isinstance(self.which, str) else self.which.name


@dataclass(frozen=True)
class Recipe:
    """A named list of passes.

    Attributes:
        name: Name for ``--recipe``.
        summary: One line.
        source: The paper.
        spiking: What becomes spiking.
        analog: What stays analog or on the host.
        steps: The passes, in order.
    """

    name: str
    summary: str
    source: str
    spiking: str
    analog: str
    steps: tuple[Step, ...]

    def _index(self, name: str) -> int:
        names = [s.name for s in self.steps]
        if name not in names:
            raise ConfigError(f"recipe {self.name} has no pass {name!r}; it has {', '.join(names)}")
        return names.index(name)

    def insert_before(self, name: str, step: Step) -> Recipe:
        """The recipe with one more pass before the named one."""
        at = self._index(name)
        return replace(self, steps=(*self.steps[:at], step, *self.steps[at:]))

    def insert_after(self, name: str, step: Step) -> Recipe:
        """The recipe with one more pass after the named one."""
        at = self._index(name) + 1
        return replace(self, steps=(*self.steps[:at], step, *self.steps[at:]))

    def until(self, name: str) -> Recipe:
        """The recipe up to the named pass, that one included."""
        return replace(self, steps=self.steps[: self._index(name) + 1])

    def after(self, name: str) -> Recipe:
        """What follows the named pass: run it on a program that is so far, to compare variants of the rest."""
        return replace(self, steps=self.steps[self._index(name) + 1 :])

    def without(self, name: str) -> Recipe:
        """The recipe without the named pass."""
        at = self._index(name)
        return replace(self, steps=(*self.steps[:at], *self.steps[at + 1 :]))

    def with_options(self, name: str, **options: Any) -> Recipe:
        """The recipe with these options of the named pass in place of what it chose."""
        at = self._index(name)
        step = replace(self.steps[at], options={**self.steps[at].options, **options})
        return replace(self, steps=(*self.steps[:at], step, *self.steps[at + 1 :]))

    def build(self, settings: Settings, find: Callable[[str], type[Pass]]) -> list[Pass]:
        """The passes with their options: the recipe's own, then the settings.

        The overrides are tried out too, so that a wrong value is found before any work.

        Raises:
            ConfigError: For an unknown pass, a setting that no pass of the recipe has, or a value that a pass does not take.
        """
        classes = self._classes(find)
        for key in [*settings.options, *(k for o in settings.overrides for k in o.options)]:
            self._check_known(key, [cls for _, cls in classes])
        passes = []
        for step, cls in classes:
            options = {**step.options, **cls.own(settings.options)}
            passes.append(cls.configure(options))
            for override in settings.overrides:
                try:
                    cls.configure({**options, **cls.own(override.options)})
                except ConfigError as error:
                    raise ConfigError(f"override for {override.module}: {error}") from error
        return passes

    def remarks(self, settings: Settings, find: Callable[[str], type[Pass]], used: Collection[tuple[str, str]] = ()) -> tuple[str, ...]:
        """One sentence for each option that several passes got although they differ in its default.

        Args:
            settings: What the user set; what names its pass is not doubted.
            find: Pass classes by name.
            used: Which overrides have reached which passes (``Context.used``); the others say nothing yet.
        """
        given = [("", settings.options), *((o.module, o.options) for o in settings.overrides)]
        found = []
        for module, options in given:
            for key, value in options.items():
                reached = {
                    step.name: step.options.get(key, _default(cls, key))
                    for step, cls in self._classes(find)
                    if key in cls.option_names() and f"{step.name}.{key}" not in options and (not module or (module, step.name) in used)
                }
                if len({repr(default) for default in reached.values()}) > 1:
                    passes = " and ".join(f"{name} (default {default})" for name, default in reached.items())
                    where = f" in the override for {module}" if module else ""
                    one = " or ".join(f"{name}.{key}={value}" for name in reached)
                    found.append(f"{key}={value}{where} sets {passes}: to set it for one of them alone, write {one}")
        return tuple(found)

    def _classes(self, find: Callable[[str], type[Pass]]) -> list[tuple[Step, type[Pass]]]:
        return [(step, find(step.which) if isinstance(step.which, str) else step.which) for step in self.steps]

    def _check_known(self, key: str, classes: Sequence[type[Pass]]) -> None:
        """Refuse a setting that no pass has, with the nearest that there is."""
        names = {cls.name: cls.option_names() for cls in classes}
        owner, point, option = key.rpartition(".")
        if not point:
            known = sorted({name for options in names.values() for name in options})
            if key not in known:
                raise ConfigError(f"recipe {self.name} has no setting {key!r}; {_nearest(key, known)}")
        elif owner not in names:
            raise ConfigError(f"{key} is an option of a pass that recipe {self.name} does not have; {_nearest(owner, list(names))}")
        elif option not in names[owner]:
            raise ConfigError(f"pass {owner} has no option {option!r}; {_nearest(option, names[owner])}")


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}"


def _default(cls: type[Pass], option: str) -> Any:
    """Default of an option of a pass."""
    return next(f.default for f in fields(cls.Options) if f.name == option)


@dataclass(frozen=True)
class Settings:
    """What the user set.

    Attributes:
        options: By name: ``percentile`` is set for every pass of the recipe that has such an option, ``replace-attention.percentile`` for
            that pass alone and goes over it.
        overrides: The same for some modules only; they go over ``options``.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()

    def with_options(self, **values: Any) -> Settings:
        """These settings with more options; None means not given."""
        given = {k: v for k, v in values.items() if v is not None}
        return replace(self, options={**self.options, **given})


def load_settings(path: Path) -> Settings:
    """Read a TOML file with a ``[recipe]`` table and ``[[override]]`` tables, each with a ``module`` glob.

    In both, ``replace-attention.percentile = 90`` is an option of that pass alone.

    Raises:
        ConfigError: If the file is missing, is no TOML, or has other tables.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the settings {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error
    if unknown := data.keys() - {"recipe", "override"}:
        raise ConfigError(f"{path} has a table [{sorted(unknown)[0]}]; only [recipe] and [[override]] are known")
    if not isinstance(options := data.get("recipe", {}), dict):
        raise ConfigError(f"recipe in {path} is no table: write [recipe], and its options below")
    tables = data.get("override", [])
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise ConfigError(f"override in {path} is no list of tables: write [[override]], with two brackets")
    overrides = []
    for entry in tables:
        values = dict(entry)
        module = values.pop("module", None)
        if not isinstance(module, str):
            raise ConfigError(f"an [[override]] of {path} has no module = \"...\" pattern")
        overrides.append(Override(module, _flat(values)))
    return Settings(_flat(options), tuple(overrides))


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """TOML reads ``replace-attention.percentile = 90`` as a table in a table."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found.update({f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value})
    return found
