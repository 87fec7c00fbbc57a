"""The field tables of ``docs/netlist.md``, made from the schema so that the page cannot fall behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ntc.errors import ArtifactError
from ntc_backends.netlist_schema import schema_text

__all__ = ["BEGIN", "END", "field_tables", "renew", "renew_file"]

BEGIN = "<!-- fields: made by python -m ntc_backends.netlist_schema, do not edit -->"
END = "<!-- end of fields -->"


_ARGUMENT = "boolean, number, string, null, [ValueRef](#valueref), [TensorRef](#tensorref), [NonFinite](#nonfinite) or list of these"


def field_tables() -> str:
    """One Markdown table per object of the schema, the netlist itself first, then in the order in which it names them."""
    published: dict[str, Any] = json.loads(schema_text())
    definitions: dict[str, Any] = published["$defs"]
    objects = {"Netlist": published, **definitions}
    order = dict.fromkeys(["Netlist"])
    waiting = ["Netlist"]
    while waiting:
        name = waiting.pop(0)
        named = dict.fromkeys(_named(objects[name].get("properties", objects[name])))
        new = [part for part in named if part not in order]
        order |= dict.fromkeys(new)
        waiting += new
    parts = []
    for name in (n for n in order if "properties" in objects[n]):
        rows = [_row(field, entry, definitions) for field, entry in objects[name]["properties"].items()]
        head = ["| field | type | unit | meaning |", "| --- | --- | --- | --- |"]
        parts.append("\n".join([f"### {name}", "", objects[name]["description"], "", *head, *rows]))
    return "\n\n".join(parts) + "\n"


def renew(page: str) -> str:
    """A page with the part between the marks replaced.

    Raises:
        ArtifactError: If the marks are not there.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ArtifactError(f"the page has no part between {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{field_tables()}\n{END}{after}"


def _named(entry: Any) -> list[str]:
    """Definitions that a piece of schema refers to, in order."""
    if isinstance(entry, dict):
        found = [entry["$ref"].rpartition("/")[2]] if "$ref" in entry else []
        return found + [name for value in entry.values() for name in _named(value)]
    return [name for value in entry for name in _named(value)] if isinstance(entry, list) else []


def _row(name: str, entry: dict[str, Any], definitions: dict[str, Any]) -> str:
    same = definitions.get(entry.get("$ref", "").rpartition("/")[2], {})  # pydantic writes an equal sentence only once
    meaning = str(entry.get("description", same.get("description", ""))).replace("|", "\\|")
    return f"| `{name}` | {_type(entry)} | {entry['unit']} | {meaning} |"


def _type(entry: dict[str, Any]) -> str:
    if "$ref" in entry:
        name = entry["$ref"].rpartition("/")[2]
        return _ARGUMENT if name == "Argument" else f"[{name}](#{name.lower()})"
    if "anyOf" in entry:
        kinds = list(dict.fromkeys(_type(option) for option in entry["anyOf"]))
        return " or ".join(kind for kind in kinds if kind != "integer" or "number" not in kinds)
    if "const" in entry or "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry.get("enum", [entry.get("const")]))
    if entry["type"] == "array":
        return f"list of {_type(entry['items'])}"
    if entry["type"] == "object":
        return f"table of {_type(entry['additionalProperties'])}"
    if ":" in entry.get("pattern", ""):
        return "endpoint"
    return str(entry["type"])


def renew_file(path: Path) -> None:
    """Renew a page in place."""
    path.write_text(renew(path.read_text(encoding="utf-8")), encoding="utf-8")
