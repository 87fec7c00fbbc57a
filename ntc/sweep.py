"""Quality against energy over settings, and which of them no other beats in both.

Every setting is compiled, evaluated and counted on the same tokens; compiled folders, fine-tuned ones for instance, can stand beside
them as they are. Of two points a and b with perplexity p and energy e,

    a dominates b:   p_a <= p_b,  e_a <= e_b,  and one of the two is smaller               (Pareto)

and the front is what no point dominates. What is measured is written down point by point: a sweep that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import psutil
import torch

from ntc import artifact
from ntc.compiler import compile_model, default_calibration
from ntc.energy import measure_energy
from ntc.errors import ArtifactError, ConfigError, NtcError
from ntc.figures import Point, write_scatter
from ntc.folders import is_artifact
from ntc.frontend import capture
from ntc.loading import load_tokenizer
from ntc.program import Program
from ntc.quality import evaluate
from ntc.recipe import Settings
from ntc.registry import find_pass, recipe
from ntc.text import Tokens, read_text, tokens_from

__all__ = ["COSTS", "Plan", "Setting", "dominating", "grid", "sweep"]

COSTS = {"total": "whole network", "attention": "attention block"}
"""What the energy of a point may be: of all that is counted, or of attention with its neurons."""

POINTS, RESULT, FIGURE = "points.jsonl", "sweep.json", "front"

_QUALITY = ("perplexity", "perplexity_ann", "perplexity_change", "top1_agreement", "cosine", "kl", "firing_rate", "events_per_value")
_WEIGHTS = (".safetensors", ".bin", ".gguf")
_WINDOW = 256
_LIBRARIES = 1 << 30  # bytes of a process with torch and transformers, and of the activations of a small network
_COPIES = 4  # weights of a network while it is compiled: captured, canonical, compiled, and what passes keep

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Setting:
    """One point: a recipe with options, or a compiled folder.

    Attributes:
        recipe: Name of the recipe; empty for a folder.
        options: Options that differ from those of the plan, by name, ``steps`` for instance.
        folder: A compiled folder, measured as it is.
    """

    recipe: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    folder: str = ""

    @property
    def key(self) -> str:
        """The same for equal settings, in every process."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Plan:
    """What all points of a sweep share.

    Attributes:
        model: Folder of the original network, or its name on the hub.
        data: Text that quality and firing rates are measured on.
        calibration: Text for thresholds [default: the model's ``calibration.txt``].
        settings: Options and overrides of every setting.
        max_tokens: Quality is measured on so many tokens from the start of the text.
        energy_tokens: Operations are counted on so many of those.
    """

    model: str
    data: Path
    calibration: Path | None = None
    settings: Settings = field(default_factory=Settings)
    max_tokens: int = 8192
    energy_tokens: int = 2048

    def of(self, setting: Setting) -> Settings:
        """All options of a setting."""
        return self.settings.with_options(**setting.options)

    def identity(self) -> dict[str, Any]:
        """What the figures depend on besides the setting: points of another one are not mixed with these."""
        calibration, model = self.calibration or default_calibration(self.model), _files_of(self.model)
        return {
            "model": _hash_of(model) if model else self.model,
            "data": _hash_of([self.data]), "calibration": _hash_of([calibration] if calibration else []),
            "options": dict(self.settings.options), "overrides": [asdict(o) for o in self.settings.overrides],
            "max_tokens": self.max_tokens, "energy_tokens": self.energy_tokens,
        }  # fmt: skip


def _files_of(model: str) -> list[Path]:
    """What a local model consists of: its GGUF file, or what decides about the network in its folder; nothing for a name on the hub."""
    path = Path(model)
    return [path] if path.is_file() else sorted(p for p in path.glob("*") if p.suffix in (".json", *_WEIGHTS))


def _hash_of(files: Collection[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def grid(recipes: Sequence[str], values: Mapping[str, Sequence[Any]]) -> list[Setting]:
    """Every recipe with every combination of the values, each once.

    Raises:
        ConfigError: If an option has no value.
    """
    for name, given in values.items():
        if not given:
            raise ConfigError(f"the option {name} is varied over no value at all: give one or more")
    combinations = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    return list({s.key: s for s in (Setting(name, options) for name in recipes for options in combinations)}.values())


def dominating(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other dominates, from the least of the first coordinate; equal points all stay.

    Points with a coordinate that is not finite are left out.
    """
    known = [i for i, p in enumerate(points) if all(map(math.isfinite, p))]
    front: list[int] = []
    for i in sorted(known, key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


# ------------------------------------------------------------------------------------------------ one point


class _Bench:
    """The original network and the tokens, read once per process."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.analog = capture(plan.model)
        self.tokenizer = load_tokenizer(plan.model)
        window = min(_WINDOW, self.analog.info.context or _WINDOW)
        self.tokens = tokens_from(plan.data, self.tokenizer, window, plan.max_tokens, self.analog.info.vocab_size)
        rows = max(1, min(plan.energy_tokens, self.tokens.count) // int(self.tokens.windows.shape[1]))
        self.few = Tokens(self.tokens.windows[:rows], self.tokens.description, self.tokens.sha256)

    def measure(self, setting: Setting) -> dict[str, Any]:
        """Figures of a setting, or the sentence that says why there are none."""
        try:
            program, canonical = self._program(setting)
            quality = evaluate(program, self.analog, self.tokens).to_json()
            energy = measure_energy(program, canonical, self.few).to_json()
        except NtcError as error:
            return {"error": str(error)}
        attention, total = energy["attention"], energy["total"]
        return {
            "steps": program.steps,
            **{name: quality[name] for name in _QUALITY},
            "perplexity_change_interval": (quality["confidence"] or {}).get("perplexity_change"),
            "energy": {
                "total": {"snn_pj": total["snn_pj"], "ann_pj": total["ann_pj"], "reduction": total["reduction"]},
                "attention": {"snn_pj": attention["ssa_pj"], "ann_pj": attention["asa_pj"], "reduction": attention["reduction"]},
            },
            "steps_times_rate": attention["steps_times_rate"],
            "uncounted_share": energy["uncounted_share"],
        }  # fmt: skip

    def _program(self, setting: Setting) -> tuple[Program, Program]:
        if setting.folder:
            folder = Path(setting.folder)
            canonical = artifact.load_analog(folder)
            if canonical is None:
                raise ArtifactError(f"{folder} has no analog.json, which energy is compared with; compile again")
            return artifact.load(folder), canonical
        done = compile_model(
            self.analog, recipe=setting.recipe, settings=self.plan.of(setting), tokenizer=self.tokenizer,
            calibration=self.plan.calibration or default_calibration(self.plan.model),
        )  # fmt: skip
        return done.program, done.analog


_bench: _Bench | None = None


def _begin(plan: Plan, threads: int) -> None:
    """In a new process."""
    global _bench
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the first process says what there is to say
    torch.set_num_threads(threads)
    _bench = _Bench(plan)


def _measured(setting: Setting) -> dict[str, Any]:
    assert _bench is not None
    return _bench.measure(setting)


# ------------------------------------------------------------------------------------------------ all points


def sweep(
    plan: Plan,
    settings: Sequence[Setting],
    folder: Path | str,
    *,
    cost: str = "total",
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress = lambda label, done, total: None,
) -> dict[str, Any]:
    """Measure every setting and write ``points.jsonl``, ``sweep.json``, ``front.png`` and ``front.svg``.

    Args:
        plan: What they share.
        settings: At least one (see ``grid``).
        folder: Where to; with the points of an earlier sweep of the same plan, which then are not measured again.
        cost: ``total`` or ``attention``: the energy that decides.
        workers: Processes [default: as many as processors, settings and memory allow].
        overwrite: Forget the points of an earlier sweep.
        progress: Called with (label, done, total).

    Returns:
        What ``sweep.json`` holds (keys: docs/json.md).

    Raises:
        ConfigError: For a wrong setting, before any work; or if the folder has points of another plan.
        ArtifactError: If the folder holds something else, cannot be written, or a folder to measure is no compiled one.
        DataError: If the text cannot be read.
        NtcError: If no setting at all could be measured; the reason of the first.
    """
    folder = Path(folder)
    if cost not in COSTS:
        raise ConfigError(f"the cost of a sweep is {' or '.join(COSTS)}, got {cost!r}")
    if not settings:
        raise ConfigError("there is no setting to measure")
    if workers is not None and workers < 1:
        raise ConfigError(f"a sweep needs at least one process, got {workers}")
    for setting in settings:
        _check(plan, setting)
    for text in filter(None, (plan.data, plan.calibration)):
        read_text(text)
    found = _points_in(folder, plan, overwrite)
    left = [s for s in settings if s.key not in found]
    progress("settings", len(settings) - len(left), len(settings))
    try:
        with (folder / POINTS).open("a", encoding="utf-8") as file:
            for setting, figures in _measure_all(plan, left, workers):
                found[setting.key] = figures
                file.write(json.dumps({"setting": asdict(setting), **figures}) + "\n")
                file.flush()
                progress("settings", sum(s.key in found for s in settings), len(settings))
        result = _result(plan, settings, found, cost)
        files = _write(folder, result)
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error.strerror or error}") from error
    return {**result, "folder": str(folder), "files": files}


def _check(plan: Plan, setting: Setting) -> None:
    """Refuse a wrong setting before any work."""
    if not setting.folder:
        recipe(setting.recipe).build(plan.of(setting), find_pass)
    elif not is_artifact(Path(setting.folder)):
        raise ArtifactError(f"{setting.folder} is no compiled folder: give one that ntc compile has written")


def _points_in(folder: Path, plan: Plan, overwrite: bool) -> dict[str, dict[str, Any]]:
    """Points that are there already, by the key of their setting; makes the folder ready for more.

    A last line that was cut off by a kill is forgotten. Points that failed are tried again.
    """
    path, identity = folder / POINTS, json.loads(json.dumps(plan.identity()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not path.is_file():
            raise ArtifactError(f"the folder {folder} holds something else than a sweep: choose another one")
        lines = [] if overwrite or not path.is_file() else path.read_text(encoding="utf-8").splitlines()
        rows = list(_rows(lines))
        if rows and rows[0].get("plan") != identity:
            before = rows[0].get("plan") or {}
            other = ", ".join(name for name in identity if before.get(name) != identity[name])
            raise ConfigError(f"{folder} has points of a sweep with other {other}: choose another folder, or give --overwrite")
        kept = [row for row in rows[1:] if "error" not in row]
        beside = path.with_name(path.name + ".part")
        beside.write_text("".join(json.dumps(row) + "\n" for row in ({"plan": identity}, *kept)), encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error.strerror or error}") from error
    return {Setting(**row["setting"]).key: {k: v for k, v in row.items() if k != "setting"} for row in kept}


def _rows(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return


def _measure_all(plan: Plan, settings: Sequence[Setting], workers: int | None) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """Each setting with its figures, as they come."""
    if not settings:
        return
    number = min(len(settings), workers or _workers(plan))
    if number == 1:
        bench = _Bench(plan)
        for setting in settings:
            yield setting, bench.measure(setting)
        return
    threads = max(1, torch.get_num_threads() // number)
    pool = ProcessPoolExecutor(number, mp_context=get_context("spawn"), initializer=_begin, initargs=(plan, threads))
    try:
        running = {pool.submit(_measured, setting): setting for setting in settings}
        for future in as_completed(running):
            yield running[future], future.result()
    except BrokenProcessPool as error:
        raise ConfigError(
            f"a process of the sweep was killed, probably for want of memory: give --workers {number // 2}; what was measured is kept"
        ) from error
    except BaseException:  # nobody waits for what is being measured
        for child in active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _workers(plan: Plan) -> int:
    """As many as there are processors, and as fit into nine tenths of the memory that is free."""
    weights = sum(p.stat().st_size for p in _files_of(plan.model) if p.suffix in _WEIGHTS)
    room = 0.9 * psutil.virtual_memory().available / (_LIBRARIES + _COPIES * weights)
    return max(1, min(torch.get_num_threads(), int(room)))


# ------------------------------------------------------------------------------------------------ what came of it


def _result(plan: Plan, settings: Sequence[Setting], found: Mapping[str, Mapping[str, Any]], cost: str) -> dict[str, Any]:
    measured = [s for s in settings if "error" not in found[s.key]]
    if not measured:
        raise ConfigError(f"none of the {len(settings)} settings could be measured; the first one says: {found[settings[0].key]['error']}")
    labels = _labels(settings)
    points = [(found[s.key]["energy"][cost]["snn_pj"], found[s.key]["perplexity"]) for s in measured]
    front = {measured[i].key for i in dominating([(x, math.nan if y is None else y) for x, y in points])}
    rows = [{"label": labels[s.key], **asdict(s), **found[s.key], "front": s.key in front} for s in settings]
    rows.sort(key=lambda row: row["energy"][cost]["snn_pj"] if "error" not in row else math.inf)
    return {
        "model": plan.model, "data": str(plan.data), "tokens": plan.max_tokens, "energy_tokens": plan.energy_tokens, "cost": cost,
        "unit": "pJ per token", "front": [row["label"] for row in rows if row["front"]], "points": rows,
    }  # fmt: skip


def _labels(settings: Sequence[Setting]) -> dict[str, str]:
    """Of each setting, by key: what distinguishes it from the others."""
    recipes = {s.recipe for s in settings if not s.folder}
    names = dict.fromkeys(name for s in settings for name in s.options)
    vary = [name for name in names if len({json.dumps(s.options.get(name)) for s in settings if not s.folder}) > 1]
    result = {}
    for s in settings:
        words = [s.recipe] if len(recipes) > 1 else []
        words += [f"{'T' if name == 'steps' else name} = {s.options[name]}" for name in vary if name in s.options]
        result[s.key] = s.folder or ", ".join(words) or s.recipe
    return result


def _write(folder: Path, result: Mapping[str, Any]) -> list[str]:
    beside = folder / f"{RESULT}.part"
    beside.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(beside, folder / RESULT)
    cost, rows = result["cost"], [row for row in result["points"] if "error" not in row and row["perplexity"]]
    ann = {row["energy"][cost]["ann_pj"]: row["perplexity_ann"] for row in rows}
    groups = [("not dominated", True), ("dominated", False)]
    points = [
        Point(Path(row["label"]).name if row["folder"] else row["label"], row["energy"][cost]["snn_pj"] / 1e6, row["perplexity"], name)
        for name, front in groups
        for row in rows
        if row["front"] is front
    ]
    points += [Point("", energy / 1e6, perplexity, "original network") for energy, perplexity in ann.items()]
    paths = write_scatter(
        points, folder / FIGURE, x_label=f"energy of the {COSTS[cost]} [µJ per token]", y_label="perplexity", join=("not dominated",)
    )
    return [POINTS, RESULT, *(p.name for p in paths)]
