"""What can be chosen when a program is written as NIR, and the sentence for a machine without the ``nir`` package."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from ntc.errors import ConfigError

__all__ = ["NirOptions", "require_nir"]

_RESETS = ("explicit", "hard", "annotate")
_VERSIONS = ("1.0.6", "1.0.4")


@dataclass(frozen=True)
class NirOptions:
    """How NIR files are written.

    Attributes:
        reset: How a soft reset is said: ``explicit`` = a loop of I, Threshold and Scale, exact; ``hard`` = an IF node, which
            resets to 0; ``annotate`` = an IF node with metadata that say soft, for readers that subtract.
        compat: Oldest version of the nir package that has to read the files: ``1.0.6``, or ``1.0.4`` for readers that pin it
            (sinabs, Rockpool). In NIR 1.0.4 and 1.0.5 the reset of IF and LIF subtracts by definition.
    """

    reset: Literal["explicit", "hard", "annotate"] = "explicit"
    compat: Literal["1.0.6", "1.0.4"] = "1.0.6"

    def __post_init__(self) -> None:
        if self.reset not in _RESETS:
            raise ValueError(f"reset is one of {', '.join(_RESETS)}, not {self.reset!r}")
        if self.compat not in _VERSIONS:
            raise ValueError(f"compat is one of {', '.join(_VERSIONS)}, not {self.compat!r}")
        if self.reset == "hard" and self.subtracts:
            raise ValueError(f"in NIR {self.compat} the reset of IF subtracts, so reset=hard cannot be said: take reset=annotate")

    @property
    def subtracts(self) -> bool:
        """Whether IF and LIF of that version subtract their threshold by definition."""
        return self.compat == "1.0.4"


def require_nir() -> None:
    """Refuse to go on without the packages that this back end needs beyond those of ntc.

    Raises:
        ConfigError: Says how to install them.
    """
    missing = [name for name in ("nir", "h5py") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the back end nir needs {' and '.join(missing)}, not installed here: pip install 'ntc-compiler[nir]'")
