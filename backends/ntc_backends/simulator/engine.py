"""The simulator: elements of a netlist in their order, on whole sequences or token by token.

Two orders of work give the same spikes. *Whole*: each element takes all tokens at once; trains are sparse matrices. *Stepwise*: one token
after the other, each as a chip takes it, step by step and event by event, with what has to be remembered (M of dynamic products,
counters of row sums) as state. In the integer grade both agree to the last bit; in floating point sums in another order can move a membrane
that is within rounding of its threshold (docs/netlist.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntc.errors import BackendError, DataError
from ntc_backends import netlist_schema as schema
from ntc_backends.netlist_reader import open_netlist
from ntc_backends.simulator.activity import activity_of
from ntc_backends.simulator.host import HostIsland
from ntc_backends.simulator.neurons import Population
from ntc_backends.simulator.piece import Array, Constants, Counter, Piece
from ntc_backends.simulator.products import DynamicProduct
from ntc_backends.simulator.synapses import Projection
from ntc_backends.simulator.trains import Decode, Scale

__all__ = ["Simulator"]

Progress = Callable[[str, int, int], None]
Spikes = Callable[[str, Array], Array | None]


class Simulator:
    """A netlist that runs.

    Attributes:
        netlist: What was read.
        constants: Its tensors.
        counter: What was counted since the last ``reset``.
    """

    def __init__(self, path: Path | str, *, verify_hashes: bool = True) -> None:
        """Read and check a netlist.

        Args:
            path: ``netlist.json``, its folder, or a compiled folder that holds one.
            verify_hashes: Compare every SHA-256; without it opening is faster.

        Raises:
            ArtifactError: If the netlist is damaged.
            BackendError: If it holds something that the simulator cannot compute; names it.
        """
        self.netlist, file = open_netlist(path, verify_hashes=verify_hashes)
        self.constants = Constants(file)
        self._elements = {e.name: e for e in self.netlist.elements()}
        self._ports = {f"{e.name}:{port}": p for e in self.netlist.elements() for port, p in dict(e.outputs).items()}
        self._read_by: dict[str, list[str]] = {}
        for name in self.netlist.order:
            for endpoint in dict(self._elements[name].inputs).values():
                self._read_by.setdefault(endpoint, []).append(name)
        self._read_by.setdefault(self.netlist.output.logits, []).append(self.netlist.output.name)
        self._runners = {name: self._runner(self._elements[name]) for name in self.netlist.order}
        self._merged = self._find_merged()
        self._state: dict[str, Any] = {}
        self._before = 0
        self.counter = Counter()

    def _runner(self, element: schema.AnyElement) -> Any:
        match element:
            case schema.Population():
                return Population(element, self._ports[element.inputs.current], self.constants)
            case schema.Projection():
                return Projection(element, self.constants)
            case schema.DynamicProduct():
                return DynamicProduct(element, self.constants)
            case schema.Scale():
                return Scale(element, self.constants)
            case schema.Decode():
                return Decode(element)
            case schema.HostIsland():
                return HostIsland(element, self.constants)

    def _find_merged(self) -> dict[str, str]:
        """Projections of spikes whose current only a decode reads, by the name of the decode."""
        found = {}
        for decode in self.netlist.decodes:
            source = decode.inputs.train.partition(":")[0]
            element = self._elements.get(source)
            if isinstance(element, schema.Projection) and element.synapse == "spikes" and len(self._read_by[decode.inputs.train]) == 1:
                pre = self._elements.get(element.inputs.pre.partition(":")[0])
                if isinstance(pre, schema.Population) and not self._runners[source].integer:
                    found[decode.name] = source
        return found

    # Running it.

    def run(
        self, ids: Sequence[int] | Sequence[Sequence[int]] | Array, *, stepwise: bool = False, rasters: bool = False,
        progress: Progress | None = None, spikes: Spikes | None = None,
    ) -> Array:  # fmt: skip
        """Run whole sequences from their beginning; what was counted before is forgotten.

        Args:
            ids: Token ids ``[L]`` or ``[B, L]``.
            stepwise: Token by token, step by step, event by event, as a chip works; else layer by layer for all tokens.
            rasters: Keep where and when each neuron fired.
            progress: Called with (what, done, total).
            spikes: Called with the name of each population and the train ``[T, B, L, C]`` that it fired, at each token if ``stepwise``;
                what it returns, unless None, is what readers of the population get. It is not to write into the train.

        Returns:
            Logits ``[L, V]`` or ``[B, L, V]``.

        Raises:
            DataError: For ids that are no token ids of the model, or too many of them.
            BackendError: If an op of a host island fails; names it.
        """
        tokens = self._checked(ids)
        self.reset(rasters=rasters)
        report = progress or (lambda what, done, total: None)
        if not stepwise:
            logits = self._advance(tokens, stepwise=False, progress=report, spikes=spikes)
        else:
            rows = []
            for i in range(tokens.shape[1]):
                report("tokens", i, tokens.shape[1])
                rows.append(self._advance(tokens[:, i : i + 1], stepwise=True, progress=_quiet, spikes=spikes))
            logits = np.concatenate(rows, axis=1)
        report("done", 1, 1)
        return logits if np.ndim(ids) == 2 else logits[0]

    def step(self, token_id: int) -> Array:
        """Give it the next token of one sequence, as ``stepwise``; returns the logits ``[V]`` behind it.

        Raises:
            DataError: If it is no token id, or the context is full: ``reset`` begins another sequence.
        """
        tokens = self._checked([token_id], self._before)
        return np.asarray(self._advance(tokens, stepwise=True, progress=_quiet, spikes=None)[0, 0])

    def reset(self, *, rasters: bool = False) -> None:
        """Begin anew: no tokens, no memory, nothing counted."""
        self._state, self._before = {}, 0
        self.counter = Counter(rasters={} if rasters else None)

    @property
    def activity(self) -> dict[str, Any]:
        """What was counted since the last ``reset``, as plain data (docs/json.md, ``ntc simulate``)."""
        return activity_of(self.netlist, self.counter, self.memory)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes: of the tensor file, of weights held, of the state."""
        state = sum(_bytes(value) for value in self._state.values())
        return {"file": self.netlist.blob.bytes, "weights": self.constants.held_bytes, "state": state}

    def _checked(self, ids: Any, before: int = 0) -> Array:
        """Token ids ``[B, L]``, int64, that come behind so many others."""
        try:
            tokens = np.asarray(ids)
        except ValueError as error:  # rows of different lengths
            raise DataError(f"token ids are one list, or lists of one length: {error}") from error
        if tokens.ndim not in (1, 2) or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
            raise DataError(f"token ids are integers [L] or [B, L], at least one, and not {tokens.dtype} {list(tokens.shape)}")
        model = self.netlist.model
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or (model.vocab_size and high >= model.vocab_size):
            raise DataError(f"token ids of this model run from 0 to {model.vocab_size - 1}, and {low if low < 0 else high} is none")
        if model.context and before + tokens.shape[-1] > model.context:
            raise DataError(f"the model has a context of {model.context} tokens, and {before + tokens.shape[-1]} are given")
        return tokens.astype(np.int64).reshape(-1, tokens.shape[-1])

    def _advance(self, tokens: Array, *, stepwise: bool, progress: Progress, spikes: Spikes | None) -> Array:
        """Run a piece of the sequences; returns its logits ``[B, L, V]``."""
        piece = Piece(tokens.shape[0], self._before, tokens.shape[1], stepwise, self._state, self.counter)
        values: dict[str, Any] = {f"{self.netlist.input.name}:ids": tokens}
        waiting = {endpoint: len(readers) for endpoint, readers in self._read_by.items()}
        merged = set(self._merged.values()) if not stepwise else set()
        for number, name in enumerate(self.netlist.order):
            progress("elements", number, len(self.netlist.order))
            element = self._elements[name]
            given = {port: values[endpoint] for port, endpoint in dict(element.inputs).items()}
            (first, *_) = dict(element.outputs)
            try:
                if name in merged:
                    values[f"{name}:{first}"] = given["pre"]  # the decode takes the spikes
                elif isinstance(element, schema.Decode) and name in self._merged and not stepwise:
                    projection = self._runners[self._merged[name]]
                    values[f"{name}:{first}"] = projection.decoded(piece, given["train"], element.step_weights)
                elif isinstance(element, schema.HostIsland):
                    values |= {f"{name}:{port}": value for port, value in self._runners[name](piece, **given).items()}
                elif isinstance(element, schema.Decode):
                    values[f"{name}:{first}"] = self._runners[name](*given.values())
                else:
                    values[f"{name}:{first}"] = self._runners[name](piece, *given.values())
                if spikes is not None and isinstance(element, schema.Population):
                    other = spikes(name, values[f"{name}:{first}"])
                    values[f"{name}:{first}"] = values[f"{name}:{first}"] if other is None else other
            except (IndexError, TypeError, ValueError) as error:
                raise BackendError(f"{name} cannot be computed: {' '.join(str(error).split())}") from error
            for endpoint in dict(element.inputs).values():
                waiting[endpoint] -= 1
                if not waiting[endpoint]:
                    del values[endpoint]
        self._before += piece.length
        self.counter.tokens += tokens.size
        logits: Array = np.asarray(values[self.netlist.output.logits])
        if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
            raise BackendError(f"logits have the shape {[*tokens.shape, 'V']}, and {self.netlist.output.logits} is {list(logits.shape)}")
        return logits


def _quiet(what: str, done: int, total: int) -> None:
    """Progress that nobody wants to see."""


def _bytes(value: Any) -> int:
    return sum(map(_bytes, value)) if isinstance(value, tuple) else int(value.nbytes)
