"""Pages that load nothing: one template, one style sheet, one file."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

__all__ = ["part", "render"]


def render(package: str, **values: Any) -> str:
    """The template ``page/page.html.j2`` of a package; what is put in is text and no markup, unless the template says otherwise."""
    return str(_template(package).render(**values))


def part(package: str, name: str) -> str:
    """Text of a file of the package's folder ``page``: a style sheet, a script."""
    return files(package).joinpath("page", name).read_text(encoding="utf-8")


@cache
def _template(package: str) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader(package, "page")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html.j2")
