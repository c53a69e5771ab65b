"""Bases in 4 and 8 bits: files that transformers with bitsandbytes writes and reads, and every command on them."""

from __future__ import annotations

import importlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from test_pretrained_commands import FAST, good, run
from tiny_models import make, save

from jobs.runs.base import Base
from models.files import form_of
from models.pretrained.source import Pretrained
from runtime.errors import UserError
from runtime.extras import bitsandbytes
from runtime.storage.quantized import Quantized
from runtime.storage.runs import open_run
from runtime.storage.tensors import fingerprint

TEXT = "the cat and the dog sat on the mat\n" * 200
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
HOW: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "nf4, scales in fp32": NF4 | {"bnb_4bit_use_double_quant": False},
    "int8": {"load_in_8bit": True},
}
CASES = ("llama", "gpt2", "qwen2 tied", "qwen3")


def here(monkeypatch: pytest.MonkeyPatch, folder: Path, command: str, *words: str) -> str:
    """What a command prints, in this process, which has imported the packages already: that takes seconds each time."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [command, *words])
    for name, value in {"DATA_DIR": "cache", "DEVICE": "cpu", "MPLBACKEND": "agg"}.items():
        monkeypatch.setenv(name, value)
    with redirect_stdout(io.StringIO()) as told:
        importlib.import_module(command.removesuffix(".py")).main()
    return told.getvalue()


def quantised_by_transformers(folder: Path, how: dict[str, Any]) -> transformers.PreTrainedModel:
    config = transformers.BitsAndBytesConfig(**how)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


def their_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every quantised matrix that transformers holds, by its name, dequantised by bitsandbytes."""
    library, found = bitsandbytes(), {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if hasattr(weight, "quant_state"):
            found[name] = library.dequantize_4bit(weight.data, weight.quant_state)
        elif hasattr(weight, "SCB"):
            found[name] = library.int8_vectorwise_dequant(weight.CB, weight.SCB)
    return found


def our_weights(base: Base) -> dict[str, torch.Tensor]:
    """The same of ours, by their names."""
    return {
        base.family.theirs(name.removesuffix(".weight")): p.dense()
        for name, p in base.model.named_parameters()
        if isinstance(p, Quantized)
    }


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    assert ours and ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], weight.to(ours[name].dtype)) for name, weight in theirs.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", CASES)
def test_quantising_gives_the_weights_of_transformers_and_so_do_its_files(
    case: str, how: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = save(make(case, dtype), tmp_path / "base")
    model = quantised_by_transformers(folder, HOW[how])
    theirs = their_weights(model)
    if how in ("nf4", "int8"):
        assert same(our_weights(Base.of(Pretrained(folder), form=how)), theirs)
    model.save_pretrained(tmp_path / "small")
    for path in folder.glob("*token*"):
        shutil.copy(path, tmp_path / "small")
    read = Base.of(Pretrained(tmp_path / "small"))
    assert form_of(read.model) == how.partition(",")[0]
    assert same(our_weights(read), theirs)


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_what_we_write_is_read_by_transformers(case: str, form: str, tmp_path: Path, monkeypatch) -> None:
    save(make(case, torch.bfloat16), tmp_path / "base")
    told = here(monkeypatch, tmp_path, "adapters.py", "quantize", "base", "--form", form, "--out", "small")
    assert f"base in {form}" in told
    ours = our_weights(Base.of(open_run(tmp_path / "checkpoints/small")))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints/small/model", device_map="cpu")
    assert same(ours, their_weights(model))
    assert same(ours, our_weights(Base.of(Pretrained(tmp_path / "base"), form=form)))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a tiny bf16 base, the same in nf4, and a LoRA run with QUANTIZE=nf4 on the first."""
    root = tmp_path_factory.mktemp("quantized")
    save(make("qwen2 tied", torch.bfloat16, noise=0.02), root / "base")
    (root / "letters.txt").write_text(TEXT)
    good(root, "adapters.py", "quantize", "base", "--out", "small")
    good(root, "training.py", "--use-lora", "--base", "base", "--quantize", "nf4", "--run-name", "lora", **FAST)
    return root


def test_an_adapter_of_a_quantised_base_goes_through_every_command(made: Path, monkeypatch) -> None:
    about = open_run(made / "checkpoints/lora")
    assert about.metadata["settings"]["quantize"] == "nf4"
    assert about.metadata["base"]["sha256"] == Base.of(Pretrained(made / "base")).sha256
    assert about.result["val_loss"] < about.result["base_val_loss"]
    stored = safetensors.safe_open(about.artifact / "adapter_model.safetensors", "pt").metadata()
    assert stored["base_form"] == "nf4"
    assert good(made, "generate.py", "--run", "lora", "--prompt", "the cat", "--max-new-tokens", "5")
    assert here(monkeypatch, made, "adapters.py", "check", "checkpoints/lora").startswith("checkpoints/lora: good")
    assert "o_proj" in here(monkeypatch, made, "adapters.py", "inspect", "lora")
    assert "letters" in here(monkeypatch, made, "adapters.py", "strength", "lora")
    here(monkeypatch, made, "adapters.py", "combine", "lora", "lora", "--weights", "0.5,0.5", "--out", "twice")
    assert open_run(made / "checkpoints/twice").metadata["settings"]["quantize"] == "nf4"


def test_an_adapter_is_merged_into_the_weights_that_are_asked_for(made: Path, monkeypatch) -> None:
    losses = {}
    for onto in ("dequantized", "original"):
        told = here(monkeypatch, made, "adapters.py", "merge", "lora", "--out", onto, "--onto", onto)
        assert "lora was trained on base in nf4" in told
        lines = [line.rpartition(": ") for line in told.splitlines() if line.startswith("   on the ")]
        losses = {what.strip(): float(loss) for what, _, loss in lines}
        assert losses.keys() == {
            "on the weights in nf4", "on the dequantized weights", "on the original weights"
        }  # fmt: skip
        assert open_run(made / "checkpoints" / onto).metadata["made"] | {"onto": onto, "trained_on": "nf4"}
        config = json.loads((made / "checkpoints" / onto / "model/config.json").read_bytes())
        assert "quantization_config" not in config
    assert losses["on the weights in nf4"] == pytest.approx(losses["on the dequantized weights"], rel=1e-3)
    plain, dense = (fingerprint(dict(Base.of(open_run(made / "checkpoints" / onto)).model.named_parameters()))
                    for onto in ("original", "dequantized"))  # fmt: skip
    assert plain != dense


def test_a_comparison_quantises_the_base_of_lora_only(made: Path) -> None:
    told = good(made, "compare.py", "--base", "base", "--quantize", "nf4", **FAST | {"MAX_ITERS": "2"})
    assert "full" in told and "lora" in told


def test_a_base_whose_files_are_quantised_is_adapted_as_it_is(made: Path, monkeypatch) -> None:
    told = good(made, "training.py", "--use-lora", "--base", "small", "--run-name", "on-small", **FAST)
    assert "on-small has finished" in told
    here(monkeypatch, made, "generate.py", "--run", "on-small", "--prompt", "the cat", "--max-new-tokens", "5")
    done = run(made, "adapters.py", "merge", "on-small", "--out", "gone", "--onto", "original", DATA_DIR="cache")
    assert done.returncode == 2
    assert "is stored in nf4 and has no others" in done.stderr
    here(monkeypatch, made, "adapters.py", "merge", "on-small", "--out", "merged")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"QUANTIZE": "nf4", "BASE": "base"}, "QUANTIZE=nf4 needs USE_LORA=True: weights in so few bits are frozen"),
        ({"BASE": "small"}, "the base small is stored in nf4, which cannot be trained: set USE_LORA=True"),
        ({"QUANTIZE": "int8", "BASE": "small", "USE_LORA": "True"}, "is stored in nf4, which cannot become int8"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings: dict[str, str], told: str, made: Path) -> None:
    done = run(made, "training.py", **FAST | settings)
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told in error
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr


def part(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    """Change a part of a matrix in the weights' file, or take it away."""

    def write(folder: Path) -> None:
        path = folder / "model.safetensors"
        found = safetensors.torch.load_file(path)
        key = f"model.layers.1.mlp.up_proj.weight{name}"
        value = change(found.pop(key))
        safetensors.torch.save_file(found if value is None else found | {key: value}, path, {"format": "pt"})

    return write


def config(**changes: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_bytes())
        values["quantization_config"] |= changes
        (folder / "config.json").write_text(json.dumps(values))

    return write


def replaced(old: bytes, new: bytes) -> Callable[[torch.Tensor], torch.Tensor]:
    """A change in the text that a tensor's bytes are."""
    return lambda t: torch.tensor(list(bytes(t.tolist()).replace(old, new)), dtype=torch.uint8)


STATE = ".quant_state.bitsandbytes__nf4"
TORN: dict[str, tuple[Callable[[Path], None], str]] = {
    "other method": (config(quant_method="gptq"), "quantization_config.quant_method='gptq' is not supported"),
    "fp4": (config(bnb_4bit_quant_type="fp4"), "quantization_config.bnb_4bit_quant_type='fp4' is not supported; nf4"),
    "cut": (part("", lambda t: t[:-9].clone()), "weight has 759 values in torch.uint8, not 768 in torch.uint8"),
    "no scales": (part(".absmax", lambda t: None), "weight.absmax is missing"),
    "few scales": (part(".absmax", lambda t: t[:-1].clone()), "weight.absmax has 23 values"),
    "no levels": (part(".quant_map", lambda t: t[:3].clone()), "weight.quant_map has 3 values"),
    "no state": (part(STATE, lambda t: None), "up_proj.weight is (768, 1), not (48, 32)"),
    "torn state": (part(STATE, lambda t: t[:9].clone()), "stored in nf4, is corrupted"),
    "another shape": (
        part(STATE, replaced(b"[48, 32]", b"[32, 48]")),
        "model.layers.1.mlp.up_proj.weight is (32, 48), not (48, 32)",
    ),
    "huge shape": (
        part(STATE, replaced(b"[48,", b"[1e9,")), "stored in nf4, is corrupted",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TORN)
def test_torn_parts_are_told_in_one_line(case: str, made: Path, tmp_path: Path) -> None:
    change, told = TORN[case]
    shutil.copytree(made / "checkpoints/small/model", tmp_path / "base")
    change(tmp_path / "base")
    with pytest.raises(UserError) as error:
        Base.of(Pretrained(tmp_path / "base"))
    assert told in str(error.value)
    assert "\n" not in str(error.value)
