"""Options that more than one command has, and how settings come together from a file and the command line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ntc.errors import ConfigError

if TYPE_CHECKING:
    from ntc.recipe import Settings

__all__ = ["Recipe", "SetOptions", "SettingsFile", "Steps", "settings_from"]

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
    options: dict[str, Any] = {}
    for pair in pairs or ():
        key, sign, text = pair.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"--set takes KEY=VALUE, got {pair!r}")
        options[key.strip().replace("-", "_")] = _value(text.strip())
    return settings.with_options(**options, **{k: v for k, v in (("steps", steps), ("percentile", percentile)) if v is not None})


def _value(text: str) -> Any:
    """A value as TOML reads it; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
