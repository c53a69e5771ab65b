"""A base and its adapter are merged while they are written: the bytes of a model that was merged as a whole, of which
one tensor is there at a time."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import make, save
from tiny_runs import call, lora_run, noisy
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import adapters
from jobs.adapting import making
from jobs.adapting.adapted import open_adapters
from jobs.runs.base import Base
from jobs.runs.job import to_model_files
from lora.attach import attach
from lora.config import LoRAConfig
from lora.merge import MergedTensors, merge
from models.files import dequantize, to_files
from models.pretrained.source import find_source
from models.stored import WEIGHTS
from runtime.errors import UserError
from runtime.processes.command import run_command
from runtime.storage.folders import commit_folder
from runtime.storage.tensors import TensorFile
from runtime.training.batch import Batch

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
COPIES = {"targets": "all-linear", "train_embeddings": True, "bias": "all"}
CASES = {  # the model, the dtype in which it is stored and that in which it is written, its form, and the adapter
    "gpt2, transposed and tied": ("gpt2", F32, None, "none", {"targets": "c_attn,c_fc,c_proj"}),
    "gpt2, rounded": ("gpt2", BF16, F16, "none", {"targets": "c_attn", "rank_pattern": {"c_attn": 2}}),
    "copies of embeddings and biases": ("gpt2 untied", BF16, None, "none", COPIES),
    "copies, widened": ("gpt2 untied", BF16, F32, "none", COPIES),
    "an adapted head": ("llama", F16, None, "none", {"targets": "all"}),
    "DoRA": ("llama biases, own head_dim", BF16, None, "none", {"variant": "dora", "targets": "all"}),
    "VeRA": ("qwen3", BF16, F32, "none", {"variant": "vera", "rank": 4}),
    "AdaLoRA": ("mistral", F32, F16, "none", {"variant": "adalora", "rank": 4, "target_rank": 2}),
    "rsLoRA, tied": ("qwen2 tied", BF16, None, "none", {"variant": "rslora", "targets": "standard"}),
    "nf4": ("llama", BF16, None, "nf4", {"targets": "minimal"}),
    "int8, widened": ("qwen2 tied", BF16, F32, "int8", {"targets": "standard", "variant": "dora"}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def opened(case: str, here: Path, dtype: torch.dtype, form: str = "none") -> Base:
    save(make(case, dtype), here / "base", max_shard_size="30KB")
    assert len(list((here / "base").glob("*.safetensors"))) > 1
    return Base.of(find_source(here, "base"), form=form)


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_are_those_of_a_model_that_was_merged_as_a_whole(name: str, here: Path) -> None:
    case, stored, written, form, config = CASES[name]
    if form != "none":
        pytest.importorskip("bitsandbytes")
    base = opened(case, here, stored, form)
    attach(base.model, LoRAConfig(**{"targets": "all-linear", "train_embeddings": False} | config))
    noisy(base.model, 0.05)
    whole, before = copy.deepcopy(base.model), {name: p.clone() for name, p in base.model.named_parameters()}
    tensors = MergedTensors(base.model, written)
    streamed = to_model_files(base.model, base.tokenizer, base, tensors)
    found = bytes(streamed[WEIGHTS])
    dequantize(whole)
    whole = whole if written is None else whole.float()
    merge(whole)
    exact = {name: p.clone() for name, p in whole.named_parameters()}
    assert streamed == to_model_files(whole if written is None else whole.to(written), base.tokenizer, base)
    assert found == bytes(streamed[WEIGHTS])  # and once more
    assert not any(tensor.requires_grad for tensor in tensors.values())
    rounded = any(
        not torch.equal(exact[name].to(written or stored).to(exact[name].dtype), exact[name]) for name in exact
    )
    assert tensors.rounded == (rounded if written else stored != F32)
    assert all(torch.equal(p, before[name]) for name, p in base.model.named_parameters())


def test_one_tensor_is_there_at_a_time(here: Path) -> None:
    base = opened("llama", here, BF16)
    attach(base.model, LoRAConfig(targets="all", train_embeddings=True))
    own = {p.data_ptr() for p in base.model.parameters()}
    made: list[tuple[str, StorageWeakRef]] = []

    class Watched(MergedTensors):
        def __getitem__(self, name: str) -> Tensor:
            assert not [other for other, ref in made if not ref.expired()], name
            tensor = super().__getitem__(name)
            if tensor.data_ptr() not in own:
                made.append((name, StorageWeakRef(tensor.untyped_storage())))
            return tensor

    tensors = Watched(base.model, F32)
    commit_folder(here / "out", to_files(base.model, base.kept, tensors))
    assert {name for name, _ in made} == tensors.described.keys() - {"token_embedding.weight"}  # the adapter's own


def merged(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["adapters.py", "merge", *words, "--checkpoints-dir", ".", "--data-dir", "cache"])
    with pytest.raises(SystemExit) as ended:
        run_command(adapters.main)
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def test_a_disk_that_is_full_midway_leaves_nothing(here: Path, monkeypatch, capsys) -> None:
    resource = pytest.importorskip("resource")  # not on Windows
    opened("gpt2 untied", here, F32)
    lora_run(here, "adapted", "base")
    (here / "text.txt").write_text("the cat sat on the mat\n" * 200)
    before = sorted(here.rglob("*"))
    assert merged(monkeypatch, capsys, "adapted", "--out", "first", "--dataset", "text.txt")[0] == 0
    size = (here / "first/model" / WEIGHTS).stat().st_size
    for commanded in (
        lambda: merged(monkeypatch, capsys, "adapted", "--out", "second", "--dataset", "text.txt"),
        lambda: call(monkeypatch, capsys, "adapted", "--to", "hf", "--out", "second"),
    ):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
        try:
            status, _, err = commanded()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert status == 1 and "could not save" in err and "free some space and start again" in err, err
        assert [
            path for path in sorted(here.rglob("*")) if path.parts[len(here.parts)] not in ("first", "cache")
        ] == before


def test_what_is_not_in_the_files_as_it_was_merged_is_refused(here: Path, monkeypatch) -> None:
    """Rounding to 16 bits may change logits by any amount, so it is the tensors that are compared."""
    opened("llama", here, BF16)
    lora_run(here, "adapted", "base")
    (adapted,) = open_adapters(here, ("adapted",))
    monkeypatch.setattr(
        making, "to_model_files", lambda model, tokenizer, base, _: to_model_files(model, tokenizer, base)
    )
    tokens = torch.arange(64).view(2, 32)
    with pytest.raises(UserError, match="up_proj.weight.*not in the files as it was merged; nothing was saved"):
        making.merge_run(adapted, here / "out", Batch(tokens, tokens))
    assert not (here / "out").exists() and not list(here.glob(".tmp*"))


def test_nothing_of_a_copy_is_lost_in_fp32(here: Path, monkeypatch, capsys) -> None:
    opened("gpt2 untied", here, BF16)
    lora_run(here, "adapted", "base", **COPIES)
    status, out, err = call(monkeypatch, capsys, "adapted", "--to", "hf", "--out", "wide", "--outtype", "f32")
    assert status == 0 and "(up to 1e-05 passes)" in out, err
    (adapted,), written = open_adapters(here, ("adapted",)), TensorFile((here / "wide" / WEIGHTS).read_bytes(), WEIGHTS)
    for path, name, values in adapted.adapter.trained_copies():
        assert torch.equal(written[f"{adapted.base.family.theirs(path)}.{name}"], values), path
