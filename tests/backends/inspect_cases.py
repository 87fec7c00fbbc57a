"""What the tests of ntc inspect share: tiny compiled folders and netlists, one of them with hostile names."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from ntc import artifact
from ntc.pipeline import run_pipeline
from ntc.program import Program
from ntc_backends.netlist import NetlistBackend
from ntc_passes.convert_ffn import ConvertFfn
from ntc_passes.fold_thresholds import FoldThresholds
from ntc_passes.insert_neurons import InsertNeurons
from ntc_passes.replace_attention import ReplaceAttention
from tests.cli.conftest import save_tokenizer
from tests.programs import CONTEXT, calibrated

HOSTILE = """</script><img src=x onerror=alert(1)>'"&{{7*7}}"""


@functools.cache
def float_program() -> Program:
    """Two blocks with binary Q and K, ternary V, a leak and a decoded result, said in full."""
    attention = {"steps": 4, "normalizer": "leak", "output": "current", "signed_query": False, "signed_key": False, "signed_value": True}
    passes = [ReplaceAttention.configure(attention), ConvertFfn.configure({"steps": 4}), FoldThresholds(), InsertNeurons()]
    return run_pipeline(calibrated(), passes, CONTEXT)


def folder_of(program: Program, folder: Path, *, tokenizer: bool = True) -> Path:
    """A compiled folder."""
    folder.mkdir(parents=True)
    for tensor in program.tensors.values():  # programs made by hand use some twice, which safetensors does not take
        tensor.data = tensor.data.clone()
    artifact.save(program, folder, about={"recipe": {"name": "test", "source": "a test", "passes": []}, "settings": {"options": {"steps": 4}}})
    if tokenizer:
        save_tokenizer(folder / "tokenizer")
    artifact.seal(folder)
    return folder


def netlist_of(program: Program, folder: Path) -> Path:
    """A folder with a netlist alone."""
    folder.mkdir(parents=True, exist_ok=True)
    NetlistBackend().emit(program, folder)
    return folder


def hostile_netlist(folder: Path) -> Path:
    """A netlist whose free texts are markup: modules, sources, roles, passes, the model's name."""
    path = netlist_of(float_program(), folder) / "netlist.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["model"]["source"] = data["model"]["architecture"] = HOSTILE
    data["history"][0]["name"] = HOSTILE
    for table in ("populations", "projections", "dynamic_products", "scales", "decodes", "host"):
        for element in data[table]:
            element["module"] = element["source"] = HOSTILE
            for op in element.get("ops", []):
                op["module"] = HOSTILE
            if element["block"] == "transformer.h.1":
                element["block"] = HOSTILE
            if "role" in element:
                element["role"] = HOSTILE
    path.write_text(json.dumps(data), encoding="utf-8")
    return folder
