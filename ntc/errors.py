"""The errors that ntc raises on purpose, and how they name a place in a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.fx import Node

__all__ = ["ArtifactError", "BackendError", "CaptureError", "ConfigError", "DataError", "NtcError", "PassError", "VerifyError", "where"]


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


def where(node: Node) -> str:
    """Name a node, its module and its line of model source, for the end of an error message.

    Example: ``node %gelu (transformer.h.0.mlp.act, modeling_gpt2.py:246 in forward)``.
    """
    # Imported here: meta stands above errors in the layering and only formatting needs it.
    from ntc.meta import module_of, source_of

    details = [part for part in (module_of(node), source_of(node)) if part]
    return f"node %{node.name}" + (f" ({', '.join(details)})" if details else "")
