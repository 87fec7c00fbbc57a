"""Compiled folders: write a program to a directory and read it back without the original model.

=======================  ==========================================================================================
file                     what
=======================  ==========================================================================================
``manifest.json``        format, versions, source, recipe, state, history of passes with drift, sha256 of every other file
``program.json``         the graph: nodes, arguments, metadata; plain data, no code
``program.safetensors``  weights, thresholds, gains
``analog.json``          graph and tensor shapes of the network before conversion, for counting its operations
``tokenizer/``           the tokenizer, if the model has one
``training.jsonl``       of a fine-tuned program: the log, with its curve in ``curve.png`` and ``curve.svg``
``baseline/``            of a fine-tuned program: the original network after the same training, a folder of its own
=======================  ==========================================================================================

Nothing here is a pickle. The same program gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ntc.errors import ArtifactError
from ntc.folders import MANIFEST, reason_of, umask, undisturbed
from ntc.meta import MADE_BY, MODULE, NEURON, ORIGIN, SCALE, SOURCE, STATE, NeuronSpec
from ntc.program import ModelInfo, PassRecord, Program
from ntc.scratch import released
from ntc.state import StateSpec
from ntc.verify import verify

__all__ = ["BASELINE", "FORMAT", "annotate", "load", "load_analog", "read_manifest", "save", "seal", "sha256_of", "take_over"]

FORMAT = 2
"""Version of compiled folders. 2: potentials and time constants of neurons are tensors, which the ops of 1 took as numbers."""

BASELINE = "baseline"
"""Folder of the original network after the same training, in the one of a fine-tuned program."""

# What is as true of a program that was made from the one in the folder. Artefacts of back ends are not: they are of that very program.
_COMPANIONS = ("analog.json", "tokenizer", "training.jsonl", "curve.png", "curve.svg", BASELINE)

_OPERATORS = {f"operator.{f.__name__}": f for f in (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv)}


def sha256_of(path: Path) -> str:
    """Hash of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while lump := file.read(1 << 20):
            digest.update(lump)
    return digest.hexdigest()


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ saving


def save(
    program: Program,
    folder: Path,
    *,
    analog: Program | None = None,
    tokenizer: Any | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a program into an existing folder; ``seal`` completes it.

    Args:
        program: The program.
        folder: An existing, empty folder (see ``ntc.folders.replacing_folder``).
        analog: The canonical network before conversion; only its graph and shapes are written.
        tokenizer: A Hugging Face tokenizer.
        about: More for the manifest: recipe, settings, calibration.
    """
    _write_json(folder / "program.json", _graph_to_json(program))
    tensors = {name: t.detach().contiguous() for name, t in program.tensors.items()}
    save_file(tensors, folder / "program.safetensors", metadata={"format": "pt"})  # from where they lie, one after the other
    released(tensors.values())
    if analog is not None:
        _write_json(folder / "analog.json", _graph_to_json(analog))
    if tokenizer is not None:
        try:
            tokenizer.save_pretrained(folder / "tokenizer")
        except OSError:
            raise
        except Exception as error:  # the tokenizers library has no error class for a full disk
            raise ArtifactError(f"cannot write the tokenizer: {reason_of(error)}") from error
    _write_json(folder / MANIFEST, _manifest(program, about or {}))


def seal(folder: Path, **more: Any) -> dict[str, Any]:
    """Complete the manifest with more entries and the sha256 of every file; returns it."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    manifest |= more
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in files:  # safetensors makes files that only their owner can read
        path.chmod(0o666 & ~umask())
    # Only its own cannot be in it: the one of a folder inside (``baseline``) is a file as any other.
    manifest["files"] = {str(p.relative_to(folder)): sha256_of(p) for p in files if p != folder / MANIFEST}
    _write_json(folder / MANIFEST, manifest)
    return manifest


def take_over(source: Path, folder: Path) -> None:
    """Copy what lies beside a program to the folder of one that was made from it: all but what back ends wrote."""
    for name in _COMPANIONS:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
        elif (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def annotate(folder: Path, key: str, value: Any) -> None:
    """Put one entry into the manifest of a compiled folder, at once or not at all; one of that name is replaced.

    Raises:
        ArtifactError: If the manifest cannot be written.
    """
    path = folder / MANIFEST
    beside = path.with_name(f".{MANIFEST}.partial")
    try:
        with undisturbed():
            _write_json(beside, {**read_manifest(folder), key: value})
            os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error


def _manifest(program: Program, about: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "ntc_format": FORMAT,
        "versions": {name: _version(name) for name in ("ntc-compiler", "torch", "transformers")},
        "info": {**asdict(program.info), "config": dict(program.info.config)},
        "steps": program.steps,
        "facts": sorted(program.facts),
        **({"state": [part.to_json() for part in program.state]} if program.state else {}),
        "conventions": {"comparison": ">=", "reset": "soft", "dt": 1, "time_axis": 0, "decode": "mean over steps"},
        "history": [record.to_json() for record in program.history],
        **about,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _graph_to_json(program: Program) -> dict[str, Any]:
    tensors = {n: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for n, t in program.tensors.items()}
    trainable = {n for n, t in program.tensors.items() if isinstance(t, torch.nn.Parameter)}
    return {
        "nodes": [_node_to_json(n) for n in program.graph.nodes],
        "tensors": {n: {**v, "trainable": n in trainable} for n, v in tensors.items()},
        "example": program.example.tolist(),
    }


def _node_to_json(node: Node) -> dict[str, Any]:
    data: dict[str, Any] = {"name": node.name, "op": node.op, "target": _target_to_text(node)}
    if node.args:
        data["args"] = [_encode(a) for a in node.args]
    if node.kwargs:
        data["kwargs"] = {k: _encode(v) for k, v in node.kwargs.items()}
    meta = {key.removeprefix("ntc."): node.meta[key] for key in (MODULE, SOURCE) if node.meta.get(key)}
    meta |= {key.removeprefix("ntc."): list(node.meta[key]) for key in (ORIGIN, MADE_BY) if key in node.meta}
    if NEURON in node.meta:
        meta["neuron"] = asdict(node.meta[NEURON])
    if SCALE in node.meta:
        meta["scale"] = node.meta[SCALE]
    if STATE in node.meta:
        meta["state"] = node.meta[STATE].to_json()
    return {**data, "meta": meta}


def _target_to_text(node: Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    name = f"operator.{getattr(node.target, '__name__', '')}"
    if name not in _OPERATORS:
        raise ArtifactError(f"node %{node.name} calls {node.target}, which cannot be saved")
    return name


_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
_NAMED: dict[str, dict[str, Any]] = {
    "dtype": {str(d).removeprefix("torch."): d for d in _DTYPES},
    "layout": {"strided": torch.strided},
    "memory_format": {"contiguous_format": torch.contiguous_format, "preserve_format": torch.preserve_format},
}


def _encode(value: Any) -> Any:
    """An argument as JSON: plain values as they are, everything else as an object with one telling key."""
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, table in _NAMED.items():
        for name, known in table.items():
            if value is known:
                return {kind: name}
    raise ArtifactError(f"an argument of type {type(value).__name__} cannot be saved")


# ------------------------------------------------------------------------------------------------ loading


def load(folder: Path | str) -> Program:
    """Read a compiled folder back.

    Raises:
        ArtifactError: If it is no such folder, is damaged, or was written by another version of the format.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _check_sum(folder, "program.json", manifest)
    _check_sum(folder, "program.safetensors", manifest)
    try:
        tensors = load_file(folder / "program.safetensors")
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"cannot read {folder / 'program.safetensors'}: {reason_of(error)}") from error
    return _rebuild(folder, manifest, _read_json(folder, "program.json"), tensors)


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """The manifest of a compiled folder.

    Raises:
        ArtifactError: If it is no such folder, or was written by another version of the format.
    """
    folder = Path(folder)
    manifest = _read_json(folder, MANIFEST)
    if not isinstance(manifest.get("ntc_format"), int):
        raise ArtifactError(f"{folder} holds no compiled program: its {MANIFEST} is not ours")
    if manifest["ntc_format"] > FORMAT:
        raise ArtifactError(f"{folder} was written by a newer ntc (format {manifest['ntc_format']}, this one reads {FORMAT})")
    if manifest["ntc_format"] < FORMAT:
        old = manifest["ntc_format"]
        raise ArtifactError(f"{folder} was written by an older ntc (format {old}, this one reads {FORMAT}): compile it again")
    return manifest


def _check_sum(folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    path = folder / name
    if not path.is_file():
        raise ArtifactError(f"{folder} is not complete: it lacks {name}; compile again")
    if (wanted := manifest.get("files", {}).get(name)) and sha256_of(path) != wanted:
        raise ArtifactError(f"{path} is damaged: its sha256 is not the one in the manifest; compile again")


def load_analog(folder: Path | str) -> Program | None:
    """Graph of the network before conversion, with tensors on the ``meta`` device; None if the folder has none."""
    folder = Path(folder)
    if not (folder / "analog.json").is_file():
        return None
    manifest = read_manifest(folder)
    _check_sum(folder, "analog.json", manifest)
    data = _read_json(folder, "analog.json")
    try:
        tensors = {
            name: torch.empty(spec["shape"], dtype=getattr(torch, spec["dtype"]), device="meta") for name, spec in data["tensors"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{folder / 'analog.json'} is damaged: {error}") from error
    manifest = {**manifest, "facts": ["captured", "canonical"], "history": []}
    return _rebuild(folder, manifest, data, tensors)


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        data = json.loads((folder / name).read_text(encoding="utf-8"))
    except OSError as error:
        if not folder.exists():
            raise ArtifactError(f"there is no folder {folder}") from error
        raise ArtifactError(f"{folder} holds no compiled program: cannot read {name}") from error
    except ValueError as error:
        raise ArtifactError(f"{folder / name} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{folder / name} is damaged: it holds no JSON object")
    return data


def _rebuild(folder: Path, manifest: Mapping[str, Any], data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Program:
    try:
        graph = Graph()
        nodes: dict[str, Node] = {}
        for row in data["nodes"]:
            args = tuple(_decode(a, nodes) for a in row.get("args", ()))
            kwargs = {k: _decode(v, nodes) for k, v in row.get("kwargs", {}).items()}
            if row["op"] == "output":
                node = graph.output(tuple(args[0]) if isinstance(args[0], list) else args[0])
            else:
                target: Any = _target_from_text(row["target"]) if row["op"] == "call_function" else row["target"]
                node = graph.create_node(row["op"], target, args, kwargs, name=row["name"])
            nodes[row["name"]] = node
            _read_meta(node, row.get("meta", {}))
        module = GraphModule(_as_parameters(data["tensors"], tensors), graph, "Program")
        module.eval()
        history = tuple(
            PassRecord(r["name"], r["options"], r["sites"], tuple((a, b) for a, b in r["missed"]), drift=r["drift"], notes=r["notes"])
            for r in manifest["history"]
        )
        info, example = ModelInfo(**manifest["info"]), torch.tensor(data["example"])
        program = Program(module, info, example, frozenset(manifest["facts"]), history)
        program.propagate()
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise ArtifactError(f"{folder} is damaged: {type(error).__name__}: {error}") from error
    verify(program)
    return program


def _as_parameters(specs: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.nn.Parameter(tensors[n]) if specs[n]["trainable"] else tensors[n] for n in specs}


def _target_from_text(text: str) -> Callable[..., Any]:
    """Only operators of the table and registered torch ops can be named: loading runs no code of the file's choice."""
    if text in _OPERATORS:
        return _OPERATORS[text]
    parts = text.split(".")
    found: Any = None
    if len(parts) == 3 and parts[0] in ("aten", "ntc"):
        found = getattr(getattr(getattr(torch.ops, parts[0]), parts[1], None), parts[2], None)
    if isinstance(found, torch._ops.OpOverload):  # getattr finds methods of torch's own objects too
        return found
    raise ValueError(f"unknown op {text}")


def _decode(value: Any, nodes: Mapping[str, Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, text),) = value.items()
    if kind == "node":
        return nodes[text]
    if kind == "device":
        return torch.device(text)
    if kind == "float":
        return float(text)
    return _NAMED[kind][text]


def _read_meta(node: Node, meta: Mapping[str, Any]) -> None:
    for key in (MODULE, SOURCE):
        node.meta[key] = meta.get(key.removeprefix("ntc."), "")
    for key in (ORIGIN, MADE_BY):
        if key.removeprefix("ntc.") in meta:
            node.meta[key] = tuple(meta[key.removeprefix("ntc.")])
    if "neuron" in meta:
        node.meta[NEURON] = NeuronSpec(**meta["neuron"])
    if "scale" in meta:
        node.meta[SCALE] = meta["scale"]
    if "state" in meta:
        node.meta[STATE] = StateSpec.from_json(meta["state"])
