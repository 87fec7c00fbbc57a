"""The errors that ntc raises on purpose; ``ntc.meta.where`` names the place in a graph."""

from __future__ import annotations

__all__ = [
    "ArtifactError", "BackendError", "CaptureError", "ConfigError", "DataError", "DisagreementError", "NtcError", "PassError",
    "TrainingError", "VerifyError",
]  # fmt: skip


class NtcError(Exception):
    """Base of every error of ours: one sentence for the user, no traceback needed."""


class ConfigError(NtcError):
    """An option, recipe, pass or target that does not exist or does not fit."""


class DataError(NtcError):
    """Text or token data that cannot be used."""


class CaptureError(NtcError):
    """A model that cannot be loaded or captured."""


class ArtifactError(NtcError):
    """A compiled folder that cannot be written or read."""


class PassError(NtcError):
    """A pass that could not do what its contract says."""


class VerifyError(NtcError):
    """A program that breaks a rule of its dialect; names the node."""


class BackendError(NtcError):
    """A program that a back end cannot express, or an artefact that disagrees with its program."""


class DisagreementError(BackendError):
    """An artefact that does something else than its program."""


class TrainingError(NtcError):
    """A fine-tuning run that cannot go on: a number that is not finite, or a loss that grows and stays so.

    Attributes:
        best: The best program so far (``ntc.training.run.Finetuned``), if that was asked for.
    """

    best: object | None = None
