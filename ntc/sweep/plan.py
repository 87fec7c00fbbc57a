"""What a sweep measures: settings, and what all of them share."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ntc.compiler import default_calibration
from ntc.errors import ConfigError
from ntc.recipe import Settings

__all__ = ["COSTS", "WEIGHTS", "Plan", "Setting", "files_of", "grid", "sha256_of"]

COSTS = {"total": "whole network", "attention": "attention block"}
"""What the energy of a point may be: of all that is counted, or of attention with its neurons."""

WEIGHTS = (".safetensors", ".bin", ".gguf")


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
        calibration, model = self.calibration or default_calibration(self.model), files_of(self.model)
        return {
            "model": _hash_of(model) if model else self.model,
            "data": _hash_of([self.data]), "calibration": _hash_of([calibration] if calibration else []),
            "options": dict(self.settings.options), "overrides": [asdict(o) for o in self.settings.overrides],
            "max_tokens": self.max_tokens, "energy_tokens": self.energy_tokens,
        }  # fmt: skip


def files_of(model: str) -> list[Path]:
    """What a local model consists of: its GGUF file, or what decides about the network in its folder; nothing for a name on the hub."""
    path = Path(model)
    return [path] if path.is_file() else sorted(p for p in path.glob("*") if p.suffix in (".json", *WEIGHTS))


def sha256_of(path: Path) -> str:
    """Hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of(files: Collection[Path]) -> str:
    return hashlib.sha256("".join(path.name + sha256_of(path) for path in files).encode()).hexdigest()


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
