"""The page of ntc inspect: what it shows is what the network does, and nobody's text becomes markup. The browser is in test_inspect_browser."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inspect_cases import HOSTILE, float_program, folder_of, hostile_netlist, netlist_of
from programs import canonical
from torch.fx import Graph, Node

from ntc import artifact
from ntc.errors import ArtifactError, BackendError
from ntc.observe import Activity, observe
from ntc.ops import if_neuron, integer_fire, lif_neuron  # noqa: F401  # registers the ops
from ntc.pipeline import run_pipeline
from ntc.program import Program, interpret
from ntc.proof import KEY
from ntc_backends.inspect_page import activity, picture
from ntc_backends.inspect_page.activity import run
from ntc_backends.inspect_page.document import MARK, page
from ntc_backends.inspect_page.flow import flow_of
from ntc_backends.inspect_page.membranes import membranes
from ntc_backends.inspect_page.prompt import Prompt, prompt_for
from ntc_backends.inspect_page.subject import Subject, open_subject
from ntc_passes.encode_linears import EncodeLinears
from tests.cli.conftest import run_ntc
from tests.cli.test_commands import check_keys
from tests.integer_programs import block

IDS = (5, 9, 2, 2, 17, 8, 1)
PROMPT = Prompt(IDS, tuple(f"t{i}" for i in IDS), "test")


class Parsed(HTMLParser):
    """Elements and texts of a page as a browser would find them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.data = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = "data" if dict(attrs).get("id") == "data" else tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            self.data += data
        elif self._inside not in ("script", "style"):
            self.text += data + " "

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.data)
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(float_program(), tmp_path_factory.mktemp("inspect") / "tiny")


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return open_subject(folder)


@pytest.fixture(scope="module")
def parsed(subject: Subject) -> Parsed:
    return Parsed(page(subject, PROMPT, run(subject, IDS)))


def trains(program: Program) -> dict[str, np.ndarray]:
    """Spikes ``[T, L, C]`` of each population, from the program alone."""
    found: dict[str, np.ndarray] = {}

    def visit(node: Node, args: Any, value: Any) -> None:
        if "fire" in str(node.target):
            found[node.name] = value[:, 0].numpy()

    with torch.no_grad():
        interpret(program, torch.tensor([IDS]), visit)
    return found


def bits(text: str, size: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))[:size].astype(int)


# ------------------------------------------------------------------------------------------------ what is shown is true


def test_spikes_of_the_page_are_those_of_the_program(subject: Subject, parsed: Parsed) -> None:
    assert subject.program is not None
    expected = trains(subject.program)
    assert [p["name"] for p in parsed.json["populations"]] == list(expected)
    for p in parsed.json["populations"]:
        train = expected[p["name"]]
        steps, tokens, size = train.shape
        assert (p["size"], p["rows"], p["steps"]) == (size, size, steps)
        shown = bits(p["plus"], train.size) - (bits(p["minus"], train.size) if p["minus"] else 0)
        assert np.array_equal(shown.reshape(size, tokens, steps), train.transpose(2, 1, 0))
    assert any((train < 0).any() for train in expected.values())  # some are negative, and none was lost


def test_rates_and_histograms_are_those_that_observe_measures(subject: Subject, parsed: Parsed) -> None:
    assert subject.program is not None
    measured = Activity(operations=False)
    observe(subject.program, [torch.tensor([IDS])], measured)
    shown = {p["name"]: p for p in parsed.json["populations"]}
    for name, found in measured.populations.items():
        p = shown[name]
        assert p["rate"] == pytest.approx(found.firing_rate, abs=1e-6)
        assert (p["dead"], p["saturated"]) == (found.dead, found.saturated)
        rates = found.spikes.numpy() / (found.steps * len(IDS))
        assert p["histogram"] == np.histogram(rates, np.arange(21) / 20 + [*[-1e-9] * 20, 0])[0].tolist()
        assert f"{100 * found.firing_rate:.1f} %" in parsed.text
    assert any(p["dead"] for p in shown.values())


def test_membranes_of_the_page_fire_where_its_spikes_are(parsed: Parsed) -> None:
    seen = 0
    for p in parsed.json["populations"]:
        assert [t["spikes"] for t in p["traces"]] == sorted((t["spikes"] for t in p["traces"]), reverse=True)
        plus = bits(p["plus"], p["size"] * len(IDS) * p["steps"]).reshape(p["size"], -1)
        for trace in p["traces"]:
            before, after = (np.frombuffer(base64.b64decode(trace[key]), "<f4") for key in ("before", "after"))
            fires = before >= np.float32(trace["threshold"])
            assert np.array_equal(fires, plus[trace["neuron"]] == 1)
            assert np.allclose((before - after)[fires], trace["threshold"], atol=1e-5)
            seen += int(fires.sum())
    assert seen > 50


def node_of(op: Any, args: tuple[Any, ...]) -> Node:
    graph = Graph()
    return graph.call_function(op, tuple(graph.placeholder(f"x{i}") if isinstance(a, torch.Tensor) else a for i, a in enumerate(args)))


X = torch.tensor([[[0.4, -0.3, 1.7, 0.0]], [[0.9, 2.2, -1.5, 0.25]]]).transpose(0, 1)  # [1, 2, 4]
THETA, V0, TAU = torch.tensor([1.0, 0.7, 2.0, 0.5]), torch.tensor([0.5]), torch.tensor([2.0])
TIMED = torch.stack([X, -X, 2 * X, X + 0.5])
NEURONS = {
    "if": (torch.ops.ntc.integrate_fire.default, (X, THETA, V0, 4, False, False, "sigmoid", 1.0)),
    "if signed, timed": (torch.ops.ntc.integrate_fire.default, (TIMED, THETA, V0, 4, True, True, "sigmoid", 1.0)),
    "lif, soft": (torch.ops.ntc.leaky_integrate_fire.default, (3 * X, THETA, TAU, V0, 4, False, False, "sigmoid", 1.0)),
    "lif, hard, timed": (torch.ops.ntc.leaky_integrate_fire.default, (3 * TIMED, THETA, TAU, V0, 4, True, True, "sigmoid", 1.0)),
    "integer, signed": (
        torch.ops.ntc.integer_fire.default, ((100 * X).int(), (100 * THETA).int(), (50 * THETA).int(), 4, True, False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NEURONS)
def test_membranes_follow_the_equations(kind: str) -> None:
    op, args = NEURONS[kind]
    spikes, neurons = op(*args), torch.tensor([2, 0])
    found = membranes(node_of(op, args), args, spikes, neurons)
    assert found is not None
    leaky, timed = "leaky" in str(op), args[0].dim() == 4
    x = (args[0] if timed else args[0].expand(4, *args[0].shape))[:, 0][..., neurons].double()  # [T, L, n]
    fired, theta, start = spikes[:, 0][..., neurons].double(), found.threshold.double(), found.start.double()
    assert torch.equal(theta, args[1][neurons].double())
    for t in range(4):
        if not leaky:  # the sum of everything that came in, less what was fired
            expected = start + x[: t + 1].sum(0) - theta * fired[:t].sum(0)
        else:
            v = start.expand_as(x[0]) if t == 0 else found.after[:, t - 1].double()
            expected = v * (1 - 1 / 2) + x[t] / 2
        assert torch.allclose(found.before[:, t].double(), expected, atol=1e-5)
        left = found.before[:, t].double() * (1 - fired[t]) if "hard" in kind else found.before[:, t].double() - theta * fired[t]
        assert torch.allclose(found.after[:, t].double(), left, atol=1e-5)
    assert fired.any()
    other = spikes.clone()
    other[1, 0, 0, 2] = 1 - other[1, 0, 0, 2]
    with pytest.raises(BackendError, match=r"step 2 would make other spikes than those that were seen: node %"):
        membranes(node_of(op, args), args, other, neurons)


def test_every_element_is_in_the_picture_once_and_the_stream_runs_through_it(subject: Subject, parsed: Parsed) -> None:
    flow = flow_of(subject)
    assert [s.name for s in flow.sections] == ["input", "transformer.h.0", "transformer.h.1", "head"]
    drawn = [box.name for section in flow.sections for box in section.boxes]
    assert len(drawn) == len(set(drawn))
    elements = {e.name for e in subject.elements if not e.name.startswith("host_")}
    assert elements <= set(drawn)
    for section in flow.sections[1:3]:
        assert [bool(branch.sum) for branch in section.branches] == [True, True]
        assert [branch.taps for branch in section.branches] == [[b.boxes[0].name] for b in section.branches]
        assert {box.element.role for box in section.boxes if box.kind == "population"} == {"q", "k", "v", "ffn"}
    (ends,) = flow.sections[-1].branches
    assert ends.boxes[-1].kind == "output" and not ends.sum and ends.taps
    for text in ("LayerNorm", "32 → 128", "4,096 syn.", "4 heads × 8", "mean of 4 steps", "Block 1", "T = 4", "Head"):
        assert text in parsed.text, text
    hosts = [attributes for tag, attributes in parsed.tags if "box host" in (attributes.get("class") or "")]
    assert len(hosts) >= 8


def test_blocks_that_are_built_alike_are_folded(subject: Subject) -> None:
    flow = flow_of(subject)
    middle = flow.sections[1]
    flow.sections[1:3] = [type(middle)(f"transformer.h.{i}", middle.branches) for i in range(48)]
    titles = [p.title for p in picture.pictures(subject, flow, {})]
    assert titles == ["Input", "Block 0", "Block 1", "45 blocks built like Block 1", "Block 47", "Head"]
    folded = picture.pictures(subject, flow, {})[3]
    assert len(folded.folded) == 45 and folded.folded[-1].title == "Block 46" and folded.folded[0].drawings


def test_boxes_never_overlap_or_leave_the_drawing(subject: Subject) -> None:
    for section in picture.pictures(subject, flow_of(subject), {}):
        for drawing in (d for pair in section.drawings for d in pair):
            assert drawing.width <= (344 if drawing.upright else 1080)
            for i, a in enumerate(drawing.boxes):
                assert a.x > 0 and a.x + a.width <= drawing.width and a.y > 0 and a.y + a.height <= drawing.height
                for b in drawing.boxes[:i]:
                    apart = a.x >= b.x + b.width or b.x >= a.x + a.width or a.y >= b.y + b.height or b.y >= a.y + a.height
                    assert apart, (a, b)


# ------------------------------------------------------------------------------------------------ netlists, integers, other kinds


def test_the_integer_grade_shows_widths_and_the_simulator_the_same_spikes(tmp_path: Path) -> None:
    program = block()
    compiled, netlist = open_subject(folder_of(program, tmp_path / "folder")), open_subject(netlist_of(program, tmp_path / "netlist"))
    ids = [i % 13 for i in IDS]
    ours, theirs = run(compiled, ids), run(netlist, ids)
    assert [(f.plus, f.minus, f.counts.tolist()) for f in ours.values()] == [(f.plus, f.minus, f.counts.tolist()) for f in theirs.values()]
    assert all(f.traces for f in ours.values()) and not any(f.traces for f in theirs.values())
    prompt = Prompt(tuple(ids), tuple(map(str, ids)), "test")
    for shown, fired in ((compiled, ours), (netlist, theirs)):
        found = Parsed(page(shown, prompt, fired))
        assert "Widths" in found.text and "membrane" in found.text and "Membrane bits" in found.text
        population = shown.populations[0]
        assert f"v {population.membrane_bits} bit" in found.text
    assert "give the compiled folder to ntc inspect" in found.text


def test_a_netlist_alone_shows_its_structure(folder: Path, tmp_path: Path) -> None:
    alone = open_subject(netlist_of(float_program(), tmp_path))
    found = Parsed(page(alone, None, {}))
    assert found.json["populations"] == []
    assert "Structure only" in found.text and "Block 1" in found.text and "raster" not in [a.get("id") for _, a in found.tags]
    assert [e.name for e in alone.elements] == [e.name for e in open_subject(folder).elements]


def test_verification_is_shown_whatever_it_found(subject: Subject) -> None:
    assert "ntc verify" in Parsed(page(subject, None, {})).text
    target = {"verdict": "differs", "agrees": False, "reason": "because of %x", "spike_mismatches": 1234567, "compared": 2000000,
              "max_logit_diff": 0.0625, "top1_agreement": 0.5, "held": {"spike_mismatches": 77}}  # fmt: skip
    more = {**subject.manifest, KEY: {"targets": {"onnx": target, "nir": {"verdict": "unsupported"}}}}
    text = Parsed(page(Subject(**{**vars(subject), "manifest": more}), None, {})).text
    for shown in ("differs", "because of %x", "1,234,567", "2,000,000", "0.0625", "50.00 %", "77", "unsupported"):
        assert shown in text, shown


def test_sampling_is_stated_and_keeps_the_page_small(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (activity._RASTER_BYTES + activity._TRACE_BYTES) * 4 / 3 < 2_000_000  # the largest page holds that, and the pictures
    whole = run(subject, IDS)
    monkeypatch.setattr(activity, "_RASTER_BYTES", 900)
    few = run(subject, IDS)
    assert sum(len(f.plus) + len(f.minus) for f in few.values()) * 3 / 4 <= 950
    for name, f in few.items():
        steps, most = f.element.steps, len(IDS) * f.element.steps
        rows = bits(whole[name].plus, f.element.size * most).reshape(-1, most)[[i * f.element.size // len(f.rows) for i in range(len(f.rows))]]
        assert np.array_equal(bits(f.plus, len(f.rows) * most).reshape(-1, most), rows), steps
        assert f.rate == whole[name].rate
    assert "Sampled:" in Parsed(page(subject, PROMPT, few)).text and "Sampled:" not in Parsed(page(subject, PROMPT, whole)).text


# ------------------------------------------------------------------------------------------------ hostile texts, same bytes


def test_texts_of_others_never_become_markup(tmp_path: Path) -> None:
    hostile = open_subject(hostile_netlist(tmp_path))
    html = page(hostile, Prompt((1, 2), (HOSTILE, "</title><script>x"), HOSTILE), run(hostile, (1, 2)))
    found = Parsed(html)
    assert [tag for tag, _ in found.tags].count("script") == 2
    assert not {"img", "iframe", "link", "object"} & {tag for tag, _ in found.tags}
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert not re.search(r"<img|onerror=alert\(1\)>(?!&)", html)
    assert HOSTILE in found.text and found.json["tokens"][0] == HOSTILE  # shown, as text
    policy = next(a["content"] for tag, a in found.tags if tag == "meta" and a.get("http-equiv"))
    assert policy is not None and "default-src 'none'" in policy and "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
    assert all((attributes.get(key) or "#").startswith("#") for _, attributes in found.tags for key in ("href", "src"))


def test_the_same_input_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        assert run_ntc("inspect", folder, "--tokens", "5,9,2", "-o", tmp_path / name).code == 0
    first, second = ((tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second
    assert len(first) < 400_000
    assert str(tmp_path).encode() not in first


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_says_what_it_wrote(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    ran = run_ntc("inspect", folder, "--prompt", "the lazy dog", "-o", out, "--json")
    assert ran.code == 0, ran.err
    data = ran.json
    check_keys("inspect", data)
    assert (data["bytes"], data["tokens"], data["kind"]) == (out.stat().st_size, 12, "folder")
    assert data["populations"] == 8 and data["neurons"] == data["neurons_shown"] == 448
    text = out.read_text(encoding="utf-8")
    assert MARK in text and '<span class="token">␣</span>' in text and "--prompt" in text and "the lazy dog" in text
    again = run_ntc("inspect", folder, "-o", out)  # its own page may be written over
    assert again.code == 0 and "firing rate" in again.out
    assert "Examples:" in run_ntc("inspect", "--help").out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{netlist}", "--prompt", "a"], "a netlist has no tokenizer, so it cannot read a text: give --tokens IDS"),
        (["{folder}", "--prompt", "a", "--tokens", "1"], "--prompt TEXT and --tokens IDS exclude each other"),
        (["{folder}", "--tokens", "1,x"], "--tokens takes token ids with commas between them"),
        (["{folder}", "--tokens", "1,-2"], "token ids are not negative"),
        (["{folder}", "--tokens", "1,61"], "token id 61 is outside the vocabulary of 61 tokens"),
        (["{folder}", "--tokens", ",".join("1" * 25)], "25 tokens are more than the model's context of 24"),
        (["{folder}", "--prompt", ""], "the text of --prompt has no tokens"),
        (["{empty}"], "holds neither a compiled program nor a netlist"),
        (["{empty}/absent.json"], "there is no netlist at"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(arguments: list[str], says: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    places = {"netlist": tmp_path / "netlist", "folder": folder, "empty": tmp_path / "empty"}
    if "{netlist}" in arguments:
        netlist_of(float_program(), tmp_path / "netlist")
    ran = run_ntc("inspect", *(a.format(**places) for a in arguments), "-o", tmp_path / "page.html")
    assert (ran.code, ran.err.count("\n")) == (2, 1), ran.err
    assert says in ran.err
    assert not list(tmp_path.glob("*.html*"))


def test_neurons_that_no_netlist_holds_are_refused(tmp_path: Path) -> None:
    coded = run_pipeline(canonical(n_layer=1), [EncodeLinears.configure({"code": "digits"})])
    folder_of(coded, tmp_path / "coded")
    ran = run_ntc("inspect", tmp_path / "coded", "-o", tmp_path / "page.html")
    assert (ran.code, ran.err.count("\n")) == (2, 1), ran.err
    assert "cannot be drawn, because the page shows what a netlist holds: the netlist format has no elements for neurons whose" in ran.err
    assert not list(tmp_path.glob("*.html*"))


def test_other_files_are_left_as_they_are(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text("<!doctype html>\nmine", encoding="utf-8")
    for place, says in (("mine.html", "is no page of ntc inspect: it is left as it is"), ("no/page.html", "there is no folder"), ("", "is a folder")):
        ran = run_ntc("inspect", folder, "-o", tmp_path / place)
        assert (ran.code, says in ran.err) == (2, True), ran.err
    assert (tmp_path / "mine.html").read_text(encoding="utf-8") == "<!doctype html>\nmine"


def test_a_folder_without_tokenizer_runs_its_example(tmp_path: Path) -> None:
    folder = folder_of(float_program(), tmp_path / "bare", tokenizer=False)
    prompt = prompt_for(open_subject(folder), None, None)
    assert prompt is not None
    assert list(prompt.ids) == artifact.load(folder).example[0].tolist()
    with pytest.raises(ArtifactError):
        open_subject(tmp_path)
