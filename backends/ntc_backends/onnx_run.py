"""Model files in ONNX Runtime: as they are, with the spikes of every population among their outputs, or cut behind the populations.

One mechanism for both forms of a program: a file of the streaming one takes and returns a state, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch
from onnx import helper
from torch import Tensor
from torch.fx import Node

from ntc.errors import BackendError, DisagreementError
from ntc.recording import sources
from ntc_backends.onnx_integer_trains import pack, unpack
from ntc_backends.onnx_writer import onnx_type

__all__ = ["Exposed", "Step", "session"]


def session(model: Path | bytes, folder: Path | None = None) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        model: A file, or its bytes.
        folder: Where the external weights of bytes are.

    Raises:
        BackendError: If ONNX Runtime cannot load it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    given = str(model) if isinstance(model, Path) else model
    try:
        return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds
        raise BackendError(f"ONNX Runtime cannot load the model: {error}") from error


class Step(NamedTuple):
    """What a model did with some tokens.

    Attributes:
        logits: ``[B, L, V]``.
        fired: What each population fired, ``[T, B, L, C]``; or its counts ``[B, L, C]``.
        state: The new state by the names of the old one.
    """

    logits: Tensor
    fired: dict[str, Tensor]
    state: dict[str, Tensor]


class _Form(NamedTuple):
    """How a model holds what a population fires: the third one says how a train is packed, if it is (``onnx_integer_trains``)."""

    dtype: torch.dtype
    shape: list[int | str]
    packing: tuple[int, int, int] | None


class Exposed:
    """A model file whose populations are seen.

    The file is changed in memory only: what a population fires becomes an output. With ``cut`` the edge behind it is cut, too: what its
    readers see is an input; so is the value that the spikes were made of, where a reader takes that as well (``OpSpec.source``).

    Attributes:
        counts: Populations that the file runs in closed form: their value is the number of spikes ``[B, L, C]`` and not a train.
        sources: Of a model that is cut, nodes of the program whose values are inputs beside the trains.
    """

    def __init__(self, path: Path, populations: Mapping[str, Node], *, cut: bool, state: Sequence[str] = ()) -> None:
        """Load the model.

        Args:
            path: The file; external weights lie beside it.
            populations: Nodes of the program by name: nodes of the file have the same names.
            cut: Whether to cut.
            state: Names of the parts of its state: inputs ``NAME`` and outputs ``NAME_next``.

        Raises:
            DisagreementError: If the file has no such node, or no such state, or a reader of spikes takes another value with them.
            BackendError: If ONNX Runtime cannot load it.
        """
        try:
            model = onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf's own kinds
            raise BackendError(f"it cannot be read: {error}") from error
        nodes = {n.name: n for n in model.graph.node}
        inputs, outputs = {i.name for i in model.graph.input}, {o.name for o in model.graph.output}
        if missing := [name for name in state if name not in inputs or f"{name}_next" not in outputs]:
            raise DisagreementError(f"the model has no state {missing[0]}")
        self.cut, self.state = cut, tuple(state)
        self.counts: set[str] = set()
        self._values: dict[str, str] = {}
        self._outputs: dict[str, str] = {}
        self._forms = {name: self._form_of(nodes, name, n) for name, n in populations.items()}
        for name in populations:
            value = nodes[name].output[0]
            self._values[name], self._outputs[name] = value, f"{value}.own" if cut else value
            dtype, shape, _ = self._forms[name]
            if cut:
                model.graph.input.append(helper.make_tensor_value_info(value, onnx_type(dtype), shape))
                nodes[name].output[0] = self._outputs[name]
            model.graph.output.append(helper.make_tensor_value_info(self._outputs[name], onnx_type(dtype), shape))
        self.sources = self._cut_sources(model, nodes, populations) if cut else ()
        known = set(self._values.values())
        kept = [i for i in model.graph.value_info if i.name not in known]
        del model.graph.value_info[:]
        model.graph.value_info.extend(kept)
        self._session = session(model.SerializeToString(), path.parent)

    def _cut_sources(self, model: onnx.ModelProto, nodes: Mapping[str, onnx.NodeProto], populations: Mapping[str, Node]) -> tuple[str, ...]:
        """Make inputs of the values that spikes were made of, for those that read both."""
        found: dict[str, Node] = {}
        for reader, source in sources(populations.values()).items():
            if reader.name not in nodes:
                raise DisagreementError(f"the model has no node {reader.name}")
            population, place = next(n for n in reader.all_input_nodes if n.name in populations), reader.args.index(source)
            given, made_of = nodes[reader.name].input[place], nodes[population.name].input[population.args.index(source)]
            if given != made_of:
                raise DisagreementError(f"node {reader.name} of the model reads {given} beside spikes that are made of {made_of}")
            nodes[reader.name].input[place] = self._values[source.name] = f"{source.name}.held"
            found[source.name] = source
        for name, source in found.items():
            value = source.meta["val"]
            model.graph.input.append(helper.make_tensor_value_info(self._values[name], onnx_type(value.dtype), [None] * value.dim()))
            self._forms[name] = _Form(value.dtype, [], None)
        return tuple(found)

    def _form_of(self, nodes: Mapping[str, onnx.NodeProto], name: str, node: Node) -> _Form:
        if name not in nodes:
            raise DisagreementError(f"the model has no node {name}")
        words, train = nodes[name].overload.split("."), node.meta["val"]
        steps, last = int(train.shape[0]), train.shape[-1]
        if not isinstance(last, int):  # rows of attention, [T, B, H L, L]: their length is not that of the example
            return _Form(train.dtype, [steps, "batch", f"{name}.rows", f"{name}.keys"], None)
        channels = int(last)
        if "count" in words and nodes[name].op_type != "Encode":  # of an encoder it is the code of its train
            self.counts.add(name)
            return _Form(torch.uint8 if "uint8" in words else torch.int32, ["batch", "sequence", channels], None)
        if "packed" not in words:
            return _Form(train.dtype, [steps, "batch", "sequence", channels], None)
        given = {a.name: helper.get_attribute_value(a) for a in nodes[name].attribute}
        (kv_heads,), (groups,), (period,) = (given[k] for k in ("kv_heads", "groups", "period"))
        shape = [f"{name}.periods", "batch", kv_heads, steps, groups, period, channels // (kv_heads * groups)]
        return _Form(torch.float32, shape, (kv_heads, groups, period))

    def run(self, ids: Tensor, trains: Mapping[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and what each population fires; see ``step``."""
        found = self.step(ids, {}, trains)
        return found.logits, found.fired

    def step(self, ids: Tensor, state: Mapping[str, Tensor], trains: Mapping[str, Tensor] | None = None) -> Step:
        """One call of the model.

        Args:
            ids: ``[B, L]``.
            state: Of a model of the streaming form, every part by name.
            trains: If the model is cut, what readers of the populations see, ``[T, B, L, C]``, and the values of ``sources``.

        Raises:
            BackendError: If ONNX Runtime fails.
        """
        feeds = {"input_ids": ids.to(torch.int64).numpy(), **{name: value.numpy() for name, value in state.items()}}
        for name, train in (trains or {}).items():
            dtype, _, packing = self._forms[name]
            value = train.sum(0, dtype=torch.int32) if name in self.counts else pack(train, *packing) if packing else train
            feeds[self._values[name]] = value.to(dtype).numpy()
        names = ["logits", *self._outputs.values(), *(f"{name}_next" for name in self.state)]
        try:
            logits, *found = map(torch.from_numpy, self._session.run(names, feeds))
        except Exception as error:  # onnxruntime's own kinds
            raise BackendError(f"ONNX Runtime cannot run the model: {error}") from error
        fired, after = dict(zip(self._outputs, found, strict=False)), found[len(self._outputs) :]
        for name, (dtype, _, packing) in self._forms.items():
            if packing:
                fired[name] = unpack(fired[name], ids.shape[1]).to(torch.int8)
            elif dtype == torch.uint8:
                fired[name] = fired[name].to(torch.int32)
        return Step(logits, fired, dict(zip(self.state, after, strict=True)))
