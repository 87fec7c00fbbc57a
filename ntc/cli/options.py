"""Options that more than one command has, and how settings come together from a file and the command line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ntc.errors import ConfigError

if TYPE_CHECKING:
    from ntc.recipe import Settings

__all__ = ["Recipe", "SetOptions", "SettingsFile", "Steps", "named_values", "settings_from"]

Recipe = Annotated[str, typer.Option(help="Conversion method; ntc recipes lists them.")]
Steps = Annotated[int | None, typer.Option("--steps", help="T, time steps of all neurons (default: as the recipe says).")]
SettingsFile = Annotated[Path | None, typer.Option("--settings", help="TOML file: \\[recipe] and \\[\\[override]] tables.")]
SetOptions = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the recipe; ntc recipes show NAME lists them.")
]


def settings_from(file: Path | None, pairs: list[str] | None, steps: int | None, percentile: float | None) -> Settings:
    """The file's settings, then ``--set``, then ``--steps`` and ``--percentile``; what comes later wins.

    Raises:
        ConfigError: If a pair has no ``=``, or the file cannot be read.
    """
    from ntc.recipe import Settings, load_settings

    settings = load_settings(file) if file is not None else Settings()
    named = named_values("--set", pairs)
    return settings.with_options(**named, **{k: v for k, v in (("steps", steps), ("percentile", percentile)) if v is not None})


def named_values(option: str, pairs: list[str] | None) -> dict[str, Any]:
    """What an option that takes ``KEY=VALUE`` and may be repeated was given; values as TOML reads them.

    Raises:
        ConfigError: If one has no ``=``.
    """
    values: dict[str, Any] = {}
    for pair in pairs or ():
        key, sign, text = pair.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"{option} takes KEY=VALUE, got {pair!r}")
        values[key.strip().replace("-", "_")] = _value(text.strip())
    return values


def _value(text: str) -> Any:
    """A value as TOML reads it; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
