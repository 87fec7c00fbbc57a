"""Large networks on disk: the same program, weights in files without a name, nothing left behind, a full disk is an error."""

from __future__ import annotations

import errno
import gc
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import ntc
from ntc import artifact, compiler, scratch, shards
from ntc.errors import ArtifactError
from ntc.loading import load_model
from ntc.program import Program, interpret
from ntc.scratch import considered, is_mapped, kept, offered, released
from ntc.shards import in_float32
from ntc.testing import example_ids, tiny_gpt2


def files_without_a_name(folder: Path) -> int:
    """How many unlinked files of a folder this process has mapped."""
    return sum(str(folder) in line and "(deleted)" in line for line in Path("/proc/self/maps").read_text().splitlines())


def resident(folder: Path) -> int:
    """kB of mapped files of a folder that are in memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            ours = str(folder) in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two blocks, saved in bfloat16."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "llama"
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def compiled(folder: Path, where: Path, monkeypatch: pytest.MonkeyPatch, larger_than: int) -> compiler.Compilation:
    def ours(folder: Path) -> Any:
        return offered(folder, larger_than=larger_than, least=1024)

    monkeypatch.setattr(compiler, "offered", ours)
    settings = ntc.Settings({"scale": "static", "steps": 4})
    return ntc.compile(folder, recipe="sdllm", settings=settings, calibration=ntc.Calibration.of(example_ids()), scratch=where)


def test_a_large_network_compiles_to_the_same_bytes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = tmp_path / "new" / "scratch"
    large, small = compiled(folder, where, monkeypatch, 0), compiled(folder, tmp_path / "unused", monkeypatch, 1 << 40)
    for made in (large.program, large.analog):
        matrices = {n: t for n, t in made.tensors.items() if t.numel() * t.element_size() >= 1024}
        assert len(matrices) >= 14
        assert all(is_mapped(t) for t in matrices.values())
        assert not any(is_mapped(t) for n, t in made.tensors.items() if n not in matrices)
    assert large.program.on_disk and not small.program.on_disk
    assert str(large.program) == str(small.program)
    assert [r.drift for r in large.program.history] == [r.drift for r in small.program.history]
    for name, value in small.program.tensors.items():
        assert torch.equal(large.program.tensor(name), value), name
    assert list(where.iterdir()) == []
    assert not (tmp_path / "unused").exists()
    saved = tmp_path / "saved"
    saved.mkdir()
    artifact.save(large.program, saved)
    assert load_file(saved / "program.safetensors").keys() == small.program.tensors.keys()
    assert torch.equal(artifact.load(saved)(example_ids()), small.program(example_ids()))


def test_space_is_free_when_the_program_is_gone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = compiled(folder, tmp_path, monkeypatch, 0)
    assert files_without_a_name(tmp_path) >= 2 * 14  # the network, and what passes made of it
    made = made.analog
    gc.collect()
    assert 14 <= files_without_a_name(tmp_path) < 2 * 14
    del made
    gc.collect()
    assert files_without_a_name(tmp_path) == 0


def on_disk(where: Path) -> Program:
    """A tiny GPT-2 with matrices of 1 MiB and more."""
    with offered(where, larger_than=0):
        return ntc.capture(_saved(where))


def _saved(where: Path) -> Path:
    path = where / "gpt2"
    tiny_gpt2(n_layer=2, n_embd=256, vocab_size=64).save_pretrained(path)
    return path


def test_a_run_leaves_no_weights_in_memory(tmp_path: Path) -> None:
    program = on_disk(tmp_path)
    ids, seen = example_ids(), list[int]()
    total = sum(t.numel() * t.element_size() for t in program.tensors.values() if is_mapped(t)) // 1024
    assert total >= 4096
    torch.nn.functional.relu(sum(t.sum() for t in program.tensors.values()))  # reads them all
    assert resident(tmp_path) >= total
    released(program.tensors.values())
    assert resident(tmp_path) == 0
    expected = program.module(ids)
    released(program.tensors.values())
    logits = interpret(program, ids, lambda *_: seen.append(resident(tmp_path)))
    assert torch.equal(logits, expected)
    assert 0 < max(seen) < total / 2  # one weight at a time
    assert resident(tmp_path) == 0
    assert torch.equal(program(ids), expected) and resident(tmp_path) == 0


def test_values_written_into_a_mapped_tensor_stay(tmp_path: Path) -> None:
    """Fine-tuning writes into weights; a page that is given back comes from the file again."""
    with offered(tmp_path, larger_than=0, least=1):
        assert considered(torch.nn.Linear(2, 2), ours=False)
        value = kept(torch.arange(4096.0).reshape(64, 64))
        assert kept(value) is value
    value[0] = -1.0
    released([value[1:]])  # a view leads to the whole
    assert torch.equal(value[0], torch.full((64,), -1.0)) and value[1, 0] == 64.0


def test_what_stays_in_memory(tmp_path: Path) -> None:
    value = torch.zeros(64, 64)
    assert kept(value) is value  # nothing is offered
    with offered(tmp_path):
        assert not considered(torch.nn.Linear(2, 2), ours=True)
        assert kept(value) is value  # the network is small
    mine = torch.nn.Linear(64, 64)
    before = mine.weight.data_ptr()
    with offered(tmp_path, larger_than=0, least=1024):
        assert considered(mine, ours=False)
        assert mine.weight.data_ptr() == before  # it is the user's
        assert kept(value[:, :1]) is not kept(value) and not is_mapped(kept(value[:1, :1]))
        assert is_mapped(kept(value.T)) and torch.equal(kept(value.T), value.T)


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with offered(tmp_path, larger_than=0, least=1):
        considered(torch.nn.Linear(2, 2), ours=False)
        monkeypatch.setattr(tempfile, "TemporaryFile", full)
        with pytest.raises(ArtifactError, match=r"cannot keep weights in .*: No space left on device; give another folder, --scratch DIR"):
            kept(torch.zeros(8))


def test_the_default_folder_is_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert scratch.default_folder() == Path("/somewhere/ntc/scratch")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert scratch.default_folder() == Path("~/.cache/ntc/scratch").expanduser()


def stored(path: Path, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path, **options)
    return model


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_large_network_is_loaded_from_files_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: str) -> None:
    """What is handed to transformers holds float32 already, whether in one file or in several; nothing of it is left."""
    written, where, seen = stored(tmp_path / "model", max_shard_size=shard), tmp_path / "scratch", []
    load = transformers.AutoModelForCausalLM.from_pretrained

    def watched(pretrained_model_name_or_path: str, **options: Any) -> Any:
        for path in Path(pretrained_model_name_or_path).glob("*.safetensors"):
            assert path.parent.parent == where and not path.is_symlink()
            seen.extend(t.dtype for t in load_file(path).values())
        return load(pretrained_model_name_or_path, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", watched)
    with offered(where, larger_than=0):
        model = load_model(tmp_path / "model")
    assert len(seen) == 2 * 9 + 2 and set(seen) == {torch.float32}
    assert list(where.iterdir()) == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, written.state_dict()[name].float()), name


def test_files_are_taken_as_they_are(tmp_path: Path) -> None:
    """Nothing offered, a small network, one in float32 already."""
    stored(tmp_path / "narrow")
    stored(tmp_path / "wide").float().save_pretrained(tmp_path / "wide")
    with in_float32(tmp_path / "narrow") as found:
        assert found == tmp_path / "narrow"
    with offered(tmp_path / "scratch"), in_float32(tmp_path / "narrow") as found:
        assert found == tmp_path / "narrow"
    with offered(tmp_path / "scratch", larger_than=0), in_float32(tmp_path / "wide") as found:
        assert found == tmp_path / "wide"
    assert not (tmp_path / "scratch").exists()


def test_other_types_stay(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5, dtype=torch.float16), "b": torch.arange(7), "c": torch.randn(2), "d": torch.tensor([True, False, True])}
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    with offered(tmp_path / "scratch", larger_than=0), in_float32(tmp_path / "model") as found:
        loaded = load_file(found / "model.safetensors")
        assert (found / "config.json").read_text() == "{}"
    assert {n: t.dtype for n, t in loaded.items()} == {"a": torch.float32, "b": torch.int64, "c": torch.float32, "d": torch.bool}
    assert all(torch.equal(loaded[n], t.to(loaded[n].dtype)) for n, t in tensors.items())


def test_a_disk_that_fills_while_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(tmp_path / "model")

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "_widen", full)
    with offered(tmp_path / "scratch", larger_than=0), pytest.raises(ArtifactError, match="No space left on device; give another folder"):
        load_model(tmp_path / "model")
    assert list((tmp_path / "scratch").iterdir()) == []
