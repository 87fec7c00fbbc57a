"""The pass contract and the runner that holds passes to it.

A pass declares what it needs and what it establishes; the runner checks the declaration: facts before, a verified graph
after, an unchanged fingerprint if it says that it changed nothing, unchanged logits if it says that it is exact.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import ConfigError, NtcError, PassError, VerifyError
from ntc.meta import module_of
from ntc.program import PassRecord, Program, interpret
from ntc.scratch import give_back
from ntc.verify import max_difference, verify

__all__ = [
    "LEFT_ANALOG", "Calibration", "Context", "NoOptions", "Override", "Pass", "PassResult", "exact_limit", "facts_after", "run_pipeline",
]  # fmt: skip

logger = logging.getLogger("ntc.passes")

LEFT_ANALOG = "left analog by the settings"
"""Reason of a miss that the user asked for: it is listed like any other, and held against nobody."""


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        modified: Whether the program changed at all (annotations count).
        sites: Places that it rewrote or annotated.
        missed: Places that looked right and were left alone: (node, reason).
        notes: What it measured or decided, as plain data: goes into the history and the manifest.
    """

    modified: bool
    sites: int = 0
    missed: tuple[tuple[str, str], ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibration:
    """Token ids on which statistics are taken.

    Attributes:
        batches: Token ids ``[B, L]`` each.
        description: Where they come from, for reports.
        sha256: Hash of the ids.
    """

    batches: tuple[Tensor, ...]
    description: str
    sha256: str

    @classmethod
    def of(cls, *batches: Tensor, description: str = "token ids given") -> Calibration:
        """Token ids ``[B, L]`` as calibration data."""
        digest = hashlib.sha256()
        for ids in batches:
            digest.update(ids.cpu().numpy().astype("<i8").tobytes())
        return cls(batches, description, digest.hexdigest())

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(b.numel() for b in self.batches)


@dataclass(frozen=True)
class Override:
    """Options for the modules that a glob matches, such as ``transformer.h.0.*``; names as in ``ntc.recipe.Settings``."""

    module: str
    options: Mapping[str, Any]


def _no_progress(label: str, done: int, total: int) -> None:
    return None


@dataclass(frozen=True)
class Context:
    """What the runner gives to every pass.

    Attributes:
        calibration: Calibration data, if there is any.
        overrides: Options per module; later ones win.
        progress: Called with (label, done, total) by passes that take long.
        used: (glob, name of the pass) of the overrides that have set an option of some node so far.
        asked: Names of the attributes that a pass has asked for: whether a text would have made a difference.
    """

    calibration: Calibration | None = None
    overrides: tuple[Override, ...] = ()
    progress: Callable[[str, int, int], None] = _no_progress
    used: set[tuple[str, str]] = field(default_factory=set)
    asked: set[str] = field(default_factory=set, compare=False)

    def __getattribute__(self, name: str) -> Any:
        if name == "calibration":
            object.__getattribute__(self, "asked").add(name)
        return object.__getattribute__(self, name)


@dataclass(frozen=True)
class NoOptions:
    """For passes that have nothing to set."""


class Pass(ABC):
    """One compiler pass. Subclass, set the class attributes, write ``run``.

    Attributes:
        name: Registry name, kebab case.
        requires: Facts that must hold before.
        provides: Facts that hold after.
        removes: Facts that hold no longer.
        refuses: Facts that must not hold before, each with the reason: the end of a sentence.
        exact: It computes the same function up to rounding; the runner checks that.
        required: Finding none of its sites is an error that shows the nearest miss.
        Options: Frozen dataclass of its options; the only constructor argument.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    removes: ClassVar[frozenset[str]] = frozenset()
    refuses: ClassVar[Mapping[str, str]] = {}
    exact: ClassVar[bool] = False
    required: ClassVar[bool] = False
    Options: ClassVar[type[Any]] = NoOptions

    def __init__(self, options: Any | None = None) -> None:
        self.options = options if options is not None else self.Options()

    @abstractmethod
    def run(self, program: Program, context: Context) -> PassResult:
        """Change the program in place. Raise ``PassError`` for what cannot be done; never leave half a rewrite."""

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else ""

    @classmethod
    def option_names(cls) -> list[str]:
        """Names of the options."""
        return [f.name for f in dataclasses.fields(cls.Options)]

    @classmethod
    def own(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the user's options that this pass has: ``percentile``, and ``replace-attention.percentile``, which goes over it."""
        known = cls.option_names()
        plain = {key: value for key, value in values.items() if key in known}
        return plain | {name: value for key, value in values.items() if (name := key.removeprefix(f"{cls.name}.")) != key and name in known}

    @classmethod
    def configure(cls, values: Mapping[str, Any]) -> Pass:
        """The pass with those options.

        Raises:
            ConfigError: For an option that it does not have, or a value that it does not take.
        """
        known = cls.option_names()
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}"
                raise ConfigError(f"pass {cls.name} has no option {key!r}; {hint}")
        try:
            return cls(cls.Options(**values))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"pass {cls.name}: {error}") from error

    def at(self, node: Node, context: Context) -> Any:
        """The options for one node: those of the pass with the overrides for the node's module."""
        options = self.options
        for override in context.overrides:
            if fnmatchcase(module_of(node), override.module):
                values = self.own(override.options)
                if values:
                    context.used.add((override.module, self.name))
                try:
                    options = dataclasses.replace(options, **values)
                except (TypeError, ValueError) as error:
                    raise ConfigError(f"override for {override.module}: {error}") from error
        return options


_WORTH_TIDYING = 1 << 24
"""Weights of a network for which memory is given back after each pass; it takes a fifth of a second."""


def exact_limit(largest: float) -> float:
    """Largest |difference| of logits that rounding in fp32 explains in an ordinary network whose largest |logit| is given."""
    return 1e-5 * (1.0 + largest)


def rounding_sensitivity(program: Program, seeds: int = 3) -> float:
    """How far rounding moves the logits of this very network on its example input.

    Every value of the graph is moved by one unit in the last place, up or down at random, and the largest |difference| of
    the logits over a few seeds is taken. A network with very small thresholds amplifies rounding far more than an ordinary
    one; a wrong rewrite moves its logits more still.
    """
    with torch.no_grad():
        expected, moved = program(program.example), 0.0
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)

            def shake(node: Node, args: tuple[Any, ...], value: Any, generator: torch.Generator = generator) -> Any:
                if not isinstance(value, Tensor) or not value.is_floating_point():
                    return None
                sign = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
                return value * (1 + sign * torch.finfo(value.dtype).eps)

            moved = max(moved, float((interpret(program, program.example, shake) - expected).abs().max()))
    return moved


def facts_after(passes: Sequence[Pass], facts: frozenset[str]) -> frozenset[str]:
    """What will hold of a program when passes have run on it, by what they declare; nothing is run.

    Args:
        passes: The passes, in order.
        facts: What holds of the program.

    Raises:
        PassError: If a pass needs a fact that is missing by then, or cannot take a program of the facts that hold.
    """
    for number, step in enumerate(passes):
        if missing := step.requires - facts:
            have = [p.name for p in passes if missing & p.provides]
            hint = f"run {have[0]} before it" if have else "no pass in this recipe provides it"
            raise PassError(f"pass {step.name} needs a program that is {' and '.join(sorted(missing))}: {hint}")
        for fact in sorted(step.refuses.keys() & facts):
            made = [f"what {p.name} makes" for p in passes[:number] if fact in p.provides] or ["this program"]
            raise PassError(f"pass {step.name} cannot take {made[-1]}: {step.refuses[fact]}")
        facts = (facts | step.provides) - step.removes
    return facts


def run_pipeline(program: Program, passes: Sequence[Pass], context: Context | None = None) -> Program:
    """Run passes in order and check each against its contract.

    The program given is not changed.

    Raises:
        PassError: If a fact is missing or refused, a required rewrite found nothing, or a declaration turned out wrong.
        VerifyError: If a pass left a malformed program.
    """
    context = context or Context()
    facts_after(passes, program.facts)  # the whole order is checked before anything runs
    for number, step in enumerate(passes):
        context.progress(step.name, number, len(passes))
        program = _run_one(program, step, context, number)
        if sum(t.numel() for t in program.tensors.values()) > _WORTH_TIDYING:
            give_back()  # a pass leaves a program that nobody needs, and the activations that it measured
    context.progress("done", len(passes), len(passes))
    return program


def _nearest(missed: Sequence[tuple[str, str]]) -> str:
    """What was in the way; a place that the user left alone was not, unless there is no other."""
    refused = [miss for miss in missed if miss[1] != LEFT_ANALOG]
    if missed and not refused:
        return f"all {len(missed)} are {LEFT_ANALOG}; convert one of them, or choose a recipe without this pass"
    return "; ".join(f"nearest miss %{node}: {reason}" for node, reason in refused[:1]) or "nothing looked like one"


def _checked(program: Program, work: Program, step: Pass, modified: bool) -> tuple[float, float]:
    """Shapes, verification and drift of what a pass left; every error names the pass."""
    try:
        if modified:
            work.refresh()
        verify(work)
        return max_difference(program, work)
    except VerifyError as error:
        raise VerifyError(f"pass {step.name} left a program that breaks a rule: {error}") from error
    except Exception as error:  # torch's own, from propagating shapes or from running the graph
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PassError(f"pass {step.name} left a program that does not run: {reason}") from error


def _run_one(program: Program, step: Pass, context: Context, number: int) -> Program:
    started = time.perf_counter()
    work = program.copy()
    before = work.fingerprint()
    try:
        result = step.run(work, context)
    except NtcError:
        raise
    except Exception as error:
        raise PassError(f"pass {step.name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(result, PassResult):
        raise PassError(f"pass {step.name} returned {type(result).__name__}: run() returns a PassResult")
    if program.copy().fingerprint() != before:
        raise PassError(f"pass {step.name} wrote into a tensor of the program that it was given: add a new one with add_tensor()")
    if not result.modified and (result.sites or work.fingerprint() != before):
        raise PassError(f"pass {step.name} says that it changed nothing, but it did: return modified=True, or do not edit")
    if step.required and result.sites == 0:
        raise PassError(f"pass {step.name} found none of its sites in {program.info.source}: {_nearest(result.missed)}")
    work.facts = (work.facts | step.provides) - step.removes
    drift, largest = _checked(program, work, step, result.modified)
    if step.exact and not drift <= (limit := exact_limit(largest)):
        limit = max(limit, 4 * rounding_sensitivity(program))  # the costly measurement, only where the quick limit does not do
        if not drift <= limit:
            raise PassError(
                f"pass {step.name} claims to be exact, but the logits moved by {drift:.3g} (limit {limit:.3g}): "
                "declare exact = False, or mend the rewrite"
            )
    seconds = time.perf_counter() - started
    options = {f.name: getattr(step.options, f.name) for f in dataclasses.fields(step.options)}
    work.with_record(PassRecord(step.name, options, result.sites, result.missed, seconds, drift, result.notes))
    logger.info("%02d %s sites=%d missed=%d drift=%.3g %.1f ms", number, step.name, result.sites, len(result.missed), drift, 1e3 * seconds)
    for node, reason in result.missed:
        logger.debug("%s left %%%s alone: %s", step.name, node, reason)
    return work
