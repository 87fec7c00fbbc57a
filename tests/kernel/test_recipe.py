"""Recipes and settings: edits by name, options to the passes that have them, files with clear errors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ntc.errors import ConfigError
from ntc.pipeline import Context, Override, Pass, PassResult
from ntc.program import Program
from ntc.recipe import Recipe, Settings, Step, load_settings


@dataclass(frozen=True)
class Slow:
    steps: int = 4
    depth: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be positive, got {self.steps}")


@dataclass(frozen=True)
class Fast:
    steps: int = 2


@dataclass(frozen=True)
class Picky:
    steps: int = 2

    def __post_init__(self) -> None:
        if self.steps % 2:
            raise ValueError("steps is odd")


def pass_of(called: str, options: type[Any]) -> type[Pass]:
    def run(self: Pass, program: Program, context: Context) -> PassResult:
        return PassResult(False)

    return type(called, (Pass,), {"name": called, "Options": options, "run": run})


PASSES = {"slow": pass_of("slow", Slow), "fast": pass_of("fast", Fast)}
RECIPE = Recipe("mine", "Mine.", "a paper", "all", "none", (Step("slow", {"steps": 7}), Step("fast")))


def find(name: str) -> type[Pass]:
    if name not in PASSES:
        raise ConfigError(f"there is no pass called {name!r}")
    return PASSES[name]


def options(recipe: Recipe = RECIPE, *overrides: Override, **given: Any) -> list[Any]:
    return [p.options for p in recipe.build(Settings(given, overrides), find)]


def test_edits_by_name_leave_the_recipe_as_it_was() -> None:
    def names(recipe: Recipe) -> list[str]:
        return [s.name for s in recipe.steps]

    assert names(RECIPE.insert_before("slow", Step("plain"))) == ["plain", "slow", "fast"]
    assert names(RECIPE.insert_before("fast", Step("plain"))) == names(RECIPE.insert_after("slow", Step("plain"))) == ["slow", "plain", "fast"]
    assert names(RECIPE.insert_after("fast", Step("plain"))) == ["slow", "fast", "plain"]
    assert names(RECIPE.without("slow")) == ["fast"]
    assert names(RECIPE) == ["slow", "fast"]
    for act in (
        lambda: RECIPE.without("x"), lambda: RECIPE.insert_after("x", Step("y")), lambda: RECIPE.insert_before("x", Step("y")),
        lambda: RECIPE.with_options("x", depth=1),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="recipe mine has no pass 'x'; it has slow, fast"):
            act()


def test_the_recipe_beats_defaults_and_the_user_beats_the_recipe() -> None:
    assert options() == [Slow(7), Fast(2)]
    assert options(steps=3) == [Slow(3), Fast(3)], "a name that two passes share is set for both"
    assert options(depth=5) == [Slow(7, 5), Fast(2)]


def test_options_of_a_pass_go_over_those_that_the_recipe_chose() -> None:
    assert options(RECIPE.with_options("slow", depth=5)) == [Slow(7, 5), Fast(2)]
    assert options(RECIPE.with_options("slow", steps=8)) == [Slow(8), Fast(2)], "of the named pass alone"
    assert options(RECIPE.with_options("fast", steps=8), steps=9) == [Slow(9), Fast(9)], "the user beats the recipe"
    assert options() == [Slow(7), Fast(2)]
    with pytest.raises(ConfigError, match="pass fast has no option 'depth'"):
        options(RECIPE.with_options("fast", depth=1))


def test_a_name_with_its_pass_reaches_that_pass_alone() -> None:
    assert options(**{"slow.steps": 3}) == [Slow(3), Fast(2)]
    assert options(**{"fast.steps": 9, "steps": 3}) == [Slow(3), Fast(9)], "it goes over the name alone, in whatever order"
    assert options(RECIPE, Override("*", {"fast.steps": 3})) == [Slow(7), Fast(2)], "an override changes no default"
    for key, hint in (
        ("slow.step", r"pass slow has no option 'step'; did you mean steps\?"),
        ("fast.depth", "pass fast has no option 'depth'; it has steps"),
        ("slw.steps", r"slw.steps is an option of a pass that recipe mine does not have; did you mean slow\?"),
        ("calibrate.rows", "calibrate.rows is an option of a pass that recipe mine does not have; it has slow, fast"),
    ):
        for build in (lambda key=key: options(**{key: 3}), lambda key=key: options(RECIPE, Override("*", {key: 3}))):
            with pytest.raises(ConfigError, match=hint):
                build()
    picky = Recipe("r", "", "", "", "", (Step("slow"), Step(pass_of("fast", Picky))))
    with pytest.raises(ConfigError, match=r"override for h\.0: pass fast: steps is odd"):
        options(picky, Override("h.0", {"fast.steps": 3}))


def remarks(options: dict[str, Any], *overrides: Override, used: Any = ()) -> tuple[str, ...]:
    return RECIPE.remarks(Settings(options, overrides), find, used)


def test_an_option_that_reaches_passes_of_different_defaults_is_remarked() -> None:
    (said,) = remarks({"steps": 3})
    assert said == (
        "steps=3 sets slow (default 7) and fast (default 2): to set it for one of them alone, write slow.steps=3 or fast.steps=3"
    )  # 7 is what the recipe chose
    assert remarks({"depth": 3}) == remarks({"slow.steps": 3}) == remarks({}) == ()
    assert remarks({"steps": 3, "fast.steps": 2}) == (), "one pass is left that it reaches"
    same = RECIPE.with_options("slow", steps=2)
    assert same.remarks(Settings({"steps": 3}), find) == (), "they agree: it means the same in both"


def test_an_override_is_remarked_if_it_reached_several_passes() -> None:
    override = Override("h.0.*", {"steps": 3})
    (said,) = remarks({}, override, used={("h.0.*", "slow"), ("h.0.*", "fast")})
    assert said.startswith("steps=3 in the override for h.0.* sets slow (default 7) and fast (default 2): ")
    assert remarks({}, override) == remarks({}, override, used={("h.0.*", "slow"), ("h.1.*", "fast")}) == ()


def test_unknown_names_are_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="recipe mine has no setting 'step'; did you mean steps"):
        options(step=3)
    with pytest.raises(ConfigError, match="recipe mine has no setting 'xyz'; it has depth, steps"):
        options(xyz=3)
    with pytest.raises(ConfigError, match="recipe mine has no setting 'stepz'; did you mean steps"):
        options(RECIPE, Override("*", {"stepz": 3}))
    with pytest.raises(ConfigError, match="there is no pass called 'absent'"):
        options(RECIPE.insert_after("fast", Step("absent")))
    with pytest.raises(ConfigError, match="pass fast has no option 'depth'"):
        options(RECIPE.insert_after("fast", Step("fast", {"depth": 1})))


def test_wrong_values_are_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="pass slow: steps must be positive, got 0"):
        options(steps=0)
    with pytest.raises(ConfigError, match=r"override for h\.0\.\*: pass slow: steps must be positive, got -1"):
        options(RECIPE, Override("h.0.*", {"steps": -1}))
    assert options(RECIPE, Override("h.0.*", {"depth": 3})) == [Slow(7), Fast(2)], "an override changes no default"


def test_options_from_the_command_line_go_over_those_of_the_file() -> None:
    settings = Settings({"steps": 3, "depth": 2}).with_options(steps=9, percentile=None)
    assert settings.options == {"steps": 9, "depth": 2}


def test_a_settings_file(tmp_path: Path) -> None:
    path = tmp_path / "ntc.toml"
    path.write_text('[recipe]\nsteps = 8\n\n[[override]]\nmodule = "h.0.*"\nsteps = 16\n\n[[override]]\nmodule = "*"\ndepth = 2\n')
    assert load_settings(path) == Settings({"steps": 8}, (Override("h.0.*", {"steps": 16}), Override("*", {"depth": 2})))
    path.write_text("")
    assert load_settings(path) == Settings()
    path.write_text('[recipe]\nslow.steps = 8\nsteps = 2\n[recipe.fast-pass]\nx = 1\n[[override]]\nmodule = "*"\nfast-pass.x = 2\n')
    assert load_settings(path) == Settings({"slow.steps": 8, "steps": 2, "fast-pass.x": 1}, (Override("*", {"fast-pass.x": 2}),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[recipe", "is no TOML"),
        ("[other]\nx = 1", r"has a table \[other\]; only \[recipe\] and \[\[override\]\] are known"),
        ("recipe = 3", "recipe in .* is no table"),
        ('[override]\nmodule = "*"', "with two brackets"),
        ("override = 3", "with two brackets"),
        ("override = [1, 2]", "with two brackets"),
        ("[[override]]\nsteps = 3", r'has no module = "..." pattern'),
        ("[[override]]\nmodule = 3", r'has no module = "..." pattern'),
    ],
)
def test_bad_settings_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ntc.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_settings(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(ConfigError, match="cannot read the settings"):
            load_settings(path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is no TOML"):
        load_settings(binary)


def test_a_step_takes_a_pass_class_that_nobody_has_registered() -> None:
    own = pass_of("own", Fast)
    recipe = RECIPE.insert_after("slow", Step(own, {"steps": 5}))
    assert [s.name for s in recipe.steps] == ["slow", "own", "fast"]
    built = recipe.build(Settings(), PASSES.__getitem__)
    assert type(built[1]) is own
    assert built[1].options == Fast(5)


def test_a_recipe_is_cut_in_two_at_a_pass() -> None:
    assert [s.name for s in RECIPE.until("slow").steps] == ["slow"]
    assert [s.name for s in RECIPE.after("slow").steps] == ["fast"]
    assert RECIPE.after("fast").steps == ()
    with pytest.raises(ConfigError, match="has no pass 'other'"):
        RECIPE.until("other")
