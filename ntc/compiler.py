"""The only orchestrator: capture, passes, artefacts."""

from __future__ import annotations

import difflib
import fnmatch
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ntc import artifact
from ntc.emit import CAPTURED, check_facts, check_recipe, emit_all, emitters
from ntc.errors import ConfigError
from ntc.folders import check_output, replacing_folder
from ntc.frontend import capture
from ntc.loading import folder_of, load_tokenizer
from ntc.meta import module_of
from ntc.pipeline import Calibration, Context, run_pipeline
from ntc.program import Program
from ntc.recipe import Recipe, Settings, Step
from ntc.registry import Backend, backend, find_pass
from ntc.registry import recipe as find_recipe
from ntc.scratch import default_folder, give_back, is_mapped, offered
from ntc.text import Tokens, calibration_from, random_tokens, read_text, tokens_from

__all__ = [
    "DEFAULT_RECIPE", "Compilation", "compile_model", "default_calibration", "export", "quantize", "quantize_folder", "quantizing", "write",
]  # fmt: skip

DEFAULT_RECIPE = "neurtransformer"

# Enough for percentiles per channel; more changes thresholds in the third digit.
_CALIBRATION_TOKENS = 4096
_WINDOW = 256

_QUANTIZE = "quantize"

Progress = Callable[[str, int, int], None]


def _silent(label: str, done: int, total: int) -> None:
    return None


@dataclass(frozen=True)
class Compilation:
    """Result of ``compile_model``.

    Attributes:
        program: The compiled program.
        analog: The canonical network before conversion.
        recipe: The recipe that was run.
        settings: What the user set.
        calibration: The tokens that thresholds came from.
        tokenizer: The model's tokenizer, or None.
        seconds: Time of each stage.
        warnings: What the user should know, one sentence each.
        calibrated: Whether a pass has asked for those tokens.
    """

    program: Program
    analog: Program
    recipe: Recipe
    settings: Settings
    calibration: Calibration
    tokenizer: Any | None
    seconds: Mapping[str, float]
    warnings: tuple[str, ...] = field(default=())
    calibrated: bool = True

    def about(self) -> dict[str, Any]:
        """What the manifest says of how the program was made."""
        return {
            "recipe": {"name": self.recipe.name, "source": self.recipe.source, "passes": [s.name for s in self.recipe.steps]},
            "settings": {"options": dict(self.settings.options), "overrides": [asdict(o) for o in self.settings.overrides]},
            "calibration": {
                "data": self.calibration.description, "tokens": self.calibration.tokens, "sha256": self.calibration.sha256,
            },
        }  # fmt: skip


def default_calibration(source: str | Path) -> Path | None:
    """The text that calibrates a model when none is given: ``calibration.txt`` in its folder, or beside its GGUF file, else none."""
    path = folder_of(source) / "calibration.txt"
    return path if path.is_file() else None


def quantizing(recipe: str | Recipe, weight_bits: int | None) -> Recipe:
    """A recipe that ends with integers; the recipe as it is if no width is given."""
    chosen = find_recipe(recipe) if isinstance(recipe, str) else recipe
    if weight_bits is None:
        return chosen
    return replace(chosen, steps=(*chosen.steps, Step(_QUANTIZE, {"weight_bits": weight_bits})))


def compile_model(
    model: nn.Module | str | Path | Program,
    *,
    recipe: str | Recipe = DEFAULT_RECIPE,
    settings: Settings | None = None,
    steps: int | None = None,
    percentile: float | None = None,
    quantize: int | None = None,
    until_quantize: bool = False,
    calibration: Path | str | Calibration | Tokens | None = None,
    targets: Sequence[str | Backend] = (),
    tokenizer: Any | None = None,
    example: Tensor | None = None,
    scratch: Path | None = None,
    progress: Progress = _silent,
) -> Compilation:
    """Compile a model to a spiking program.

    Args:
        model: A folder, a hub id, or a module (see ``ntc.capture``); or a network that is captured already.
        recipe: Name of a recipe, or one of your own.
        settings: Options and overrides (see ``ntc.recipe.load_settings``).
        steps: T, number of time steps, for all passes that have such an option.
        percentile: Percentile of activations that becomes a threshold, likewise; for one pass alone see ``ntc.Settings``.
        quantize: End with a program of integers, whose weights have so many bits: 4, 8 or 16; None = floating point.
        until_quantize: Leave that last step to ``ntc.compiler.quantize``, to fine-tune in between.
        calibration: A text file, or tokens. By default ``calibration.txt`` in the model's folder; without it, random
            tokens, with a warning: then thresholds mean little.
        targets: Back ends, or their names, that ``write`` is to be asked for: what they can never write of this recipe is refused at once.
        tokenizer: If the model is a module, or captured.
        example: Example token ids, if the model is no Hugging Face model.
        scratch: Folder in which the weights of a large network lie (``ntc.scratch``); by default in the cache.
        progress: Called with (label, done, total).

    Raises:
        NtcError: With one sentence that says what was wrong.
    """
    # Before any work: a wrong option or an empty text costs no minute.
    chosen = quantizing(recipe, quantize)
    settings = (settings or Settings()).with_options(steps=steps, percentile=percentile)
    passes = chosen.build(settings, find_pass)
    facts = model.facts if isinstance(model, Program) else CAPTURED
    check_recipe(chosen, settings, [backend(t) if isinstance(t, str) else t for t in targets], facts)
    text = _calibration_text(model, calibration)
    if text is not None:
        read_text(text)
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def lap(label: str) -> None:
        nonlocal started
        now = time.perf_counter()
        seconds[label] = now - started
        started = now

    with offered(scratch or default_folder()):
        progress("capture", 0, 1)
        program = model if isinstance(model, Program) else capture(model, example)
        if tokenizer is None and isinstance(model, str | Path):
            tokenizer = load_tokenizer(model)
        lap("capture")
        warnings = list(chosen.remarks(replace(settings, overrides=()), find_pass))
        given = _calibration(text, program, calibration, tokenizer)
        data = given if given is not None else _random(program)
        context = Context(data, settings.overrides, progress)
        split = next((i + 1 for i, p in enumerate(passes) if p.name == "canonicalize"), 0)
        analog = run_pipeline(program, passes[:split], context)
        _check_overrides(analog, settings)
        if isinstance(model, str | Path):
            _let_go_of_the_file(program, analog)
        del program  # its weights in the model's own layout are not needed any more
        give_back()  # torch.export leaves cycles that hold all of them
        lap("canonicalize")
        left = [p for p in passes[split:] if not (until_quantize and p.name == _QUANTIZE)]
        compiled = run_pipeline(analog, left, context)
        lap("passes")
    for override in settings.overrides:
        if override.module not in {module for module, _ in context.used}:
            warnings.append(f"the override for {override.module} changed nothing: no pass sets an option at those modules")
    warnings += chosen.remarks(Settings(overrides=settings.overrides), find_pass, context.used)
    calibrated = "calibration" in context.asked or (until_quantize and quantize is not None)
    if given is None and calibrated:
        warnings.append("no calibration text was given, so thresholds come from random tokens and mean little: give --calibration FILE")
    return Compilation(compiled, analog, chosen, settings, data, tokenizer, seconds, tuple(warnings), calibrated)


def quantize(compilation: Compilation, progress: Progress = _silent) -> Compilation:
    """The step that ``until_quantize`` has left out, on the program as it is now.

    Raises:
        PassError: If the program has no integer form; names the node.
    """
    steps = [p for p in compilation.recipe.build(compilation.settings, find_pass) if p.name == _QUANTIZE]
    context = Context(compilation.calibration, compilation.settings.overrides, progress)
    return replace(compilation, program=run_pipeline(compilation.program, steps, context))


def quantize_folder(
    source: Path | str,
    out: Path | str,
    options: Mapping[str, Any] | None = None,
    *,
    calibration: Calibration,
    overwrite: bool = False,
    progress: Progress = _silent,
) -> tuple[Program, Program]:
    """Quantize the program of a compiled or fine-tuned folder and write it to another one.

    Args:
        source: The folder; tokenizer, original network, log and baseline of its fine-tuning and what is known of the compilation are
            taken over. Artefacts are not: they are of the program in floating point.
        out: Where to, as for ``write``.
        options: Of the pass ``quantize``.
        calibration: Tokens that scales are chosen on.
        overwrite: Replace the program that is there.
        progress: Called with (label, done, total).

    Returns:
        The program in floating point, and the one in integers.

    Raises:
        ConfigError: For an option that the pass does not have.
        ArtifactError: If a folder cannot be read or written.
        PassError: If the program has no integer form; names the node.
    """
    source, out = Path(source), Path(out)
    check_output(out, overwrite)
    step = find_pass(_QUANTIZE).configure(_unqualified(_QUANTIZE, options or {}))
    manifest, program = artifact.read_manifest(source), artifact.load(source)
    if "integer" in program.facts:
        raise ConfigError(f"the program in {source} computes with integers already: quantize the one that it was made from")
    result = run_pipeline(program, [step], Context(calibration, progress=progress))
    about: dict[str, Any] = {key: manifest[key] for key in ("recipe", "settings", "calibration") if key in manifest}
    if "recipe" in about:
        about["recipe"] = {**about["recipe"], "passes": [*about["recipe"]["passes"], _QUANTIZE]}
    with replacing_folder(out) as beside:
        artifact.save(result, beside, about=about)
        artifact.take_over(source, beside)
        artifact.seal(beside)
    return program, result


def _unqualified(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of one pass, whether or not they are named with it; ``quantize.weight_bits`` goes over ``weight_bits``."""
    return {key.removeprefix(f"{name}."): options[key] for key in sorted(options, key=lambda key: key.startswith(f"{name}."))}


def _calibration_text(model: nn.Module | str | Path | Program, given: Path | str | Calibration | Tokens | None) -> Path | None:
    if isinstance(given, Path | str):
        return Path(given)
    return default_calibration(model) if given is None and isinstance(model, str | Path) else None


def _let_go_of_the_file(loaded: Program, canonical: Program) -> None:
    """Copy what the canonical program still shares with the loaded one, so that the weight file leaves the memory.

    Weights are mapped from their file, and the few that canonicalize keeps as they are (embeddings, norms) would hold the whole
    mapping.
    """
    mapped = {t.data_ptr() for t in loaded.tensors.values()}
    for tensor in canonical.tensors.values():
        if tensor.data_ptr() in mapped and not is_mapped(tensor):
            tensor.data = tensor.data.clone()


def _calibration(
    text: Path | None, program: Program, given: Path | str | Calibration | Tokens | None, tokenizer: Any
) -> Calibration | None:
    """The text to calibrate on; None if there is none."""
    if isinstance(given, Calibration):
        return given
    if isinstance(given, Tokens):
        return calibration_from(given)
    window = min(_WINDOW, program.info.context or _WINDOW)
    if text is not None and (given is not None or tokenizer is not None):
        return calibration_from(tokens_from(text, tokenizer, window, _CALIBRATION_TOKENS, program.info.vocab_size))
    return None


def _random(program: Program) -> Calibration:
    """Random tokens, where there is no text."""
    window = min(_WINDOW, program.info.context or _WINDOW)
    return calibration_from(random_tokens(program.info.vocab_size, window, min(_CALIBRATION_TOKENS, 8 * window)))


def _check_overrides(analog: Program, settings: Settings) -> None:
    """Refuse an override whose pattern matches no module: it would do nothing, and nobody would see that."""
    modules = list(dict.fromkeys(module_of(n) for n in analog.graph.nodes))
    for override in settings.overrides:
        if not fnmatch.filter(modules, override.module):
            near = difflib.get_close_matches(override.module, modules, n=1, cutoff=0.3)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise ConfigError(f"the override for {override.module!r} matches no module of {analog.info.source}{hint}")


def write(
    compilation: Compilation,
    folder: Path | str,
    *,
    emit: Sequence[str] = (),
    emit_options: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
    tokens: Tensor | None = None,
    also: Callable[[Path], None] | None = None,
    progress: Progress = _silent,
) -> dict[str, Any]:
    """Write a compilation to a folder, with the artefacts asked for; returns what each back end measured.

    Args:
        compilation: What ``compile_model`` returned.
        folder: A folder that is empty or does not exist, unless ``overwrite`` is given and it holds a program of ours.
        emit: Names of back ends.
        emit_options: Options of back ends, by name.
        overwrite: Replace the program that is there.
        tokens: Token ids ``[B, L]`` on which back ends measure and check; by default the first windows of the calibration.
        also: Called with the folder before it is sealed, to put more into it.
        progress: Called with (label, done, total).

    Raises:
        ArtifactError: If the folder may not be written.
        BackendError: If a back end cannot express the program, or an artefact disagrees with it.
    """
    folder = Path(folder)
    check_output(folder, overwrite)
    chosen = emitters(emit, emit_options)
    check_facts(chosen, compilation.program.facts)
    tokens = compilation.calibration.batches[0][:2] if tokens is None else tokens
    with replacing_folder(folder) as beside:
        artifact.save(
            compilation.program, beside, analog=compilation.analog, tokenizer=compilation.tokenizer, about=compilation.about()
        )
        results = emit_all(chosen, compilation.program, beside, compilation.analog, tokens, progress)
        if also is not None:
            also(beside)
        artifact.seal(beside, targets=results)
    return results


def export(
    source: Path | str,
    emit: Sequence[str],
    *,
    emit_options: Mapping[str, Mapping[str, Any]] | None = None,
    tokens: Tensor | None = None,
    progress: Progress = _silent,
) -> dict[str, Any]:
    """Add artefacts to a compiled folder; the folder is replaced as a whole when all have succeeded.

    Raises:
        ConfigError: If nothing is asked for.
        ArtifactError: If the folder holds no program.
    """
    if not emit:
        raise ConfigError("nothing to export: name a target, such as onnx or netlist")
    folder = Path(source)
    chosen = emitters(emit, emit_options)
    program, analog = artifact.load(folder), artifact.load_analog(folder)
    check_facts(chosen, program.facts)
    with replacing_folder(folder) as beside:
        shutil.copytree(folder, beside, dirs_exist_ok=True)
        results = emit_all(chosen, program, beside, analog, tokens, progress)
        artifact.seal(beside, targets={**artifact.read_manifest(beside).get("targets", {}), **results})
    return results
