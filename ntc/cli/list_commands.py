"""``ntc passes``, ``ntc backends`` and ``ntc recipes``: what is installed."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ntc.cli.output import JsonFlag, VerboseFlag, session, table

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("passes", epilog="Examples:\n\nntc passes\n\nntc passes --json")(passes)
    app.command("backends", epilog="Examples:\n\nntc backends\n\nntc backends --json")(backends)
    group = typer.Typer(
        invoke_without_command=True, help="List the recipes, or show one.",
        epilog="Examples:\n\nntc recipes\n\nntc recipes show neurtransformer\n\nntc recipes show ffn-only --json",
    )  # fmt: skip
    group.callback()(recipes)
    group.command("show", epilog="Example: ntc recipes show neurtransformer")(show)
    app.add_typer(group, name="recipes")


def passes(as_json: JsonFlag = False, verbose: VerboseFlag = 0) -> None:
    """List the passes: what they need, what they establish, their options, and which package brings them."""
    from ntc.registry import listed

    with session(as_json, verbose) as output:
        rows = [_pass(row) for row in listed("pass")]
        output.result({"passes": rows}, lambda console: _show_passes(console, rows))


def _pass(row: Any) -> dict[str, Any]:
    cls = row.loaded
    about: dict[str, Any] = {"name": row.name, "package": row.distribution, "entry_point": row.value, "error": row.error or None}
    if cls is None:
        return {
            **about, "summary": "", "requires": [], "provides": [], "refuses": [], "exact": None, "required": None, "options": [],
        }  # fmt: skip
    return {
        **about, "summary": cls.summary(), "requires": sorted(cls.requires), "provides": sorted(cls.provides),
        "refuses": sorted(cls.refuses), "exact": cls.exact, "required": cls.required,
        "options": _options(cls),
    }  # fmt: skip


def _options(cls: Any) -> list[dict[str, Any]]:
    """Options of a pass or back end; none if it has no such dataclass."""
    options, found = getattr(cls, "Options", None), []
    if not dataclasses.is_dataclass(options):
        return []
    meanings = _meanings(options.__doc__ or "")
    for f in dataclasses.fields(options):
        default = None if f.default is dataclasses.MISSING else f.default
        found.append({"name": f.name, "default": default, "meaning": meanings.get(f.name, "")})
    return found


def _meanings(docstring: str) -> dict[str, str]:
    """What the ``Attributes:`` section of a docstring says of each name."""
    found: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(docstring).partition("Attributes:")[2].splitlines():
        first, colon, rest = line.strip().partition(": ")
        if colon and first.isidentifier() and len(line) - len(line.lstrip()) <= 4:
            name = first
            found[name] = rest
        elif name and line.strip():
            found[name] += " " + line.strip()
    return {key: text.replace("``", "") for key, text in found.items()}


def _show_passes(console: Console, rows: list[dict[str, Any]]) -> None:
    shown = table("pass", "exact", "what it does")
    for r in rows:
        what = Text(r["summary"]) if r["error"] is None else Text(f"cannot be imported: {r['error']}", "red")
        exact = "" if r["exact"] is None else "yes" if r["exact"] else "no"
        shown.add_row(r["name"], exact, what)
        words = (("needs", "requires"), ("refuses", "refuses"), ("gives", "provides"))
        facts = [f"{word} {' and '.join(r[key])}" for word, key in words if r[key]]
        options = ", ".join(f"{o['name']}={o['default']}" for o in r["options"])
        for line in ("; ".join(facts), options):
            if line:
                shown.add_row("", "", Text(line, "dim"))
    console.print(shown)


def backends(as_json: JsonFlag = False, verbose: VerboseFlag = 0) -> None:
    """List the back ends: what they write, their options, and which package brings them. --emit NAME runs one."""
    from ntc.registry import listed, names_of

    with session(as_json, verbose) as output:
        checked = names_of("executor")
        rows = [_backend(row, row.name in checked) for row in listed("backend")]
        output.result({"backends": rows}, lambda console: _show_backends(console, rows))


def _backend(row: Any, checked: bool) -> dict[str, Any]:
    from ntc.errors import ConfigError
    from ntc.registry import backend

    cls, error = row.loaded, row.error
    if cls is not None:
        try:
            backend(row.name)
        except ConfigError as reason:  # what it needs is not installed, or it is no back end
            error = str(reason)
    return {
        "name": row.name, "package": row.distribution, "entry_point": row.value, "error": error or None,
        "summary": getattr(cls, "summary", ""), "files": list(getattr(cls, "files", ())), "passes": list(getattr(cls, "passes", ())),
        "verified": checked, "options": _options(cls),
    }  # fmt: skip


def _show_backends(console: Console, rows: list[dict[str, Any]]) -> None:
    shown = table("back end", "what it writes")
    for r in rows:
        shown.add_row(r["name"], r["summary"])
        if r["error"]:
            shown.add_row("", Text(f"cannot be used: {r['error']}", "red"))
        facts = [", ".join(r["files"]), f"of the program after {', '.join(r['passes'])}" if r["passes"] else ""]
        facts += ["ntc verify runs it" if r["verified"] else ""]
        shown.add_row("", Text("; ".join(filter(None, facts)), "dim"))
        for o in r["options"]:
            shown.add_row("", Text(f"--{r['name']}-{o['name'].replace('_', '-')} (default {o['default']}): {o['meaning']}", "dim"))
    console.print(shown)
    console.print(Text("\nntc compile --emit NAME,NAME writes them, ntc export those of a compiled folder.", "dim"))


def recipes(context: typer.Context, as_json: JsonFlag = False, verbose: VerboseFlag = 0) -> None:
    """List the recipes, or show one."""
    from ntc.registry import listed

    if context.invoked_subcommand is not None:
        return
    with session(as_json, verbose) as output:
        rows = []
        for row in listed("recipe"):
            r = row.loaded
            rows.append({
                "name": row.name, "package": row.distribution, "error": row.error or None, "summary": getattr(r, "summary", ""),
                "source": getattr(r, "source", ""), "passes": [s.name for s in getattr(r, "steps", ())],
            })  # fmt: skip
        output.result({"recipes": rows}, lambda console: _show_recipes(console, rows))


def _show_recipes(console: Console, rows: list[dict[str, Any]]) -> None:
    shown = table("recipe", "what it does", "after")
    for r in rows:
        shown.add_row(r["name"], r["summary"] if r["error"] is None else Text(f"cannot be imported: {r['error']}", "red"), r["source"])
    console.print(shown)
    console.print(Text("\nntc recipes show NAME lists its passes and settings.", "dim"))


def show(
    name: Annotated[str, typer.Argument(help="Name of the recipe.", show_default=False)],
    as_json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Show one recipe: its passes in order, and the settings that --set and a settings file can change."""
    from ntc.registry import find_pass, recipe

    with session(as_json, verbose) as output:
        found = recipe(name)
        steps = []
        for step in found.steps:
            cls = find_pass(step.name)
            options = [{**o, "default": step.options.get(o["name"], o["default"])} for o in _options(cls)]
            steps.append({"name": step.name, "summary": cls.summary(), "exact": cls.exact, "options": options})
        result = {
            "name": found.name, "summary": found.summary, "source": found.source, "spiking": found.spiking, "analog": found.analog,
            "passes": steps,
        }  # fmt: skip
        output.result(result, lambda console: _show_recipe(console, result))


def _show_recipe(console: Console, result: dict[str, Any]) -> None:
    console.print(Text(result["name"], "bold").append(f"  {result['summary']}", "not bold"))
    facts = table("", "")
    facts.show_header = False
    for key, label in (("source", "after"), ("spiking", "spiking"), ("analog", "analog")):
        facts.add_row(Text(label, "dim"), result[key])
    console.print(facts)
    console.print()
    rows = table("pass", "setting", "default", "meaning")
    for step in result["passes"]:
        rows.add_row(Text(step["name"], "bold"), "", "", Text(step["summary"], "dim"))
        for o in step["options"]:
            rows.add_row("", o["name"], str(o["default"]), o["meaning"])
    console.print(rows)
    how = "--set KEY=VALUE for every pass that has it, --set PASS.KEY=VALUE for one, or a file: --settings FILE.toml"
    console.print(Text(f"\nChange them with {how}", "dim"))
