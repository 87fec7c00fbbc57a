"""Commands of plug-ins: beside ours in the help, imported when they are needed, and harmless when they are broken."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import run_ntc

CODE = '''
from typing import Annotated
import typer
from ntc.errors import DataError

def add_to(app):
    app.command("greet", epilog="Example: ntc greet Ada")(greet)

def greet(name: Annotated[str, typer.Argument(help="Whom.")], loud: bool = False) -> None:
    """Say hello."""
    if not name.isalpha():
        raise DataError(f"{name} is no name")
    print(name.upper() if loud else name)

def group(app):
    inner = typer.Typer(help="Several.")
    inner.command("one")(lambda: print(1))
    inner.command("two")(lambda: print(2))
    app.add_typer(inner, name="several")

def nothing(app):
    pass

def fails(app):
    raise KeyError("oh")

NUMBER = 3
'''

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a package of a stranger: a module and a ``.dist-info`` folder on the path."""

    def put(distribution: str, module: str, code: str = CODE, **points: str) -> None:
        info = tmp_path / distribution / f"{distribution}-1.0.dist-info"
        info.mkdir(parents=True)
        (tmp_path / distribution / f"{module}.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[ntc.commands]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))
        monkeypatch.syspath_prepend(str(tmp_path / distribution))
        monkeypatch.delitem(sys.modules, module, raising=False)

    return put


def test_a_command_of_a_plug_in_is_listed_explained_and_run(install: Install) -> None:
    install("greeter", "greeter_a", greet="greeter_a:add_to", several="greeter_a:group")
    listing = run_ntc("--help").out
    assert "greet " in listing and "Say hello." in listing and "Several." in listing and "compile" in listing
    assert "Example: ntc greet Ada" in run_ntc("greet", "--help").out
    assert run_ntc("greet", "Ada", "--loud").out == "ADA\n"
    assert run_ntc("several", "two").out == "2\n"
    ran = run_ntc("greet", "7")
    assert (ran.code, ran.err) == (2, "error: 7 is no name\n")
    assert run_ntc("gret", "Ada").err.startswith("error: No such command 'gret'")


def test_a_command_that_is_called_by_nobody_is_not_imported(install: Install, model: Path) -> None:
    install("lazy", "greeter_b", "raise SystemExit('imported')\n", greet="greeter_b:add_to")
    assert run_ntc("recipes", "--json").code == 0
    assert "greeter_b" not in sys.modules


@pytest.mark.parametrize(
    ("point", "says"),
    [
        ("greeter_c:absent", "command greet of odd cannot be imported: .*absent"),
        ("not_there:add_to", "command greet of odd cannot be imported: No module named 'not_there'"),
        ("greeter_c:NUMBER", "entry point greet of group ntc.commands is no function"),
        ("greeter_c:nothing", "entry point greet of group ntc.commands adds nothing and must add greet only"),
        ("greeter_c:group", "adds several and must add greet only"),
        ("greeter_c:fails", "command greet cannot be made: KeyError: 'oh'"),
    ],
)
def test_a_broken_command_is_listed_with_its_error_and_harms_no_other(install: Install, point: str, says: str) -> None:
    install("odd", "greeter_c", greet=point)
    listing = run_ntc("--help")
    assert listing.code == 0
    assert "greet" in listing.out and "compile" in listing.out
    ran = run_ntc("greet", "Ada", "--loud")
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert ran.err.startswith("error: ")
    assert re.search(says, ran.err), ran.err


def test_names_that_are_taken(install: Install) -> None:
    install("thief", "greeter_d", compile="greeter_d:add_to")
    ran = run_ntc("--help")
    assert (ran.code, ran.err) == (2, "error: thief brings a command called compile, which ntc has itself; remove thief\n")
    assert run_ntc("recipes", "--json").code == 0  # ours go on working
    install("first", "greeter_e", greet="greeter_e:add_to")
    install("second", "greeter_f", greet="greeter_f:add_to")
    ran = run_ntc("greet", "Ada")
    assert ran.code == 2
    assert "two packages bring a command called greet: " in ran.err


def test_the_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['ntc', '--help']\ntry:\n from ntc.cli import main; main()\n"
        "finally:\n assert not {'torch', 'numpy', 'scipy', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
