"""Loading models and tokenizers: a Hugging Face folder, a hub id, or a GGUF file.

A GGUF file (the format of llama.cpp, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) holds network, tokenizer and
weights in one. transformers reads it, and weights of fewer bits become float32: the network that is compiled is the quantized one.
"""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ntc.errors import CaptureError, NtcError
from ntc.shards import in_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["first_line", "folder_of", "hub_answers", "load_config", "load_model", "load_tokenizer", "quiet"]

logger = logging.getLogger(__name__)

_GGUF = ".gguf"


def folder_of(source: str | Path) -> Path:
    """The folder that a model lies in: itself, or that of its GGUF file."""
    path = Path(source)
    return path.parent if path.suffix == _GGUF else path


def load_model(source: str | Path) -> PreTrainedModel:
    """Load a causal language model from a folder or a GGUF file, or from the hub if there is no such folder.

    Raises:
        CaptureError: Says in one sentence why it cannot be had.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    name, path = str(source), Path(source)
    _check_there(name, path)
    where: dict[str, Any] = {"pretrained_model_name_or_path": name}
    if path.is_file():
        where = _gguf(path)
    elif path.exists() and not (path / "config.json").is_file():
        raise CaptureError(f"{name} holds no config.json: it is not a Hugging Face model folder")
    offline = not path.exists() and not hub_answers(name)
    with quiet(transformers), _fast_gguf() if path.is_file() else nullcontext():
        config = _config(where, name, offline)
        try:
            # The bar of a GGUF file is one that no option of transformers hides.
            with redirect_stderr(io.StringIO()) if path.is_file() else nullcontext(), in_float32(path) as wide:
                if wide is not path:
                    where = {"pretrained_model_name_or_path": str(wide)}
                model, report = AutoModelForCausalLM.from_pretrained(
                    **where, config=config, dtype=torch.float32, output_loading_info=True, local_files_only=offline
                )
        except NtcError:
            raise
        except Exception as error:
            raise CaptureError(f"could not load the weights of {name}: {first_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing or report.get("mismatched_keys"):
        what = missing or sorted(str(k) for k in report["mismatched_keys"])
        raise CaptureError(f"the weights of {name} lack {len(what)} tensors that the model needs, such as {what[0]}")
    model.eval()
    loaded: PreTrainedModel = model
    return loaded


def load_config(source: str | Path) -> Any:
    """Load the config of a causal language model: a folder that has one, the file itself, a GGUF file, or a hub id; no weights.

    Raises:
        CaptureError: Says in one sentence why it cannot be had.
    """
    import transformers

    name, path = str(source), Path(source)
    _check_there(name, path)
    where: dict[str, Any] = _gguf(path) if path.suffix == _GGUF else {"pretrained_model_name_or_path": name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise CaptureError(f"{name} holds no config.json: it is not a Hugging Face model folder")
    with quiet(transformers), _fast_gguf() if path.suffix == _GGUF else nullcontext():
        return _config(where, name, offline=not path.exists() and not hub_answers(name))


def _check_there(name: str, path: Path) -> None:
    """Refuse what looks like a path and is none; anything else may be on the hub."""
    looks_local = path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix != ""
    if not path.exists() and looks_local:
        raise CaptureError(f"there is no {'file' if path.suffix in (_GGUF, '.json') else 'folder'} {name}")


def _config(where: dict[str, Any], name: str, offline: bool) -> Any:
    """The config, if it is one of a causal language model."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(**where, local_files_only=offline)
    except Exception as error:
        if offline:
            raise CaptureError(
                f"there is no folder {name}, and the hub, where a model of that name may be, cannot be reached: "
                "connect to a network, or give a local folder"
            ) from error
        kind = "read" if Path(name).exists() else "find on disk or on the hub"
        raise CaptureError(f"could not {kind} the model {name}: {first_line(error)}") from error
    architectures = list(getattr(config, "architectures", None) or [])
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if architectures and not known & set(architectures):
        raise CaptureError(f"{name} is a {architectures[0]}, not a causal language model")
    if getattr(config, "is_encoder_decoder", False) or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise CaptureError(f"{name} is a {config.model_type} model, not a causal language model")
    return config


def _gguf(path: Path) -> dict[str, Any]:
    """How transformers is told of a GGUF file."""
    if path.suffix != _GGUF:
        raise CaptureError(f"{path} is a file, and neither a Hugging Face model folder nor a GGUF file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CaptureError(f"{path} is no GGUF file: it does not begin with the letters GGUF")
    try:
        import gguf  # noqa: F401 - transformers asks for it in many words
    except ImportError as error:
        raise CaptureError(f"reading {path} needs the package gguf: pip install 'ntc-compiler[gguf]'") from error
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


@contextmanager
def _fast_gguf() -> Iterator[None]:
    """Let transformers read a GGUF file in seconds.

    The package gguf takes every token of a vocabulary from a ``np.memmap``, whose slices cost ten times those of an array over the same
    pages, and transformers asks it for the same table of names once per module of the network.
    """
    import gguf
    import numpy as np

    package: Any = gguf
    reader: Any = package.GGUFReader
    names = package.get_tensor_name_map

    class PlainReader(reader):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    package.GGUFReader, package.get_tensor_name_map = PlainReader, functools.cache(names)
    try:
        yield
    finally:
        package.GGUFReader, package.get_tensor_name_map = reader, names


def hub_answers(name: str, repo_type: str = "model") -> bool:
    """Ask the hub once whether it is there: its own client retries for half a minute before it says that there is no network."""
    from huggingface_hub import constants, get_session, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(hf_hub_url(name, "README.md", repo_type=repo_type), timeout=5)
    except Exception as error:  # noqa: BLE001 - no name, no route, a proxy that refuses: all mean that the cache is what there is
        logger.info("the hub does not answer: %s", first_line(error))
        return False
    return True


def load_tokenizer(source: str | Path) -> Any | None:
    """The tokenizer beside a model, or in its GGUF file; None if there is none."""
    import transformers

    path = Path(source)
    where = _gguf(path) if path.is_file() else {"pretrained_model_name_or_path": str(source)}
    if path.is_dir() and not any((path / f).exists() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    with quiet(transformers), _fast_gguf() if path.is_file() else nullcontext():
        try:
            return transformers.AutoTokenizer.from_pretrained(**where, local_files_only=path.exists() or not hub_answers(str(source)))
        except Exception as error:  # noqa: BLE001 - a model without a usable tokenizer still compiles
            logger.warning("no tokenizer in %s: %s", source, first_line(error))
            return None


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers' warnings and progress bars out of our output."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """What an error of a library says, as far as it fits into a sentence of ours."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
