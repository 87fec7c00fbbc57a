"""What a compilation would take: memory, processor time and disk, from a config alone.

The recipe is run on miniatures: random networks of the config's own kind with few blocks and narrow layers, saved and compiled from
their folder as a real one would be. What each stage makes is read off their programs and counted at full size: a dimension of a miniature
says which width it stands for, because its widths are all different. What each stage costs is measured on three of them,

    time = a + b blocks + c parameters,   memory = d + e parameters                        of a network that lies in memory
                                          memory = d + e (elements of the largest weight)  of one that lies on disk

a and b from narrow networks of one and of five blocks, c and e from a wide one of a single block. So the figures are those of this machine,
now. Time is that of all processors together; memory is what the kernel cannot drop (no mapped files).
"""

from __future__ import annotations

import copy
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntc import artifact
from ntc.errors import ConfigError
from ntc.frontend import capture
from ntc.loading import load_config, quiet
from ntc.pipeline import Context, run_pipeline
from ntc.program import Program
from ntc.recipe import Recipe, Settings
from ntc.registry import find_pass
from ntc.registry import recipe as find_recipe
from ntc.scratch import LARGE_BYTES, give_back, offered
from ntc.text import calibration_from, random_tokens

__all__ = ["Plan", "Rates", "Stage", "measure", "plan"]

_NARROW = {"hidden": 96, "inner": 160, "vocab": 352, "heads": 4, "keys": 2, "width": 32}
_WIDE = {"hidden": 2048, "inner": 5632, "vocab": 16384, "heads": 32, "keys": 8, "width": 64}
_BLOCKS = (1, 5)
"""Blocks of the two narrow networks."""

_TOKENS, _WINDOW = 2048, 256
"""Calibration tokens and how many of them in a row, as without a text."""

_BLOCK = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Rates:
    """What one stage costs on this machine.

    Attributes:
        name: ``capture``, a pass, or ``write``.
        fixed_s: Processor time whatever the size, in seconds.
        block_s: For each block.
        parameter_s: For each parameter.
        fixed_bytes: Memory whatever the size, the process itself included.
        element_bytes: For each parameter, or each element of the largest weight.
        by_largest: Which of the two.
    """

    name: str
    fixed_s: float
    block_s: float
    parameter_s: float
    fixed_bytes: float
    element_bytes: float
    by_largest: bool


@dataclass(frozen=True)
class Stage:
    """What one stage of the compilation would take.

    Attributes:
        name: ``capture``, a pass, or ``write``.
        cpu_seconds: Processor time.
        memory_bytes: Peak of what the kernel cannot drop.
        weight_bytes: Weights that lie in memory or, of a large network, in the scratch folder: the network, what the stage was given,
            what it makes.
    """

    name: str
    cpu_seconds: float
    memory_bytes: int
    weight_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a compilation would take.

    Attributes:
        source: The config.
        architecture: Class of the network.
        parameters: Parameters, tied ones counted once.
        blocks: Blocks of it.
        recipe: Name of the recipe.
        on_disk: Whether weights lie in the scratch folder and not in memory.
        stages: In the order in which they run.
        model_bytes: The weight file that is read.
        output_bytes: Tensors of the compiled folder.
        rates: What the stages cost on this machine.
        threads: Threads of torch while that was measured.
    """

    source: str
    architecture: str
    parameters: int
    blocks: int
    recipe: str
    on_disk: bool
    stages: tuple[Stage, ...]
    model_bytes: int
    output_bytes: int
    rates: tuple[Rates, ...] = field(default=())
    threads: int = 0

    @property
    def memory_bytes(self) -> int:
        """The peak of all stages."""
        return max(s.memory_bytes for s in self.stages)

    @property
    def cpu_seconds(self) -> float:
        """The sum of all stages."""
        return sum(s.cpu_seconds for s in self.stages)

    @property
    def scratch_bytes(self) -> int:
        """The most that lies in the scratch folder at once."""
        return max(s.weight_bytes for s in self.stages) if self.on_disk else 0

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        totals = {name: getattr(self, name) for name in ("memory_bytes", "cpu_seconds", "scratch_bytes")}
        return {**asdict(self), **totals}


def plan(
    source: str | Path,
    *,
    recipe: str | Recipe,
    settings: Settings | None = None,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> Plan:
    """Plan a compilation; needs no weights.

    Args:
        source: A config file, a folder with a ``config.json``, or a hub id.
        recipe: Name of a recipe, or one of your own.
        settings: Options, as for ``ntc.compile``.
        progress: Called with (label, done, total).

    Raises:
        CaptureError: If there is no config of a causal language model.
        ConfigError: For a wrong setting, or a network whose widths are not those of a LLaMA-type config.
    """
    chosen = find_recipe(recipe) if isinstance(recipe, str) else recipe
    chosen.build(settings or Settings(), find_pass)
    config = load_config(source)
    sizes = _sizes(config, str(source))
    parameters = _parameters(config)
    on_disk = 4 * parameters > LARGE_BYTES
    narrow, rates = measure(config, chosen, settings or Settings(), on_disk, progress)
    largest, weights, output = _at_full_size(narrow, sizes, parameters, str(source))
    stored = torch.finfo(_dtype(config)).bits // 8
    if on_disk and stored < 4:
        weights[0] += 4 * parameters  # the weight file in float32, while it is loaded
    stages = tuple(
        Stage(
            r.name, r.fixed_s + r.block_s * sizes["blocks"] + r.parameter_s * parameters,
            round(r.fixed_bytes + r.element_bytes * (largest if r.by_largest else parameters)), weight,
        )
        for r, weight in zip(rates, weights, strict=True)
    )  # fmt: skip
    return Plan(
        str(source), narrow.architecture, parameters, sizes["blocks"], chosen.name, on_disk, stages, stored * parameters, output, rates,
        torch.get_num_threads(),
    )  # fmt: skip


def measure(
    config: Any, recipe: Recipe, settings: Settings, on_disk: bool, progress: Callable[[str, int, int], None]
) -> tuple[_Run, tuple[Rates, ...]]:
    """Compile the miniatures; returns the narrow run of most blocks, with its programs, and what each stage costs."""
    few, many = _BLOCKS
    kinds = [(few, _NARROW), (few, _NARROW), (many, _NARROW), (1, _WIDE)]  # the first one warms everything up, and is not looked at
    found = list[_Run]()
    for number, (blocks, widths) in enumerate(kinds):
        progress("measure", number, len(kinds))
        found.append(_compiled(_miniature(config, blocks, widths), recipe, settings, on_disk, keep=blocks == many))
    progress("measure", len(kinds), len(kinds))
    first, one, five, wide = found
    rates = []
    for i, (small, more, large) in enumerate(zip(one.stages, five.stages, wide.stages, strict=True)):
        block = max(0.0, (more.cpu_seconds - small.cpu_seconds) / (many - few))
        fixed = max(0.0, small.cpu_seconds - few * block)
        start = first.stages[i].cpu_seconds - small.cpu_seconds  # imports and tables that are made once
        elements = wide.largest if on_disk else wide.parameters
        tiny = one.largest if on_disk else one.parameters
        rates.append(
            Rates(
                small.name, fixed + max(0.0, start), block, max(0.0, large.cpu_seconds - fixed - block) / wide.parameters,
                small.memory_bytes, max(0.0, large.memory_bytes - small.memory_bytes) / (elements - tiny), on_disk,
            )
        )  # fmt: skip
    return five, tuple(rates)


# ------------------------------------------------------------------------------------------------ miniatures


@dataclass(frozen=True)
class _Run:
    architecture: str
    parameters: int
    largest: int
    stages: list[Stage]
    analog: Program
    programs: list[Program]


def _sizes(config: Any, source: str) -> dict[str, int]:
    """Widths of a LLaMA-type config."""
    names = {
        "hidden": "hidden_size", "inner": "intermediate_size", "vocab": "vocab_size", "heads": "num_attention_heads",
        "blocks": "num_hidden_layers",
    }  # fmt: skip
    missing = [name for name in names.values() if not isinstance(getattr(config, name, None), int)]
    if missing:
        raise ConfigError(f"ntc plan knows LLaMA-type configs, and that of {source} ({config.model_type}) has no {missing[0]}")
    found = {ours: int(getattr(config, name)) for ours, name in names.items()}
    found["keys"] = int(getattr(config, "num_key_value_heads", None) or found["heads"])
    found["width"] = int(getattr(config, "head_dim", None) or found["hidden"] // found["heads"])
    return found


def _miniature(config: Any, blocks: int, widths: dict[str, int]) -> Any:
    """The config with so many blocks of those widths."""
    small = copy.deepcopy(config)
    values = {
        "hidden_size": widths["hidden"], "intermediate_size": widths["inner"], "vocab_size": widths["vocab"], "head_dim": widths["width"],
        "num_attention_heads": widths["heads"], "num_key_value_heads": widths["keys"], "num_hidden_layers": blocks,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
    }  # fmt: skip
    for name, value in values.items():
        setattr(small, name, value)
    for name in ("layer_types", "no_rope_layers"):  # one entry per block
        if getattr(config, name, None):
            setattr(small, name, [getattr(config, name)[i % config.num_hidden_layers] for i in range(blocks)])
    return small


def _dtype(config: Any) -> torch.dtype:
    """Type that weights are stored in."""
    found = getattr(config, "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _parameters(config: Any) -> int:
    """Parameters at full size, on the meta device: nothing is allocated."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


def _compiled(config: Any, recipe: Recipe, settings: Settings, on_disk: bool, keep: bool) -> _Run:
    """Compile a miniature stage by stage, measuring each; ``keep`` all programs, or as many as a compilation holds."""
    import transformers

    passes, stages = recipe.build(settings, find_pass), list[Stage]()
    with tempfile.TemporaryDirectory() as name, torch.random.fork_rng(devices=[]), offered(Path(name), -1 if on_disk else 1 << 62):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=_dtype(config))
        with quiet(transformers):
            model.save_pretrained(Path(name) / "model")
        del model
        with _measured("capture", stages):
            analog = program = capture(Path(name) / "model")
        info, largest = program.info, max(t.numel() for t in program.tensors.values())
        programs = [program] if keep else []
        context = Context(calibration_from(random_tokens(config.vocab_size, min(_WINDOW, info.context or _WINDOW), _TOKENS)))
        for step in passes:
            with _measured(step.name, stages):
                program = run_pipeline(program, [step], context)
            if step.name == "canonicalize":
                analog = program
            if keep:
                programs.append(program)
        out = Path(name) / "out"
        out.mkdir()
        with _measured("write", stages):
            artifact.save(program, out, analog=analog)
            artifact.seal(out)
    return _Run(info.architecture, info.parameters, largest, stages, analog, programs)


@contextmanager
def _measured(name: str, stages: list[Stage]) -> Iterator[None]:
    """Processor time and the peak of memory of a block."""
    give_back()  # what was freed before is no memory of this stage
    peak, done = [_not_droppable()], threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], _not_droppable())

    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    started = time.process_time()
    try:
        yield
    finally:
        seconds = time.process_time() - started
        done.set()
        watch.join()
    stages.append(Stage(name, seconds, max(peak[0], _not_droppable()), 0))


def _not_droppable() -> int:
    """Bytes in memory that are no pages of files."""
    try:
        pages = [int(n) for n in Path("/proc/self/statm").read_text().split()[1:3]]
    except OSError as error:
        raise ConfigError("ntc plan measures memory through /proc, which only Linux has") from error
    return (pages[0] - pages[1]) * 4096


# ------------------------------------------------------------------------------------------------ full size


def _at_full_size(run: _Run, sizes: dict[str, int], parameters: int, source: str) -> tuple[int, list[int], int]:
    """Elements of the largest weight, bytes of weights that are held in each stage, bytes of the result.

    Raises:
        ConfigError: If the widths do not explain the number of parameters.
    """
    narrow = {**_NARROW, "queries": _NARROW["heads"] * _NARROW["width"], "values": _NARROW["keys"] * _NARROW["width"]}
    full = {**sizes, "queries": sizes["heads"] * sizes["width"], "values": sizes["keys"] * sizes["width"]}
    scale = {narrow[n]: full[n] for n in ("hidden", "inner", "vocab", "queries", "values", "width")}

    def elements(value: Tensor) -> int:
        total = 1
        for size in value.shape:
            total *= scale.get(size, size)
        return total

    def times(name: str) -> float:
        return sizes["blocks"] / _BLOCKS[1] if _BLOCK.search(name) else 1.0

    def held(*programs: Program) -> int:
        distinct = {t.data_ptr(): (n, t) for program in programs for n, t in program.tensors.items()}
        return round(sum(elements(t) * t.element_size() * times(n) for n, t in distinct.values()))

    captured = run.programs[0]
    counted = round(sum(elements(t) * times(n) for n, t in captured.tensors.items() if isinstance(t, torch.nn.Parameter)))
    if counted != parameters:
        raise ConfigError(
            f"ntc plan cannot tell the widths of {source}: they give {counted:,} parameters, and the network has {parameters:,}"
        )
    pairs = [(captured,), *zip(run.programs, run.programs[1:], strict=False), (run.programs[-1],)]
    weights = [held(captured), *(held(run.analog, *pair) for pair in pairs[1:])]
    return max(elements(t) for t in captured.tensors.values()), weights, held(run.programs[-1])
