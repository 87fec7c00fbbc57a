"""Spike rasters: where and when each neuron fired, as a file of arrays or a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntc.errors import ArtifactError, BackendError
from ntc_backends import netlist_schema as schema
from ntc_backends.simulator.piece import Array

__all__ = ["check_raster", "raster_arrays", "write_raster"]

_DRAWN = 12
"""Most populations of one picture."""


def check_raster(path: Path) -> None:
    """Refuse, before anything runs, a file that could not be written.

    Raises:
        BackendError: For another kind of file, or a picture without matplotlib.
    """
    if path.suffix not in (".npz", ".png"):
        raise BackendError(f"a raster is written as .npz (arrays) or .png (a picture), and not as {path.name}")
    if path.suffix == ".png":
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise BackendError("a picture of spikes needs matplotlib: pip install matplotlib, or write an .npz file") from error


def raster_arrays(rasters: Mapping[str, Sequence[Array]]) -> dict[str, Array]:
    """One array of each population for step, sequence, token and neuron of its spikes, int32, by ``NAME.step`` and so on."""
    found = {}
    for name, parts in rasters.items():
        where = np.concatenate(parts, axis=1)
        order = np.lexsort(where[::-1])  # by step, then sequence, token, neuron: the same file whatever the order of work
        for axis, row in zip(("step", "sequence", "token", "neuron"), where[:, order], strict=True):
            found[f"{name}.{axis}"] = row
    return found


def write_raster(path: Path, netlist: schema.Netlist, rasters: Mapping[str, Sequence[Array]]) -> None:
    """Write the rasters as ``.npz`` or ``.png``.

    Raises:
        ArtifactError: If the file cannot be written.
    """
    arrays = raster_arrays(rasters)
    try:
        if path.suffix == ".npz":
            with path.open("wb") as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # its other argument is a flag
        else:
            _draw(path, netlist, arrays)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error


def _draw(path: Path, netlist: schema.Netlist, arrays: Mapping[str, Array]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = netlist.populations[:_DRAWN]
    figure = Figure(figsize=(10, 1 + 1.2 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for panel, population in zip(panels, shown, strict=True):
        step, sequence, token, neuron = (arrays[f"{population.name}.{axis}"] for axis in ("step", "sequence", "token", "neuron"))
        first = sequence == 0
        panel.plot((token + step / population.steps)[first], neuron[first], ",", color="black")
        panel.set_ylabel(population.name, rotation=0, ha="right", va="center", fontsize=7)
        panel.set_ylim(-1, population.size)
        panel.tick_params(labelsize=6)
    more = len(netlist.populations) - len(shown)
    panels[-1].set_xlabel(f"token{f' ({more} more populations are not drawn)' if more else ''}", fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": None})
