r"""What a fine-tuning run is: every number that its result depends on, checked before any work is done.

The learning rate of step s of S, counted from 0, with W warm-up steps and the floor f:

    s < W:   lr (s + 1) / W
    else:    lr (f + (1 - f) (1 + cos(pi (s - W) / (S - W))) / 2)
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ntc.errors import ConfigError
from ntc.surrogate import surrogate as find_surrogate
from ntc.training.groups import GROUPS

__all__ = ["DEFAULT_TOKENS", "TrainingConfig", "learning_rate", "with_options"]

DEFAULT_TOKENS = 1_000_000
RESULTS = ("best", "last")
_LONGEST_WINDOW = 256
_RATE_WEIGHT = 5.0  # a tenth above the target then costs 0.05 nats, as much as 5 % of perplexity
_WARMUP_STEPS, _WARMUP_SHARE, _WARMUP_MOST = 30, 0.03, 0.2


@dataclass(frozen=True)
class TrainingConfig:
    """Options of a fine-tuning run.

    Attributes:
        group: Which tensors are trained: ``ssa``, ``thresholds``, ``ffn`` or ``all`` (``ntc.training.groups``).
        max_tokens: Tokens to train on, rounded to whole steps. Without this and ``max_minutes``: one million.
        max_minutes: Time to train for, everything but reading the text included. It becomes a number of steps as soon as
            the speed is known, and is a limit besides.
        blockwise_tokens: Tokens on which every attention and FFN is fitted to the original's by itself, before training end to end
            on further ones (``ntc.training.blockwise``); 0 = end to end only [default: as many as end to end, or half of the
            minutes; 0 if no loss compares with the original, or nothing that is trained belongs to a layer with neurons].
        blockwise_lr: Peak learning rate of that.
        window: Tokens per window [default: the context of the model, at most 256].
        rows: Windows per step, over all processes and pieces.
        accumulate: Pieces that the windows of a step are run in, one after another; takes less memory, same gradient.
        lr: Peak learning rate.
        neuron_lr: Likewise for thresholds, initial potentials, leaks, time constants and scales [default: ``lr``].
        weight_decay: Of the weight matrices (AdamW, Loshchilov & Hutter 2019); nothing else decays.
        betas: Of AdamW.
        clip: Largest norm of the gradient.
        warmup: Steps of linear warm-up [default: 3 % of the steps, at least 30, at most a fifth].
        final_lr: Where the cosine ends, as a share of the peak.
        surrogate: Surrogate gradient of all neurons (``ntc.surrogate``) [default: that of the program].
        surrogate_width: Its width in thresholds [default: that of the program].
        ce: Weight of the cross entropy of the next token.
        kl: Weight of the KL divergence from the teacher's logits.
        hidden: Weight of the distance from the teacher's hidden states.
        rate: Weight of the penalty on firing rates above ``target_rate`` [default: 5 if that is given, else 0].
        target_rate: Spikes per neuron and step that the attention populations may have on average.
        seed: Of the order of the data.
        compile: Use ``torch.compile`` [default: if a C++ compiler is there and the run is long enough to gain by it].
        bf16: Matrix products in bfloat16 [default: if the processor multiplies such matrices itself].
        checkpointing: Compute membrane potentials again in the backward pass instead of keeping them.
        validate_every: Steps between validations.
        validation_windows: Windows of the validation text.
        patience: Stop after so many validations without a better one [default: never].
        result: Which program the run gives: ``best``, the one with the best validation, or ``last``, which a short validation text
            cannot misjudge once the learning rate has come down.
        save_every: Steps between checkpoints.
        save_minutes: Minutes between checkpoints, if steps are slow.
        log_every: Steps between rows of the log.
    """

    group: str = "all"
    max_tokens: int | None = None
    max_minutes: float | None = None
    blockwise_tokens: int | None = None
    blockwise_lr: float = 2e-3
    window: int | None = None
    rows: int = 8
    accumulate: int = 1
    lr: float = 3e-4
    neuron_lr: float | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    warmup: int | None = None
    final_lr: float = 0.05
    surrogate: str | None = None
    surrogate_width: float | None = None
    ce: float = 0.3
    kl: float = 1.0
    hidden: float = 0.0
    rate: float | None = None
    target_rate: float | None = None
    seed: int = 0
    compile: bool | None = None
    bf16: bool | None = None
    checkpointing: bool = False
    validate_every: int = 50
    validation_windows: int = 64
    patience: int | None = None
    result: str = "best"
    save_every: int = 50
    save_minutes: float = 2.0
    log_every: int = 10

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with.

        Raises:
            ConfigError: Names the option and its value.
        """
        object.__setattr__(self, "betas", _pair(self.betas))
        if self.group not in GROUPS:
            raise ConfigError(f"no group of parameters is called {self.group!r}; there are {', '.join(GROUPS)}")
        if self.max_tokens is not None and self.max_minutes is not None:
            raise ConfigError("a run ends after max_tokens or after max_minutes: give one of them")
        for name in ("max_tokens", "rows", "accumulate", "validate_every", "validation_windows", "patience", "save_every", "log_every"):
            self._whole(name, 1)
        self._whole("window", 2)
        self._whole("warmup", 0)
        self._whole("seed", 0)
        self._whole("blockwise_tokens", 0)
        for name in ("max_minutes", "lr", "neuron_lr", "blockwise_lr", "clip", "surrogate_width", "target_rate", "save_minutes"):
            self._number(name, positive=True)
        for name in ("weight_decay", "ce", "kl", "hidden", "rate"):
            self._number(name, positive=False)
        if self.result not in RESULTS:
            raise ConfigError(f"the result of a run is the {' or the '.join(RESULTS)} program, got {self.result!r}")
        for name in ("compile", "bf16", "checkpointing"):
            if getattr(self, name) not in (None, True, False):
                raise ConfigError(f"{name} is true or false, got {getattr(self, name)!r}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"the betas of AdamW lie in [0, 1), got {self.betas[0]:g} and {self.betas[1]:g}")
        if not _is_number(self.final_lr) or not 0 <= self.final_lr <= 1:
            raise ConfigError(f"final_lr is a share of the peak, in [0, 1], got {self.final_lr!r}")
        if self.rows % self.accumulate:
            raise ConfigError(f"{self.rows} windows per step do not divide into {self.accumulate} equal pieces: change rows or accumulate")
        if self.target_rate is not None and self.target_rate > 1:
            raise ConfigError(f"target_rate is in spikes per neuron and step, in (0, 1], got {self.target_rate:g}")
        if self.rate and self.target_rate is None:
            raise ConfigError("a penalty on firing rates needs the rate that is allowed: give target_rate")
        if not (self.ce or self.kl or self.hidden):
            raise ConfigError("the weights of cross entropy, KL divergence and hidden states are all 0, so there is nothing to learn")
        if self.surrogate is not None:
            find_surrogate(self.surrogate)

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ConfigError(f"{name} is a whole number, at least {least}, got {value!r}")

    def _number(self, name: str, *, positive: bool) -> None:
        value = getattr(self, name)
        if value is not None and (not _is_number(value) or value < 0 or (positive and value == 0)):
            raise ConfigError(f"{name} is a {'positive number' if positive else 'number, not negative'}, got {value!r}")

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss compares with the original network."""
        return bool(self.kl or self.hidden or self.blockwise_tokens)

    @property
    def rate_weight(self) -> float:
        """Weight of the rate penalty."""
        if self.rate is None:
            return _RATE_WEIGHT if self.target_rate is not None else 0.0
        return self.rate

    def fitting(self, context: int) -> TrainingConfig:
        """This configuration with a window for a model with so many positions (0 = any number), and a budget.

        Raises:
            ConfigError: If the window is longer than the context.
        """
        if self.window is not None and context and self.window > context:
            raise ConfigError(f"a window of {self.window} tokens is longer than the model's context of {context}: take {context} or less")
        window = self.window or min(_LONGEST_WINDOW, context or _LONGEST_WINDOW)
        tokens = DEFAULT_TOKENS if self.max_tokens is None and self.max_minutes is None else self.max_tokens
        return replace(self, window=window, max_tokens=tokens)

    @property
    def step_tokens(self) -> int:
        """Tokens of one step; the window must be known (see ``fitting``)."""
        if self.window is None:
            raise ConfigError("the window is not known yet")
        return self.rows * self.window

    def steps(self) -> int | None:
        """Steps for ``max_tokens``, at least one; None if the time decides."""
        return None if self.max_tokens is None else max(1, round(self.max_tokens / self.step_tokens))

    def planned_steps(self) -> int | None:
        """Steps of both stages together, for ``max_tokens``; None if the time decides."""
        steps = self.steps()
        if steps is None or not self.blockwise_tokens:
            return steps
        return steps + (self.for_blockwise().steps() or 0)

    def for_blockwise(self) -> TrainingConfig:
        """How the layers are fitted one by one, before the rest."""
        minutes = self.max_minutes / 2 if self.max_minutes is not None and self.blockwise_tokens is None else None
        tokens = self.max_tokens if self.blockwise_tokens is None else self.blockwise_tokens
        return replace(
            self, max_tokens=tokens, max_minutes=minutes, blockwise_tokens=0, lr=self.blockwise_lr, ce=0.0, kl=0.0, hidden=1.0,
            patience=None, result="last",  # layers fitted one by one may be nearer while perplexity is not yet lower
        )  # fmt: skip

    def for_baseline(self, lr: float | None = None) -> TrainingConfig:
        """How the original network is trained on the same windows: cross entropy alone, without neurons."""
        return replace(
            self, lr=self.lr if lr is None else lr, neuron_lr=None, ce=1.0, kl=0.0, hidden=0.0, rate=None, target_rate=None,
            surrogate=None, surrogate_width=None, checkpointing=False, patience=None, blockwise_tokens=0,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Every option as plain data."""
        return {**asdict(self), "betas": list(self.betas)}


def learning_rate(config: TrainingConfig, step: int, steps: int | None) -> float:
    """Learning rate of a step as a share of the peak (module docstring); while ``steps`` is not known yet, of the warm-up."""
    warmup = config.warmup
    if warmup is None:
        warmup = _WARMUP_STEPS
        if steps is not None:
            warmup = min(max(warmup, round(_WARMUP_SHARE * steps)), int(_WARMUP_MOST * steps))
    if step < warmup:
        return (step + 1) / warmup
    if steps is None:
        return 1.0
    along = min(1.0, (step - warmup) / max(1, steps - warmup))
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * along))


def with_options(config: TrainingConfig, options: Mapping[str, Any]) -> TrainingConfig:
    """A configuration with options changed by name; None leaves them as they are.

    Raises:
        ConfigError: If there is no such option; names the nearest. And as ``TrainingConfig``.
    """
    known = [f.name for f in fields(TrainingConfig)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"fine-tuning has no option {name!r}; {hint}")
    return replace(config, **{k: v for k, v in options.items() if v is not None})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _pair(value: Any) -> tuple[float, float]:
    if isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value)):
        return float(value[0]), float(value[1])
    raise ConfigError(f"betas are two numbers, such as 0.9 and 0.95, got {value!r}")
