"""The templates, run as a user runs them, do what the commands do: the same weights, the same text, the same logits."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import generate
import training
from jobs.generating.load import load
from lora.merge import merge
from runtime.processes.command import run_command
from tests.tiny import TINY

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "templates"
STEPS, SEED = 12, 5
TEXT = "".join(f"When {i} shall we three meet againe? In Thunder, Lightning, or in Raine?\n" for i in range(60))
PARTS = ("onnx", "onnxscript", "onnxruntime")
LACKING = [name for name in PARTS if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """Someone in a folder of their own: (status, stdout, stderr) of a command or a template."""
    folder, patch = tmp_path_factory.mktemp("templates"), pytest.MonkeyPatch()
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "short.txt").write_text(TEXT[:60], encoding="utf-8")
    patch.chdir(folder)

    def call(what, *flags: str) -> tuple[int, str, str]:
        patch.setattr(sys, "argv", ["it", *map(str, flags)])
        with pytest.MonkeyPatch.context() as streams:
            files = {name: open(folder / name, "w+", encoding="utf-8") for name in ("stdout", "stderr")}  # noqa: SIM115
            for name, file in files.items():
                streams.setattr(sys, name, file)
            try:
                if isinstance(what, str):
                    runpy.run_path(str(TEMPLATES / what), run_name="__main__")
                else:
                    run_command(what.main)
                status = 0
            except SystemExit as end:
                status = end.code
        for file in files.values():
            file.close()
        return status, *((folder / name).read_text("utf-8") for name in files)

    yield call
    patch.undo()


@pytest.fixture(scope="module")
def runs(user) -> dict[str, str]:
    """`base`, `mine` by the template, `theirs` by training.py with the same settings; what each printed."""
    tiny = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    plain = ("--test-mode", "--device=cpu", "--dtype=fp32", "--dataset=./text.txt", f"--max-iters={STEPS}")
    same = (f"--warmup-iters={STEPS // 5}", "--learning-rate=4e-3", f"--eval-interval={STEPS}", f"--seed={SEED}")
    text = ("--text=text.txt", f"--steps={STEPS}", f"--seed={SEED}")
    told = {
        "base": user(training, *plain, *tiny, "--run-name=base"),
        "mine": user("train_lora_template.py", "--base=base", "--out=mine", *text),
        "theirs": user(training, *plain, *same, "--use-lora", "--base=base", "--run-name=theirs"),
    }
    assert [status for status, _, _ in told.values()] == [0, 0, 0], told
    return {name: out for name, (_, out, _) in told.items()}


def tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(next(Path("checkpoints", name).glob("*/*.safetensors")))


def test_the_plain_loop_trains_the_weights_that_training_py_trains_bit_for_bit(runs):
    """In fp32 on one CPU: the same fresh A, batches, learning rates and clipping, in the same order of operations."""
    mine, theirs = tensors("mine"), tensors("theirs")
    assert mine.keys() == theirs.keys() and len(mine) > 10
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert all(mine[key].abs().max() > 0 for key in mine if "lora_B" in key)
    config = [
        json.loads(Path("checkpoints", name, "adapter/adapter_config.json").read_text())
        for name in runs
        if name != "base"
    ]
    assert config[0] == config[1]


def test_the_losses_are_those_of_training_py(runs):
    """A step's loss to the digits that are printed; that of the held-out text, as the text has fewer windows than the
    template looks at, is over the same windows."""
    lines = [json.loads(line) for line in Path("checkpoints/theirs/metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line["loss"] for line in lines if "loss" in line}
    printed = {int(step): loss for step, loss in re.findall(rf"step (\d+) of {STEPS}: loss (\S+)", runs["mine"])}
    assert printed == {step: f"{logged[step]:.4f}" for step in (1, STEPS)}
    result = json.loads(Path("checkpoints/theirs/result.json").read_text())
    before, after = map(float, re.search(r"held-out loss: (\S+) before, (\S+) after", runs["mine"]).groups())
    assert math.isclose(before, result["base_val_loss"], abs_tol=1e-4)
    assert math.isclose(after, result["val_loss"], abs_tol=1e-4) and after < before


def test_the_text_is_that_of_generate_py_with_the_adapter_and_without(user, runs):
    """30 tokens are more than the 8 positions of this base, so the window moves too."""
    for more in ((), ("--top-k=5", "--temperature=1.3")):
        flags = ("--run=mine", "--prompt=When", "--max-new-tokens=30", "--seed=3", *more)
        status, out, _ = user("inference_lora_template.py", *flags)
        wanted = [user(generate, *flags, *which, "--dtype=fp32", "--device=cpu") for which in ((), ("--adapter=none",))]
        assert status == 0 and [status for status, _, _ in wanted] == [0, 0], wanted
        assert wanted[0][1] != wanted[1][1]
        assert out == f"--- with the adapter\n{wanted[0][1]}--- without it\n{wanted[1][1]}"


@pytest.fixture(scope="module")
def merged(runs, data_dir) -> subprocess.CompletedProcess:
    if not shutil.which("sh"):
        pytest.skip("there is no sh on this machine")
    environ = {key: value for key, value in os.environ.items() if key != "CHECKPOINTS_DIR"}
    environ |= {"PYTHON": sys.executable, "DATA_DIR": str(data_dir), "PYTHONIOENCODING": "utf-8", "DEVICE": "cpu"}
    script = ["sh", str(TEMPLATES / "merge_lora_template.sh"), "mine", "merged", "When"]
    return subprocess.run(script, env=environ, capture_output=True, encoding="utf-8", timeout=120, check=False)


def test_the_script_merges_what_the_formula_says(merged):
    """Equal to `merge` of lora/merge.py bit for bit; to W + (alpha / rank) B A, written plainly, but for rounding."""
    assert merged.returncode == 0, merged.stderr
    found, base, adapter = tensors("merged"), tensors("base"), tensors("mine")
    model, _ = load("mine")
    merge(model)
    assert found.keys() == model.state_dict().keys() == base.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in model.state_dict().items())
    for key, W in base.items():
        path = f"base_model.model.{key.removesuffix('.weight')}"
        if f"{path}.lora_A.weight" in adapter:
            W = W + 16 / 8 * adapter[f"{path}.lora_B.weight"] @ adapter[f"{path}.lora_A.weight"]
        elif f"{path}.weight" in adapter:
            W = adapter[f"{path}.weight"]
        assert torch.allclose(found[key], W, rtol=0, atol=1e-6), key
    assert sum(f"base_model.model.{key.removesuffix('.weight')}.lora_A.weight" in adapter for key in base) == 7


@pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)}; pip install -r requirements-onnx.txt")
def test_the_exported_file_computes_what_the_merged_model_does_in_any_shape(user, runs):
    import onnxruntime

    status, out, err = user("export_lora_template.py", "--run=mine")
    assert status == 0 and "in four other shapes" in out, err
    assert "trtexec --onnx=checkpoints/mine.onnx --minShapes=tokens:1x1" in out
    model, _ = load("mine")
    session = onnxruntime.InferenceSession("checkpoints/mine.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", "length"]  # names, not numbers
    for shape in ((1, 1), (1, 8), (2, 3), (7, 4), (16, 8)):
        tokens = torch.randint(model.config.vocab_size, shape)
        with torch.no_grad():
            wanted = model(tokens)[0]
        (found,) = session.run(None, {"tokens": tokens.numpy()})
        assert found.shape == tuple(wanted.shape)
        assert (torch.from_numpy(found) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert user("export_lora_template.py", "--run=mine")[0].startswith("error: checkpoints/mine.onnx is there")


def test_what_cannot_be_is_one_line(user, runs, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    train = ("train_lora_template.py", "--base=base", "--text=text.txt")
    wrong = {
        (*train, "--out=mine"): "checkpoints/mine is there already",
        (*train, "--out=new", "--text=nowhere.txt"): "there is no nowhere.txt",
        (*train, "--out=new", "--text=short.txt"): "short.txt is too short",
        (*train, "--out=new", "--base=theirs"): "theirs has another architecture, or an adapter of its own",
        (*train, "--out=new", "--base=nobody"): "there is no run 'nobody'",
        ("inference_lora_template.py", "--run=base"): "base has no adapter",
        ("inference_lora_template.py", "--run=mine", "--temperature=0"): "--temperature must be above 0",
        ("inference_lora_template.py", "--run=mine", "--prompt=\u2603"): "the tokenizer has no",
        (
            "export_lora_template.py",
            "--run=mine",
            "--out=other.onnx",
        ): "onnx and onnxscript must be installed first: pip install -r requirements-onnx.txt",
    }
    for (what, *flags), told in wrong.items():
        message, _, _ = user(what, *flags)
        assert isinstance(message, str) and message.startswith("error: ") and told in message, (what, flags, message)
        assert "\n" not in message
    assert not Path("checkpoints/new").exists() and not Path("other.onnx").exists()


def test_the_table_of_the_templates_names_what_there_is():
    """In templates/README.md, code in the first column is in the template, and files and names in the second exist."""
    sections = re.split(r"^### `(.+)`$", (TEMPLATES / "README.md").read_text("utf-8"), flags=re.MULTILINE)[1:]
    tables = dict(zip(sections[::2], sections[1::2], strict=True))
    assert set(tables) == {path.name for path in TEMPLATES.iterdir() if "_lora_template." in path.name}
    for name, table in tables.items():
        source, rows = (TEMPLATES / name).read_text("utf-8"), re.findall(r"^\| (`.+?) \| (.+?) \|", table, re.MULTILINE)
        assert len(rows) >= 4, name
        for here, there in rows:
            for code in re.findall(r"`(.+?)`", here):
                assert code in source, f"{name} has no {code}"
            *names, path = re.findall(r"`(.+?)`", there)
            text = (ROOT / path).read_text("utf-8")
            assert all(each in text for each in names), f"{path} lacks one of {names}"
