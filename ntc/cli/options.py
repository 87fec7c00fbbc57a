"""Options that more than one command has, and how settings come together from a file and the command line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ntc.errors import ConfigError

if TYPE_CHECKING:
    from ntc.recipe import Settings

__all__ = [
    "CompiledFolder", "EmitOptions", "EmittingCommand", "Model", "OutFolder", "Overwrite", "QuantizeBits", "Recipe", "SetOptions",
    "SettingsFile", "Steps", "backend_options", "named_values", "settings_from",
]  # fmt: skip

Model = Annotated[str, typer.Argument(help="Folder of a Hugging Face model, or its name on the hub.", show_default=False)]
CompiledFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A compiled folder, as ntc compile writes it.", show_default=False)]
OutFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it must be empty, or see --overwrite.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the compiled program that is in the folder.")]
Recipe = Annotated[str, typer.Option(help="Conversion method; ntc recipes lists them.")]
Steps = Annotated[int | None, typer.Option("--steps", help="T, time steps of all neurons (default: as the recipe says).")]
SettingsFile = Annotated[Path | None, typer.Option("--settings", help="TOML file: \\[recipe] and \\[\\[override]] tables.")]
QuantizeBits = Annotated[
    int | None,
    typer.Option("--quantize", metavar="BITS", help="End with a network of integers, weights of 4, 8 or 16 bits."),
]
SetOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="[PASS.]KEY=VALUE",
        help="A setting of the recipe: percentile=97 for every pass that has it, replace-attention.percentile=97 for that pass alone; "
        "ntc recipes show NAME lists them.",
    ),
]
EmitOptions = Annotated[
    list[str] | None,
    typer.Option("--emit-set", metavar="BACKEND.KEY=VALUE", help="An option of a back end; --BACKEND-KEY VALUE is the same."),
]


class EmittingCommand(TyperCommand):
    """A command with ``--emit``: ``--nir-reset hard`` on its line is ``--emit-set nir.reset=hard`` if a back end is called nir."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Spell the options of back ends the long way, then go on as usual."""
        ours = {option for parameter in self.params for option in (*parameter.opts, *parameter.secondary_opts)}
        return super().parse_args(ctx, _spelled_out(args, ours))


def _spelled_out(args: list[str], ours: set[str]) -> list[str]:
    result: list[str] = []
    rest = list(args)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            return [*result, argument, *rest]
        option, sign, value = argument.partition("=")
        target = None if option in ours or not option.startswith("--") else _option_of_backend(option)
        if target is None:
            result.append(argument)
            continue
        if not sign:
            if not rest:
                raise ConfigError(f"{option} needs a value")
            value = rest.pop(0)
        result += ["--emit-set", f"{target}={value}"]
    return result


def _option_of_backend(option: str) -> str | None:
    """``nir.reset`` of ``--nir-reset``, or None if no back end has such a name."""
    from ntc.registry import names_of

    text = option.removeprefix("--")
    found = max((name for name in names_of("backend") if text.startswith(f"{name}-")), key=len, default=None)
    return found and f"{found}.{text.removeprefix(f'{found}-')}"


def backend_options(pairs: list[str] | None, emit: list[str]) -> dict[str, dict[str, Any]]:
    """What ``--emit-set`` was given, by back end.

    Raises:
        ConfigError: If a pair has no point or no ``=``, or its back end is not asked for.
    """
    found: dict[str, dict[str, Any]] = {}
    for pair in pairs or ():
        name, point, rest = pair.partition(".")
        if not point or "=" in name or "=" not in rest:
            raise ConfigError(f"--emit-set takes BACKEND.KEY=VALUE, got {pair!r}")
        if name not in emit:
            raise ConfigError(f"{pair} is an option of the back end {name}, which is not asked for: give --emit {name}")
        found.setdefault(name, {}).update(named_values("--emit-set", [rest]))
    return found


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
        owner, point, name = key.strip().rpartition(".")  # names of passes have hyphens
        values[owner + point + name.replace("-", "_")] = _value(text.strip())
    return values


def _value(text: str) -> Any:
    """A value as TOML reads it; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
