"""Every causal decoder of transformers: captured with its own logits, or refused with the module or op that is in the way.

    python benchmarks/decoders.py --output decoders.jsonl
    python benchmarks/decoders.py --only llama,gemma3_text --markdown
    python benchmarks/decoders.py --stored --output decoders.jsonl --page docs/models.md

For each model type of ``MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`` a tiny network of random weights is made, captured and canonicalized as ``ntc
check`` does, and compared with the model's own logits for several batches and lengths up to the context. Its config is
made by ``decoder_configs``: small sizes, one layer of every kind. What then holds:

==================  ==================================================================================================
``captured``        the largest difference of logits, how many attention ops there are, what ``canonicalize`` missed
``refused``         the sentence of ntc
``not configured``  this benchmark cannot make a tiny network of it, or the network itself gives no logits: the reason
``bug``             an error that is not ntc's, logits off by more than the limit, no answer in time, a crash
==================  ==================================================================================================

Each runs in a process of its own with a time limit. Each result is a line of --output; a second run tries only what is missing.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers
from decoder_configs import CONTEXT, NOT_ALONE, VOCABULARY, layers_of, tiny_model
from recipes import write_between
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ntc.errors import NtcError
from ntc.frontend import CAPTURE_TOLERANCE, capture
from ntc.ops import SOFTMAX_ATTENTION
from ntc.pipeline import run_pipeline
from ntc.registry import find_pass
from ntc.testing import example_ids

OUTCOMES = ("captured", "refused", "not configured", "bug")
MEMORY = 6 << 30
"""Address space of a process, bytes."""
WAIT = 10
"""How many times its limit of processor time a process may take by the clock: others use the machine, too."""
SHAPES = ((1, 1), (3, 7), (1, 17), (2, CONTEXT))
"""Batch and length of the texts that logits are compared on; the last is all that the network takes, and six windows."""


# ------------------------------------------------------------------------------------------------ one model type


@dataclass(frozen=True)
class Outcome:
    """What became of one model type.

    Attributes:
        model_type: Its name in transformers.
        model: The class that is loaded for it.
        outcome: One of ``OUTCOMES``.
        reason: Of what is not captured; the sentence of ntc if it is refused.
        error: Largest difference of logits over all of ``SHAPES``.
        limit: What the difference may be.
        attention: How many of ``ntc.attention`` and its kin there are.
        layers: Layers of the network.
        missed: What ``canonicalize`` did not recognize: reason and number.
        version: Of transformers.
    """

    model_type: str
    model: str
    outcome: str
    reason: str = ""
    error: float | None = None
    limit: float | None = None
    attention: int = 0
    layers: int = 0
    missed: Mapping[str, int] = field(default_factory=dict)
    version: str = transformers.__version__


def own_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """What the network itself says, with transformers' plainest attention."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def outcome(model_type: str) -> Outcome:
    """Make, capture and compare one model type."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    try:
        model = tiny_model(model_type)
        name = type(model).__name__
        texts = [example_ids(VOCABULARY, batch, length, seed=batch) for batch, length in SHAPES]
        own = [] if model_type in NOT_ALONE else [own_logits(model, ids) for ids in texts]
    except Exception as error:  # noqa: BLE001 - any error of a config or of a network
        return Outcome(model_type, name, "not configured", _said(error))
    layers = layers_of(model.config.get_text_config(decoder=True))
    try:
        program = run_pipeline(capture(model), [find_pass("canonicalize")()])
    except NtcError as error:
        nobodys = re.match(r"pass [\w-]+ failed: ", str(error))  # the runner's words for an error of torch inside of a pass
        return Outcome(model_type, name, "bug" if nobodys else "refused", str(error), layers=layers)
    except Exception:  # noqa: BLE001 - this is what the benchmark looks for
        return Outcome(model_type, name, "bug", traceback.format_exc(limit=-3), layers=layers)
    if model_type in NOT_ALONE:
        return Outcome(model_type, name, "bug", "it was captured, and has no logits of its own for token ids alone", layers=layers)
    error, limit = 0.0, 0.0
    for ids, expected in zip(texts, own, strict=True):
        try:
            with torch.no_grad():
                got = program(ids)
        except Exception:  # noqa: BLE001 - likewise
            return Outcome(model_type, name, "bug", f"at {list(ids.shape)} tokens: {traceback.format_exc(limit=-3)}", layers=layers)
        error = max(error, float((got - expected).abs().max()))
        limit = CAPTURE_TOLERANCE * max(1.0, float(expected.abs().max()) / 10)
        if not error <= limit:
            reason = f"logits of {list(ids.shape)} tokens are off by {error:.3g} (limit {limit:.2g})"
            return Outcome(model_type, name, "bug", reason, error, limit, layers=layers)
    attention = sum(n.target in SOFTMAX_ATTENTION for n in program.graph.nodes)
    missed = Counter(reason for _, reason in program.history[-1].missed)
    return Outcome(model_type, name, "captured", "", error, limit, attention, layers, dict(missed))


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


# ------------------------------------------------------------------------------------------------ all of them


def _answer(model_type: str, pipe: Connection) -> None:
    """In the child: send the outcome."""
    with open(os.devnull, "w") as nowhere:  # what transformers says of a config whose sizes are odd
        os.dup2(nowhere.fileno(), 2)
    try:
        pipe.send(outcome(model_type))
    except MemoryError:
        pipe.send(Outcome(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], "bug", "it needs more memory than a tiny network may"))


def _limited(answer: Callable[[str, Connection], None], model_type: str, pipe: Connection, seconds: float) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 1))
    answer(model_type, pipe)


def isolated(model_type: str, seconds: float, answer: Callable[[str, Connection], None] = _answer) -> Outcome:
    """The outcome of one model type, from a process of its own, whatever becomes of that."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_limited, args=(answer, model_type, theirs, seconds), daemon=True)
    process.start()
    theirs.close()
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    try:
        if not ours.poll(WAIT * seconds):
            return Outcome(model_type, name, "bug", f"no answer within {WAIT * seconds:g} s")
        found: Outcome = ours.recv()
        return found
    except EOFError:
        process.join()
        slow = process.exitcode == -signal.SIGXCPU
        why = f"it takes more than {seconds:g} s of processor time" if slow else f"its process ends with exit code {process.exitcode}"
        return Outcome(model_type, name, "bug", why)
    finally:
        process.kill()
        process.join()


def line(found: Outcome) -> str:
    """One outcome for the terminal."""
    head = f"{found.model_type:24} {found.model:34} {found.outcome:15}"
    if found.outcome != "captured":
        return f"{head} {found.reason.strip().splitlines()[-1]}"
    missed = "".join(f"; {n} x {reason}" for reason, n in found.missed.items())
    return f"{head} error {found.error:.1e} of {found.limit:.1e}, {found.attention} attention ops in {found.layers} layers{missed}"


# ------------------------------------------------------------------------------------------------ the page


def general(found: Outcome) -> str:
    """The sentence of a refusal without what differs from family to family: class, module, line."""
    text = " ".join(found.reason.split()).replace("`", "'")
    text = re.sub(r"(?<= at )[\w.]+ \([\w.]+:\d+ in [^)]*\)(?=: )", "...", text)
    text = re.sub(r"(node %\w+) \([^)]*\)", r"\1", text)
    text = re.sub(r"\b[A-Za-z]\w*(ForCausalLM|ForConditionalGeneration|LMHeadModel|Attention|ModelWithLMHead)\b", "...", text)
    return re.sub(r"\d[\d.e-]*", "N", text) if "differs from the model" in text or "tokens that an indexer" in text else text


def section(outcomes: Sequence[Outcome], untried: Sequence[str] = ()) -> str:
    """What became of all model types, grouped by outcome, and those of which there is no line.

    Raises:
        SystemExit: If the outcomes are of several versions of transformers.
    """
    versions = sorted({o.version for o in outcomes})
    if len(versions) != 1:
        raise SystemExit(f"a section of the page has one version of transformers, and these lines have {', '.join(versions) or 'none'}")
    groups = {name: [o for o in outcomes if o.outcome == name] for name in OUTCOMES}
    captured = groups["captured"]
    whole = [o for o in captured if o.attention and not o.missed]
    worst = max((o.error or 0.0 for o in captured), default=0.0)
    counts = ", ".join(f"{len(group)} {name}" for name, group in groups.items() if group)
    parts = [
        f"transformers {versions[0]}, {len(outcomes)} of {len(outcomes) + len(untried)} model types tried: {counts}.",
        f"**Captured** ({len(captured)}; the largest difference of logits is {worst:.1e}). Every attention is one op, and `canonicalize` "
        f"misses nothing ({len(whole)}): {_names(whole)}.",
    ]
    rest = [o for o in captured if o not in whole]
    if rest:
        parts += [f"With something left as it is ({len(rest)}):", _table(("model types", "attention ops", "missed"), _left(rest))]
    titles = {
        "refused": "**Refused**", "bug": "**Not as they should be**",
        "not configured": "**Not configured**: the benchmark makes no tiny network of it",
    }  # fmt: skip
    for name, title in titles.items():
        if groups[name]:
            sentences: dict[str, list[Outcome]] = {}
            for o in groups[name]:
                sentences.setdefault(general(o), []).append(o)
            rows = sorted(sentences.items(), key=lambda item: -len(item[1]))
            parts += [f"{title} ({len(groups[name])}):", _table(("model types", "sentence"), ((_names(g), f"`{s}`") for s, g in rows))]
    if untried:
        parts.append(f"**Not tried yet** ({len(untried)}): {', '.join(f'`{name}`' for name in sorted(untried))}.")
    return "\n\n".join(parts)


def _left(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, str, str]]:
    """Rows of what is captured and not all recognized; types with the same are one row."""
    rows: dict[tuple[bool, str], list[Outcome]] = {}
    for o in outcomes:
        rows.setdefault((bool(o.attention), "; ".join(sorted(o.missed)) or "nothing: it has no softmax attention"), []).append(o)
    for (some, missed), group in sorted(rows.items(), key=lambda item: -len(item[1])):
        yield _names(group), "yes" if some else "none", missed


def _names(outcomes: Sequence[Outcome]) -> str:
    return ", ".join(f"`{o.model_type}`" for o in sorted(outcomes, key=lambda o: o.model_type))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ------------------------------------------------------------------------------------------------ the command


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="model types, several with a comma")
    parser.add_argument("--seconds", type=float, default=60, help="processor time that each may take")
    parser.add_argument("--output", type=Path, default=Path("decoders.jsonl"))
    parser.add_argument("--stored", action="store_true", help="try nothing: the lines that --output has")
    parser.add_argument("--markdown", action="store_true", help="print the tables")
    parser.add_argument("--page", type=Path, help="put the tables of all lines of --output between this page's marks")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    wanted = args.only.split(",") if args.only else list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    unknown = [w for w in wanted if w not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    if unknown:
        raise SystemExit(f"transformers {transformers.__version__} has no causal decoder of type {', '.join(unknown)}")
    stored = map(json.loads, args.output.read_text().splitlines()) if args.output.exists() else ()
    done = {d["model_type"]: Outcome(**d) for d in stored}  # the last line of a type holds
    warm = False
    for name in () if args.stored else wanted:
        if name not in done:
            if not warm:
                outcome("gpt2")  # what torch.export loads when it is first used is then there in every child
                gc.freeze()
                warm = True
            done[name] = isolated(name, args.seconds)
            with args.output.open("a") as lines:
                lines.write(json.dumps(asdict(done[name])) + "\n")
            print(line(done[name]), flush=True)
    tables = section([done[name] for name in wanted if name in done], [name for name in wanted if name not in done])
    if args.markdown:
        print(tables)
    if args.page:
        write_between(args.page, "decoders", tables)


if __name__ == "__main__":
    main()
