"""export.py --to onnx: onnxruntime computes what the run does, in other shapes, with padding, and with its cache."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import folder_of, make
from tiny_runs import GPT, LLAMA, call, lora_run, own_run

from jobs.exporting.onnx import folder, graph, int8
from jobs.exporting.onnx.tensorrt import trtexec_script
from jobs.generating.load import load
from models.generation.sampling import Sampling, generate
from tests.commands.command_line import run

onnx = pytest.importorskip("onnx", reason="make onnx-tests installs what ONNX needs")
onnxruntime = pytest.importorskip("onnxruntime", reason="make onnx-tests installs what ONNX needs")
pytest.importorskip("onnxscript", reason="make onnx-tests installs what ONNX needs")

PROMPTS = [[5, 9, 2, 7, 11, 3], [8, 4], [6]]
STEPS = 5
SMALL_LLAMA = replace(LLAMA, n_layer=1, n_kv_head=2)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with runs, which is the current one: of ours with LoRA and with DoRA, and a pretrained base."""
    root, patch = tmp_path_factory.mktemp("onnx"), pytest.MonkeyPatch()
    patch.chdir(root)
    own_run(root, "gpt", replace(GPT, n_layer=1, bias=True))
    lora_run(root, "gpt-lora", "gpt", train_embeddings=True)
    own_run(root, "llama", SMALL_LLAMA)
    lora_run(root, "llama-dora", "llama", variant="dora")
    folder_of("gpt2", root).rename("gpt2")
    folder_of("qwen3", root).rename("qwen3")
    yield root
    patch.undo()


def graph_of(path: Path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def greedy(session, kv: tuple[int, int]) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Each prompt with what onnxruntime adds to it, and the logits of each step (rows, vocabulary), padded on the left
    as optimum and transformers do. kv: heads of keys, and how wide they are."""
    rows, width = [list(prompt) for prompt in PROMPTS], max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    names = [each.name for each in session.get_inputs()[3:]]
    past, found = [torch.zeros(len(rows), kv[0], 0, kv[1]).numpy()] * len(names), []
    for _ in range(STEPS):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        read = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
        logits, *past = session.run(None, read | dict(zip(names, past, strict=True)))
        found.append(torch.from_numpy(logits[:, -1]))
        ids = found[-1].argmax(-1, keepdim=True)
        mask = torch.cat((mask, torch.ones_like(ids)), 1)
        for row, (token,) in zip(rows, ids.tolist(), strict=True):
            row.append(token)
    return rows, found


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return ((found - expected).abs().max() <= 1e-4 * expected.abs().max()).item()


@pytest.mark.parametrize("name", ["gpt-lora", "llama-dora", "qwen3"])
def test_one_graph_reads_prompts_of_any_lengths_and_what_follows(name, here, monkeypatch, capsys):
    status, out, err = call(monkeypatch, capsys, name, "--to", "onnx", "--out", f"{name}-onnx")
    assert status == 0 and "Verified on random tokens, 1 x 1, 1 x " in out and "Loss on what the run" in out, err
    session, (model, _) = graph_of(here / f"{name}-onnx/model.onnx"), load(name, ".")
    named = {each.name: each.shape for each in [*session.get_inputs(), *session.get_outputs()]}
    assert named["input_ids"] == ["batch_size", "sequence_length"]
    assert named["past_key_values.0.key"][2] == "past_sequence_length" and "present.0.value" in named
    rows, found = greedy(session, (model.config.kv_heads, model.config.head_width))
    assert rows == generate(model, PROMPTS, STEPS, Sampling(greedy=True), 0)
    for i, row in enumerate(rows):
        with torch.no_grad():
            expected = model(torch.tensor([row[:-1]]))[0][0, -STEPS:]
        assert close(torch.stack([step[i] for step in found]), expected)
    files = {path.name for path in (here / f"{name}-onnx").iterdir()}
    assert {"model.onnx", "tokenizer.json", "tokenizer_config.json", "README.md", "trtexec.sh"} <= files
    assert ("config.json" in files) == (name != "gpt-lora")
    assert ("Without config.json: a GPT2LMHeadModel has no place for head_bias=True" in out) == (name == "gpt-lora")


def test_the_tokens_are_those_of_transformers(here):
    """The graph of the test before, beside the class that made the base."""
    rows, _ = greedy(graph_of(here / "qwen3-onnx/model.onnx"), (2, 12))
    for prompt, row in zip(PROMPTS, rows, strict=True):
        theirs = make("qwen3").generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=STEPS, eos_token_id=None
        )
        assert theirs[0].tolist() == row


def test_without_a_cache_as_a_process(here, tmp_path):
    words = ("gpt2", "--to", "onnx", "--no-cache", "--out", str(tmp_path / "plain"))
    done = run(here, tmp_path, "export.py", *words, CHECKPOINTS_DIR=str(here))
    assert done.returncode == 0 and "sh " in done.stdout and "With its cache" not in done.stdout, done.stderr
    session, (model, _) = graph_of(tmp_path / "plain/model.onnx"), load("gpt2", ".")
    assert [each.name for each in session.get_inputs()] == ["input_ids"]
    for shape in ((1, 1), (4, 64), (3, 2)):
        tokens = torch.randint(96, shape)
        with torch.no_grad():
            assert close(torch.from_numpy(session.run(None, {"input_ids": tokens.numpy()})[0]), model(tokens)[0])
    script = (tmp_path / "plain/trtexec.sh").read_text()
    assert "--minShapes=input_ids:1x1 --optShapes=input_ids:1x64 --maxShapes=input_ids:16x64 " in script


def test_int8_with_weights_beside_the_graph(here, monkeypatch, capsys):
    """As for what is larger than 2 GiB; a matrix whose input has outliers stays as it is."""
    monkeypatch.setattr(graph, "IN_ONE_FILE", 0)
    monkeypatch.setattr(int8, "IN_ONE_FILE", 0)
    monkeypatch.setattr(folder, "with_outliers", lambda model, tokens: ["blocks.0.mlp.down_proj"])
    status, out, err = call(
        monkeypatch, capsys, "llama-dora", "--to", "onnx", "--out", "small", "--quantize", "int8", "--allow-loss", "1"
    )
    assert status == 0 and "In int8: " in out and "TensorRT does not read int8" in out, err
    assert "in fp32 stay blocks.0.mlp.down_proj, whose inputs have values above" in out
    assert {"model.onnx", "model.onnx.data"} <= {path.name for path in (here / "small").iterdir()}
    assert not (here / "small/trtexec.sh").exists()
    kinds = [node.op_type for node in onnx.load(here / "small/model.onnx", load_external_data=False).graph.node]
    assert kinds.count("MatMulInteger") == 4  # q, k and v as one, o_proj, gate and up as one, the head
    greedy(graph_of(here / "small/model.onnx"), (2, 8))
    refused = ("gpt", "--to", "onnx", "--out", "less", "--quantize", "int8", "--no-cache", "--allow-loss", "0")
    status, _, err = call(monkeypatch, capsys, *refused)
    assert status == 1 and "more than the run's, and up to 0 more passes; nothing was saved" in err, err
    assert not (here / "less").exists() and not list(here.glob(".tmp*"))


def test_outliers_are_found_where_they_are(here):
    model, _ = load("llama", ".")
    assert int8.with_outliers(model, torch.tensor(PROMPTS[:1])) == []
    with torch.no_grad():
        model.blocks[0].mlp.up_proj.weight[3] *= 1e4
    assert int8.with_outliers(model, torch.randint(96, (4, 32))) == ["blocks.0.mlp.down_proj"]


def test_what_is_refused_leaves_nothing(here, monkeypatch, capsys):
    (here / "there").mkdir(exist_ok=True)
    before = sorted(here.iterdir())
    for words, status, told in (
        (("gpt", "--to", "onnx", "--out", "there"), 2, "there is there already, and nothing is overwritten"),
        (
            ("gpt", "--to", "onnx", "--out", "x", "--outtype", "f16"),
            2,
            "--outtype is for --to hf and gguf, not --to onnx",
        ),
        (("gpt", "--to", "hf", "--out", "x", "--no-cache"), 2, "--no-cache is for --to onnx, not --to hf"),
        (("gpt", "--to", "gguf", "--out", "x", "--quantize", "int8"), 2, "--quantize is for --to onnx, not --to gguf"),
        (("nobody", "--to", "onnx", "--out", "x"), 2, "there is no run 'nobody'"),
    ):
        got, out, err = call(monkeypatch, capsys, *words)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (got, out, len(errors)) == (status, "", 1) and told in errors[0], (words, err)
    words = ("gpt", "--to", "onnx", "--out", "x", "--no-cache")
    with monkeypatch.context() as patch:
        patch.setattr(folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        status, _, err = call(monkeypatch, capsys, *words)
        assert status == 1 and "x: the graph takes " in err and "0.0 MB are free" in err
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        status, _, err = call(monkeypatch, capsys, *words)
        assert status == 1 and "requirements-onnx.txt" in err and "package onnxscript, which is not installed" in err
    monkeypatch.setattr(folder, "LIMIT", -1.0)
    status, _, err = call(monkeypatch, capsys, *words)
    assert status == 1 and "the logits of onnxruntime differ by" in err and "nothing was saved" in err
    assert sorted(here.iterdir()) == before


def test_the_shapes_of_a_context(here):
    words = trtexec_script("model.onnx", SMALL_LLAMA, True).decode()
    assert "--optShapes=input_ids:1x1,attention_mask:1x17,position_ids:1x1,past_key_values.0.key:1x2x16x8," in words
    assert (
        "--maxShapes=input_ids:16x32,attention_mask:16x32,position_ids:16x32,past_key_values.0.key:16x2x31x8," in words
    )
