"""Check an ONNX file against the program that it was made of: its form, its results on equal spikes, and how it runs freely."""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx.checker
import onnx.shape_inference
import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import BackendError, DisagreementError
from ntc.meta import where
from ntc.program import Program
from ntc.recording import Recorded, neurons_of, populations, record
from ntc.rounding import limits, margins
from ntc_backends.onnx_run import Exposed, session
from ntc_backends.onnx_writer import EXTERNAL_BYTES

__all__ = ["Tolerance", "check", "compare", "verdict"]

logger = logging.getLogger(__name__)

_HELD = 1 << 26
"""Spikes that the held comparison takes at once; 256 MB in, as many out."""


@dataclass(frozen=True)
class Tolerance:
    """How far ONNX Runtime may be from the program *on equal spikes*.

    Between two populations a program is smooth, and two executors agree to rounding. At a threshold it is not: a membrane that
    lies within rounding of theta fires in one executor and not in the other, about once in 10**6 to 10**7 spikes, and in a deep network
    the layers behind can make anything of one spike (measured on untrained GPT-2s: 50 times more flips with every layer). No
    bound on the free-running logits holds for every right file. So the file is judged with each population's readers held to
    the program's spikes, where nothing accumulates; how far the free run goes is measured and reported.

    Attributes:
        logits: Largest ``max |delta logit|``, as a fraction of ``1 + max |logit|``. Rounding in fp32 gives 1e-6 to 1e-5.
        spikes: Largest share of spikes that differ in any one population. Ties give 1e-7 to 1e-6, weights 1 % off about 1e-2.
        ties: Spikes of a population that may always differ: in a small one a single tie is a large share.
        top1: Least share of positions with the same most probable token; one position may always differ.
    """

    logits: float = 1e-4
    spikes: float = 1e-4
    ties: int = 3
    top1: float = 0.999


def check(path: Path, program: Program, tokens: Tensor, tolerance: Tolerance | None = None) -> dict[str, Any]:
    """Check a written model: its form, then what it computes, against the program it was made of.

    Args:
        path: The ``.onnx`` file; external weights lie beside it.
        program: The program.
        tokens: Token ids ``[B, L]``.
        tolerance: Limits; by default those of ``Tolerance``.

    Raises:
        BackendError: If the file is malformed, does not load, or disagrees.
    """
    tolerance = tolerance or Tolerance()
    size = sum(p.stat().st_size for p in path.parent.iterdir() if p.is_file())
    try:
        # The full check infers all shapes on a copy of the model; for weights of gigabytes only the structure is checked.
        onnx.checker.check_model(str(path), full_check=size <= EXTERNAL_BYTES)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BackendError(f"the ONNX checker refuses the model: {error}") from error
    if _computes_with_integers(program):
        return {"checker": "ok", **_identical(path, program, tokens)}
    held = _held(path, program, tokens, tolerance)
    report = {"checker": "ok", **compare(session(path), program, tokens), "held": held, "tolerance": asdict(tolerance)}
    if report["top1_agreement"] < tolerance.top1:
        logger.warning(
            "ONNX Runtime and the program give the same token at %.2f %% of the positions only, although every population agrees "
            "on equal input: this network makes large differences of single flipped spikes", 100 * report["top1_agreement"],
        )  # fmt: skip
    return report


def verdict(report: Mapping[str, Any]) -> str:
    """What ``check`` found and the limits that it held it to, for people."""
    if "held" not in report:
        return f"checker {report['checker']}; all logits at {report['tokens']:,} positions identical in ONNX Runtime"
    held, limits = report["held"], report["tolerance"]
    return (
        f"checker {report['checker']}; in ONNX Runtime the same top token at {report['top1_agreement']:.2%} of {report['tokens']:,} "
        f"positions, max |delta logit| {report['max_abs_logit_difference']:.2g} (largest logit {report['max_abs_logit']:.3g}); given equal "
        f"spikes {held['spike_mismatches']:,} of {held['spikes']:,} spikes differ (limit {limits['spikes']:.2%} of a population) and max "
        f"|delta logit| is {held['max_abs_logit_difference']:.2g} (limit {limits['logits'] * (1 + report['max_abs_logit']):.2g})"
    )


def _computes_with_integers(program: Program) -> bool:
    (logits, *_) = (a for n in program.graph.find_nodes(op="output") for a in n.all_input_nodes)
    return logits.target is torch.ops.ntc.from_integer.default


def _identical(path: Path, program: Program, tokens: Tensor) -> dict[str, Any]:
    """Integers do not depend on the order of sums: nothing may differ, and no population has to be held to the program's spikes."""
    report = compare(session(path), program, tokens)
    if report["max_abs_logit_difference"] != 0:
        raise DisagreementError(
            "ONNX Runtime disagrees with the program, which computes with integers, so that nothing may differ: logits differ by up to "
            f"{report['max_abs_logit_difference']:.3g}"
        )
    return report


def compare(session: Any, program: Program, tokens: Tensor) -> dict[str, Any]:
    """Run an ONNX Runtime session of ``model.onnx`` beside the program, both freely; refuses only what has another shape.

    Returns quantiles over positions of ``max_v |delta logit|`` and the share of positions with the same most probable token.
    """
    differences, same, largest = [], 0, 0.0
    rows = max(1, (1 << 26) // max(1, tokens.shape[1] * program.info.vocab_size))  # 256 MB of logits at a time
    for ids in torch.split(tokens, rows):
        with torch.no_grad():
            expected = program(ids)
        result = torch.from_numpy(session.run(["logits"], {"input_ids": ids.to(torch.int64).numpy()})[0])
        if result.shape != expected.shape:
            raise DisagreementError(f"ONNX Runtime gives logits of shape {list(result.shape)}, the program {list(expected.shape)}")
        differences.append((result - expected).abs().amax(-1).flatten())
        same += int((result.argmax(-1) == expected.argmax(-1)).sum())
        largest = max(largest, float(expected.abs().max()))
    moved = torch.cat(differences).sort().values
    at = {"median": 0.5, "p99": 0.99, "max": 1.0}
    found = {f"{k}_abs_logit_difference": float(moved[min(moved.numel() - 1, int(q * moved.numel()))]) for k, q in at.items()}
    return {"tokens": moved.numel(), "top1_agreement": same / moved.numel(), **found, "max_abs_logit": largest}


def _unequal(program: Program, node: Node, ours: Tensor, theirs: Tensor) -> tuple[int, int, float, str]:
    """What differs of a population, of how many, the share that rounding makes differ, and what is counted.

    Digits are one number: where its last one is decided by rounding, digits in front of it may differ as well (1 0 0 is 0 1 1 and one
    more). So numbers are compared, in steps: a tie moves one by a step, or two where spikes have a price; more is a mistake, and one
    is too many. The share of numbers that lie within rounding of a tie grows with N, the largest number: at most ``2 g eps N`` with
    g = 8 (``ntc.rounding``), 1 in 13,000 for 4 digits of base 3, 1 in 8 for 16 of base 2, which are nearly all that float32 holds.
    """
    if node.target is not torch.ops.ntc.digit_neuron.default:
        return int((ours != theirs).sum()), ours.numel(), 0.0, "spikes"
    weights = program.tensor(node.args[2]).detach()  # type: ignore[arg-type]
    off = (torch.tensordot(weights, ours.to(weights.dtype) - theirs.to(weights.dtype), dims=1)).abs()
    most = float(weights.sum())
    if bool((off > 2.5).any()):
        return int((off > 2.5).sum()), 0, 0.0, "numbers differ by more than two steps"
    return int((off > 0.25).sum()), off.numel(), 16 * torch.finfo(weights.dtype).eps * most, "numbers"


def _no_ties(node: Node, one: Recorded, got: Tensor, reach: Mapping[str, Tensor]) -> int:
    """Neurons that fired another train although rounding does not bring their membranes to where they would (``ntc.rounding``).

    Behind ops with neurons of their own, as those of the numerators of softmax, ties are frequent: each one of theirs is many here.
    """
    places = (got != one.trains[node.name]).any(0).nonzero(as_tuple=True)
    apart = margins(node, one.arguments[node.name], got, places)
    if apart is None or node.name not in reach:
        return len(places[0])
    return int((apart > reach[node.name][:, places[-1]]).any(0).sum())


def _length(trains: Collection[Node], tokens: int) -> int:
    """How many of so many tokens the held comparison takes: at least 8."""

    def held(length: int) -> int:
        return sum(int(n.meta["val"].shape[0]) * neurons_of(n, length) for n in trains)

    return min(tokens, max(8, bisect_right(range(tokens + 1), _HELD, key=held) - 1))


def _held(path: Path, program: Program, tokens: Tensor, tolerance: Tolerance) -> dict[str, Any]:
    """Run the model with every population's input held to the program's spikes, and judge.

    The edges behind the populations are cut: what a population fires is an output, what its readers see is an input.
    """
    trains = populations(program)
    ids = tokens[:1, : _length(trains.values(), tokens.shape[1])]
    one, model = record(program, ids, 0), Exposed(path, trains, cut=True)
    expected, logits = one.trains, one.logits
    found, got = model.run(ids, {**expected, **{name: one.values[name] for name in model.sources}})
    difference = float((found - logits).abs().max())
    differing = {name: int((got[name] != value).sum()) for name, value in expected.items()}
    report = {
        "tokens": ids.numel(), "max_abs_logit_difference": difference,
        "top1_agreement": float((found.argmax(-1) == logits.argmax(-1)).double().mean()),
        "spikes": sum(v.numel() for v in expected.values()), "spike_mismatches": sum(differing.values()),
    }  # fmt: skip
    reach: Mapping[str, Tensor] | None = None
    for name in differing:
        count, total, share, what = _unequal(program, trains[name], expected[name], got[name])
        allowed = max(tolerance.ties, math.floor(max(tolerance.spikes, share) * total)) if total else 0
        if count > allowed:
            of = f"{count} {what}"
            if total:  # more than usual; whether they are ties all the same takes four more runs
                reach = reach if reach is not None else limits(program, one).membranes
                if not (wrong := _no_ties(trains[name], one, got[name], reach)):
                    continue
                of = f"{count} of {total} {what} differ (limit {allowed}), and {wrong} neurons are no ties,"
            raise DisagreementError(f"ONNX Runtime disagrees with the program: on equal input {of} at {where(trains[name])}")
    limit = tolerance.logits * (1.0 + float(logits.abs().max()))
    if not difference <= limit:  # also if it is NaN
        raise DisagreementError(
            f"ONNX Runtime disagrees with the program: on equal spikes the logits differ by {difference:.3g} (limit {limit:.3g})"
        )
    if round((1 - report["top1_agreement"]) * ids.numel()) > max(1, math.floor((1 - tolerance.top1) * ids.numel())):
        share = report["top1_agreement"]
        raise DisagreementError(f"ONNX Runtime gives the same token at {share:.2%} of the positions only, on equal spikes")
    return report
