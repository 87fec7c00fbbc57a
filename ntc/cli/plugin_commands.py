"""Commands that plug-ins bring (entry points ``ntc.commands``): found by name, imported when they are called or listed.

An entry point is a function ``add_to(app)`` that adds one command, or one group of commands, under the name of the entry point to
the ``typer.Typer`` that it is given. Its module is imported for ``ntc --help`` too, so it imports what is heavy inside of the command.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from ntc.errors import ConfigError

__all__ = ["CommandGroup"]


class CommandGroup(TyperGroup):
    """The commands of ntc, then those of the plug-ins; no plug-in is looked for as long as one of ours is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names for the help; a plug-in that takes a name of ours is an error that names it."""
        from ntc.registry import command_packages

        ours, theirs = super().list_commands(ctx), command_packages()
        for name in theirs:
            if name in ours:
                raise ConfigError(f"{theirs[name]} brings a command called {name}, which ntc has itself; remove {theirs[name]}")
        return [*ours, *theirs]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, or None if nobody has it. One that cannot be imported says so in its help and fails when it is called."""
        from ntc.registry import command_packages

        ours = super().get_command(ctx, cmd_name)
        if ours is not None or cmd_name not in command_packages():
            return ours
        try:
            return _made(cmd_name)
        except ConfigError as error:
            return _broken(cmd_name, error)


def _made(name: str) -> Any:
    """What a plug-in adds under its name.

    Raises:
        ConfigError: If it cannot be imported, fails, or adds something else.
    """
    from ntc.registry import command

    add_to, app = command(name), _scratch()
    try:
        add_to(app)
        added: dict[str, Any] = typer.main.get_group(app).commands  # type: ignore[assignment]  # a mapping of click's own classes
    except Exception as error:
        raise ConfigError(f"command {name} cannot be made: {type(error).__name__}: {error}") from error
    if list(added) != [name]:
        raise ConfigError(f"entry point {name} of group ntc.commands adds {', '.join(added) or 'nothing'} and must add {name} only")
    return added[name]


def _broken(name: str, error: ConfigError) -> Any:
    app = _scratch()

    @app.command(name, help=str(error), context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
    def fail() -> None:
        raise error

    return typer.main.get_group(app).commands[name]


def _scratch() -> typer.Typer:
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    app.callback()(lambda: None)  # else typer makes a single command of a single command
    return app
