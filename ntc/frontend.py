"""Capture: a Hugging Face model, a folder, a hub id or any ``nn.Module`` becomes a ``Program``.

``torch.export`` (non-strict) is the way in; its graph is the pass IR. Hugging Face models are exported with an attention
function of ours (``ntc.attention_hook``), so that every decoder architecture shows its attention as one ``ntc::attention`` or
``ntc::windowed_attention`` and no mask arithmetic. Other modules are exported as they are; the ``canonicalize`` pass brings
both to one dialect.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule, Node

import ntc.ops
from ntc.attention_hook import our_attention
from ntc.errors import CaptureError, NtcError
from ntc.loading import first_line, load_model
from ntc.meta import raised_at, stamp_captured, where
from ntc.program import ModelInfo, PassRecord, Program, interpret
from ntc.scratch import considered, released

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CAPTURE_TOLERANCE", "capture"]

logger = logging.getLogger(__name__)

# Largest |difference| of logits between the model and its capture, both in fp32, for logits up to 10; beyond it grows with the largest.
CAPTURE_TOLERANCE = 1e-4


def capture(model: nn.Module | str | Path, example: Tensor | Sequence[Tensor] | None = None) -> Program:
    """Capture a causal language model as a ``Program``.

    Args:
        model: A folder in Hugging Face form, a hub id, a ``PreTrainedModel``, or any module that maps token ids ``[B, L]``
            to logits ``[B, L, V]`` (or to a tuple that holds them). The model is not changed; bf16 and fp16 weights are
            captured in fp32.
        example: Token ids ``[B, L]`` with B, L >= 2; needed for modules that are not Hugging Face models.

    Returns:
        The program, with batch and length dynamic, checked against the model on the example.

    Raises:
        CaptureError: If the model cannot be loaded, is no causal language model, cannot be exported, or if the capture
            disagrees with it.
    """
    import transformers

    if isinstance(model, str | Path):
        source = str(model)
        module: nn.Module = load_model(model)
    else:
        source, module = type(model).__name__, model
    if isinstance(example, Sequence) and not isinstance(example, Tensor):
        example = example[0] if example else None
    if example is not None and not isinstance(example, Tensor):
        raise CaptureError(f"the example must be a tensor of token ids [B, L], not a {type(example).__name__}")
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in module.parameters()):
        module = copy.deepcopy(module).float()
    considered(module, ours=module is not model)
    if isinstance(module, transformers.PreTrainedModel):
        return _capture_hugging_face(module, source, example)
    if example is None:
        raise CaptureError(f"{source} is not a Hugging Face model: give example token ids, capture(model, example=ids)")
    return _capture(module, source, example, config=None)


def _capture_hugging_face(model: PreTrainedModel, source: str, example: Tensor | None) -> Program:
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise CaptureError(f"{type(model).__name__} is an encoder-decoder model; ntc compiles causal language models")
    if model.get_output_embeddings() is None:
        raise CaptureError(f"{type(model).__name__} has no language-model head; ntc compiles causal language models")
    text = config.get_text_config(decoder=True)  # of a model of images and text; else the config itself
    if example is None:
        length = max(2, min(12, int(getattr(text, "max_position_embeddings", 12) or 12)))
        generator = torch.Generator().manual_seed(0)
        example = torch.randint(0, text.vocab_size, (2, length), generator=generator)
    with our_attention(model):
        return _capture(model, source, example, config={**text.to_dict(), **config.to_dict()}, reference=_own_attention_logits)


def _own_attention_logits(model: nn.Module, example: Tensor) -> Tensor:
    """Logits by the model's stock eager attention: an independent reference for ours."""
    pretrained: Any = model
    ours = pretrained.config._attn_implementation
    pretrained.set_attn_implementation("eager")
    try:
        return _logits_of(model(input_ids=example, use_cache=False))
    finally:
        pretrained.set_attn_implementation(ours)


class _Logits(nn.Module):
    """Makes any model a function from token ids to logits."""

    def __init__(self, model: nn.Module, hugging_face: bool) -> None:
        super().__init__()
        self.model = model
        self.hugging_face = hugging_face

    def forward(self, input_ids: Tensor) -> Tensor:
        return _logits_of(self.model(input_ids=input_ids, use_cache=False) if self.hugging_face else self.model(input_ids))


def _logits_of(output: Any) -> Tensor:
    """The logits among a model's outputs: ``.logits``, or the first tensor of rank 3."""
    candidates = [getattr(output, "logits", None), output, *(output if isinstance(output, tuple | list) else ())]
    for value in candidates:
        if isinstance(value, Tensor) and value.dim() == 3:
            return value
    raise CaptureError("the model returns no tensor of shape [B, L, V]: ntc needs logits for every position")


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """Keep a library's log off the terminal."""
    log = logging.getLogger(name)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _capture(module: nn.Module, source: str, example: Tensor, config: dict[str, Any] | None, reference: Any = None) -> Program:
    if example.dim() != 2 or min(example.shape) < 2 or example.is_floating_point():
        raise CaptureError(f"example token ids must be integers of shape [B, L] with B, L >= 2, got {tuple(example.shape)}")
    wrapper = _Logits(module, hugging_face=config is not None)
    with _eval_mode(wrapper), torch.no_grad():
        run = partial(reference, module) if reference else wrapper
        try:
            expected = run(example)
        except NtcError:
            raise
        except Exception as error:
            raise CaptureError(f"{source} fails on the example token ids{raised_at(error, module)}: {first_line(error)}") from error
        if expected.shape[:2] != example.shape:
            raise CaptureError(
                f"{source} returns logits of shape {list(expected.shape)} for token ids {list(example.shape)}: "
                "ntc needs logits for every position, [B, L, V]"
            )
        exported, used = _export(wrapper, example, source)
        if used is not example:
            example, expected = used, run(used)
    shortest, longest = _bounds(exported)
    if shortest > 2:
        raise CaptureError(
            f"torch captures {source} only for texts of at least {shortest} tokens: something in it depends on the length in another way "
            "than by shapes, and is fixed to that of the example"
        )
    lifted = exported.module(check_guards=False)
    assert isinstance(lifted, GraphModule)
    program = Program(_plain(lifted, "model."), _info(module, source, expected, config, longest), example, frozenset({"captured"}))
    for node in program.graph.nodes:
        node.meta.pop("val", None)  # of the export: what has none below is where shapes stop
    try:
        with _unlogged("torch._subclasses.fake_tensor"):  # it logs a traceback before it raises
            program.refresh()
    except NtcError:
        raise
    except Exception as error:  # an op without a rule for shapes that depend on batch or length
        stopped = next((n for n in program.graph.nodes if n.op == "call_function" and "val" not in n.meta), None)
        at = f" at {where(stopped)}" if stopped is not None else ""
        reason = re.sub(r"^/\S+:\d+: ", "", first_line(error))  # a line of torch's own source
        raise CaptureError(f"torch knows no shapes of {source} for any batch and length{at}: {reason}") from error
    _check_dynamic(program, source)
    with torch.no_grad():
        released(module.parameters())  # the reference has read them all
        logits = interpret(program, example, lambda *_: None) if program.on_disk else program.module(example)
        drift = _drift(logits, expected, source)
        if not program.on_disk:  # weights on disk would be read twice more
            with _eval_mode(wrapper):
                _check_elsewhere(program, run, _of_another_length(example, program.info.context or 0), source)
    program.with_record(PassRecord("capture", {"source": source}, sites=len(program.graph.nodes), drift=drift))
    return program


def _drift(logits: Tensor, expected: Tensor, source: str) -> float:
    """Largest |difference|, if it is within the limit."""
    drift = float((logits - expected).abs().max())
    limit = CAPTURE_TOLERANCE * max(1.0, float(expected.abs().max()) / 10)
    if not drift <= limit:
        raise CaptureError(
            f"the capture of {source} differs from the model by {drift:.3g} in its logits (limit {limit:.2g}) on {expected.shape[1]} tokens"
        )
    return drift


def _of_another_length(example: Tensor, context: int) -> Tensor:
    """Twice the text less a token, or where the context has no room for more a token less."""
    length = example.shape[1]
    longer = min(2 * length - 1, context or 2 * length)
    return example.repeat(1, 2)[:, : longer if longer > length else max(2, length - 1)]


def _check_elsewhere(program: Program, run: Callable[[Tensor], Tensor], ids: Tensor, source: str) -> None:
    """Compare on a text of another length: what a trace fixes to that of its example shows there."""
    try:
        expected = run(ids)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError):  # the model itself takes no such text
        return
    try:
        logits = program.module(ids)
    except Exception as error:
        raise CaptureError(
            f"the capture of {source} holds for the length of its example alone, {program.example.shape[1]} tokens: on {ids.shape[1]} it "
            f"fails with {first_line(error)}"
        ) from error
    _drift(logits, expected, source)


def _export(wrapper: _Logits, example: Tensor, source: str, retry: bool = True) -> tuple[ExportedProgram, Tensor]:
    """torch.export with batch and length dynamic; also returns the example that let both be so."""
    dynamic = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    fixed: list[str] = []
    try:
        # Without torch's cache of fake results: with open sizes it takes longer to look up than to compute.
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False), _fixed_sizes(fixed) if not retry else nullcontext():
            return torch.export.export(wrapper, (example,), dynamic_shapes=dynamic, strict=False), example
    except NtcError:
        raise
    except Exception as error:  # torch.export raises many kinds; all mean that this model cannot be captured
        if retry and "specialized" in str(error) and example.shape[1] > 2:
            # An example as long as a buffer that the model slices (a tril mask) makes torch take its length for a constant.
            return _export(wrapper, example[:, :-1], source, retry=False)
        if "specialized" in str(error):
            raise CaptureError(
                f"torch.export could not capture {source} for any batch and length{f' at {fixed[-1]}' if fixed else ''}: "
                "it takes the number of tokens for a constant there, as a loop over them does"
            ) from error
        reasons = [line.strip() for line in str(error).splitlines() if line.strip().startswith("- ")]  # the headline says little
        reason = reasons[0].removeprefix("- ") if reasons else first_line(error)
        raise CaptureError(f"torch.export could not capture {source}{raised_at(error, wrapper.model)}: {reason}") from error


_FIXED = re.compile(r"eval Eq\(s\d+, \d+\) \[guard added\] \((?:[^()]*/)?(?P<place>[^()/]*)\)")


@contextmanager
def _fixed_sizes(places: list[str]) -> Iterator[None]:
    """Collect the lines of source that take a size for a number which should stay open; torch says them in its log only."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found = _FIXED.search(record.getMessage())
            if found:
                places.append(found["place"])

    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    handlers, level, propagate = log.handlers, log.level, log.propagate
    log.handlers, log.propagate = [Collector()], False
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)


def _bounds(exported: ExportedProgram) -> tuple[int, int]:
    """The fewest and the most tokens that the model's own checks and buffers let through; 0 if they let any number."""
    ids = next(n for n in reversed(exported.graph.nodes) if n.op == "placeholder")
    length = ids.meta["val"].shape[1]
    bounds = exported.range_constraints.get(length.node.expr) if isinstance(length, torch.SymInt) else None
    if bounds is None:
        return 0, 0
    return int(bounds.lower), int(bounds.upper) if bounds.upper.is_Integer else 0


def _plain(exported: GraphModule, prefix: str) -> GraphModule:
    """The exported graph as a plain one: no pytree code, no guards, each weight once and under the model's name."""
    graph = Graph()
    names: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    mapping: dict[Any, Any] = {}
    for node in exported.graph.nodes:
        if node.op == "call_module":  # guards on the input, which Program.__call__ checks itself
            continue
        if node.op == "output":
            (result,) = node.all_input_nodes
            graph.output(mapping[result])
            continue
        if node.op == "get_attr":
            value: Any = exported
            for part in str(node.target).split("."):
                value = getattr(value, part)
            name = names.setdefault(id(value), str(node.target).removeprefix(prefix))
            if name in tensors:
                mapping[node] = next(n for n in graph.nodes if n.op == "get_attr" and n.target == name)
                continue
            tensors[name] = value
            new = graph.get_attr(name)
            new.name = graph._graph_namespace.create_name(name.replace(".", "_"), new)
        else:
            new = graph.node_copy(node, lambda n: mapping[n])
        new.meta = dict(node.meta)
        mapping[node] = new
    stamp_captured(graph, strip_prefix="model")
    module = GraphModule(tensors, graph, "Program")
    module.eval()
    return module


def _info(module: nn.Module, source: str, logits: Tensor, config: dict[str, Any] | None, limit: int) -> ModelInfo:
    return ModelInfo(
        source=source,
        architecture=type(module).__name__,
        vocab_size=logits.shape[-1],
        context=int((config or {}).get("max_position_embeddings") or (config or {}).get("n_positions") or limit),
        parameters=sum(p.numel() for p in module.parameters()),
        config={k: v for k, v in (config or {}).items() if isinstance(v, str | int | float | bool | type(None))},
    )


def _check_dynamic(program: Program, source: str) -> None:
    used: set[Node] = set()
    frontier = [n for n in program.graph.nodes if n.op == "output"]
    while frontier:
        new = set(frontier.pop().all_input_nodes) - used
        used |= new
        frontier.extend(new)
    if not any(n.op == "placeholder" for n in used):
        raise CaptureError(f"{source} does not use its input ids")


_ = ntc.ops  # registers the ops that capture emits
