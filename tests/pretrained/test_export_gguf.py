"""export.py --to gguf: the file is loaded by llama.cpp itself, which must compute and cut texts as the run does."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import jinja2
import pytest
import torch
import transformers
from tiny_models import folder_of, make
from tiny_runs import GPT, LLAMA, ROTARY, TEXT, call, lora_run, own_run

from data.chat import GUIDE, Template
from data.tokenizers import END, build_tokenizer
from jobs.exporting.gguf import file as gguf_file
from jobs.exporting.gguf import llama_cpp
from jobs.exporting.gguf.llama_cpp import LlamaCpp
from jobs.generating.load import load

gguf = pytest.importorskip("gguf")
IDS = torch.arange(48).reshape(2, 24) * 7 % 90
needs_llama_cpp = pytest.mark.skipif(not llama_cpp.installed(), reason="llama.cpp is not here: pip install cyllama")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def ours(name: str) -> torch.Tensor:
    model, _ = load(name, ".")
    with torch.no_grad():
        return model.float()(IDS)[0]


GELUS = (
    "gpt2 untied", "gpt2 exact gelu, own width", "starcoder2", "starcoder2 exact gelu, no biases, untied",
)  # fmt: skip
CASES = ("llama", "llama tied, llama3 rope", "llama linear rope", "llama biases, own head_dim", "mistral", "qwen2 tied")


@needs_llama_cpp
@pytest.mark.parametrize("case", [*CASES, "qwen3", *GELUS])
def test_llama_cpp_computes_what_transformers_does(case, here, monkeypatch, capsys):
    folder_of(case, here)
    status, out, err = call(monkeypatch, capsys, "base", "--to", "gguf", "--out", "it.gguf", "--outtype", "f32")
    assert status == 0 and "the logits of llama.cpp differ by" in out and "llama.cpp's tokens are the run's" in out, err
    with torch.no_grad():
        found = off(LlamaCpp(here / "it.gguf", 64).logits(IDS), make(case)(IDS).logits)
    gelu = case in GELUS
    assert found <= (2e-3 if gelu else 1e-4) and ("the tanh form of GELU" in out) == gelu
    assert (here / "it.Modelfile").read_text().startswith("FROM ./it.gguf\nPARAMETER num_ctx 64\n")


@needs_llama_cpp
@pytest.mark.parametrize(
    ("kind", "limit", "config"),
    [("f32", 1e-4, LLAMA), ("f16", 2e-2, LLAMA), ("bf16", 2e-2, LLAMA), ("q8_0", 5e-2, LLAMA), ("f16", 3e-3, GPT)]
    + [("f32", 3e-3, ROTARY)],
)
def test_a_run_of_ours_with_its_adapter_and_tokenizer(kind, limit, config, here, monkeypatch, capsys):
    own_run(here, "own", config)
    lora_run(here, "adapted", "own")
    status, out, err = call(monkeypatch, capsys, "adapted", "--to", "gguf", "--out", "it.gguf", "--outtype", kind)
    assert status == 0 and ("logits of llama.cpp differ" in out) == (kind != "q8_0"), err
    assert "Loss on what the run itself would write" in out and "in llama.cpp" in out
    asked, (_, tokenizer) = LlamaCpp(here / "it.gguf", 32), load("own", ".")
    found, expected = asked.logits(IDS), ours("adapted")
    assert off(found, expected) <= limit < off(ours("own"), expected)
    assert kind != "f32" or torch.equal(found.argmax(-1), expected.argmax(-1))
    assert asked.encode(TEXT[:400]) == tokenizer.encode(TEXT[:400])
    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(here / "it.gguf").tensors}
    assert types["blk.0.attn_output.weight"] == kind and types["output_norm.weight"] == "f32"


@needs_llama_cpp
def test_fewer_bits_and_what_they_may_cost(here, monkeypatch, capsys):
    own_run(here, "own", LLAMA)
    for kind in ("q5_1", "q5_0", "q4_1", "q4_0", "q6_k", "q5_k_m", "q4_k_m"):
        words = ("own", "--to", "gguf", "--outtype", kind, "--out", f"{kind}.gguf")
        status, out, err = call(monkeypatch, capsys, *words, "--allow-loss", "1")
        assert status == 0 and "llama.cpp's tokens are the run's" in out, err
        found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(here / f"{kind}.gguf").tensors}
        assert found["blk.0.attn_output.weight"] == {"q6_k": "Q8_0", "q5_k_m": "Q5_1", "q4_k_m": "Q5_0"}.get(
            kind,
            kind.upper(),  # rows of 32 are too short for llama.cpp's kinds with a k, and it takes the next
        )
        assert found["token_embd.weight"] in ("Q8_0", "Q5_1", "Q5_0") and found["output_norm.weight"] == "F32"
    status, out, err = call(monkeypatch, capsys, *words[:-1], "x.gguf", "--allow-loss", "0")
    assert status == 1 and "nothing was saved" in err and not list(here.glob("*x.gguf*"))
    monkeypatch.setattr(gguf_file, "installed", lambda: False)
    status, out, err = call(monkeypatch, capsys, *words[:-1], "x.gguf")
    assert status == 1 and "--outtype q4_k_m is made by llama.cpp itself: pip install cyllama" in err


def test_the_chat_template_and_the_tokens_are_in_the_file(here, monkeypatch, capsys):
    folder_of("llama", here)
    (here / "base/chat_template.jinja").write_text("{{ messages[0].content }}")
    assert call(monkeypatch, capsys, "base", "--to", "gguf", "--out", "it.gguf")[0] == 0
    fields = gguf.GGUFReader(here / "it.gguf").fields
    found = {name: field.contents() for name, field in fields.items()}
    assert found["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert found["tokenizer.ggml.tokens"][:3] == ["<unk>", "<s>", "</s>"] and found["tokenizer.ggml.add_bos_token"]
    assert "TEMPLATE" not in (here / "it.Modelfile").read_text()


def test_a_chat_begins_as_in_training_where_nothing_stands_in_front(here, monkeypatch, capsys):
    own_run(here, "own", LLAMA)
    lora_run(here, "tuned", "own", template=GUIDE)
    chat = [{"role": "user", "content": "Who?"}]
    _, tokenizer = load("own", ".")
    wanted = Template.of(GUIDE, tokenizer).write(chat, reply=True)
    assert call(monkeypatch, capsys, "tuned", "--to", "gguf", "--out", "it.gguf")[0] == 0
    source = gguf.GGUFReader(here / "it.gguf").fields["tokenizer.chat_template"].contents()
    about = {"messages": chat, "add_generation_prompt": True, "bos_token": END, "eos_token": END}
    assert jinja2.Template(source).render(**about) == wanted
    assert call(monkeypatch, capsys, "tuned", "--to", "hf", "--out", "folder")[0] == 0
    theirs = transformers.AutoTokenizer.from_pretrained("folder")
    assert theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == wanted


def test_q8_0_keeps_short_rows_in_f16(here, monkeypatch, capsys):
    folder_of("llama", here)
    out = call(monkeypatch, capsys, "base", "--to", "gguf", "--out", "it.gguf", "--outtype", "q8_0")[1]
    assert "In f16 instead, as q8_0 takes rows of 32 values: blk.0.ffn_down.weight, blk.1.ffn_down.weight" in out


def test_without_a_binding_that_is_said(here, monkeypatch, capsys):
    own_run(here, "chars", LLAMA, build_tokenizer("char", TEXT, 0))
    monkeypatch.setattr(gguf_file, "installed", lambda: False)
    status, out, err = call(monkeypatch, capsys, "chars", "--to", "gguf", "--out", "it.gguf", "--no-tokenizer")
    assert status == 0 and "llama.cpp was not asked" in out and "tensors are as they were written" in out, err
    assert not (here / "it.Modelfile").exists()


def test_what_is_refused(here, monkeypatch, capsys):
    own_run(here, "chars", LLAMA, build_tokenizer("char", TEXT, 0))
    own_run(here, "gpt", replace(GPT, bias=True))
    folder_of("qwen3 biases", here).rename("biased")
    folder_of("llama", here).rename("words")
    path = here / "words/tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": {"type": "Whitespace"}}))
    (here / "there.Modelfile").touch()
    before = sorted(here.iterdir())
    for words, status, told in (
        (("chars", "--out", "x.gguf"), 1, "no token that ends a text, and llama.cpp would take an ordinary one for it"),
        (("gpt", "--out", "x.gguf"), 1, "a GPT2LMHeadModel has no place for head_bias=True"),
        (("biased", "--out", "x.gguf"), 1, "llama.cpp's qwen3 has no biases in attention"),
        (("words", "--out", "x.gguf"), 1, "its tokenizer (BPE, Whitespace) is none that this knows llama.cpp's name"),
        (("chars", "--out", "x"), 2, "the name of a GGUF file ends in .gguf"),
        (("chars", "--out", "there.gguf"), 2, "there.Modelfile is there already"),
        (
            ("chars", "--out", "x.gguf", "--outtype", "q4"),
            2,
            "must be one of f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, q6_k, q5_k_m,",
        ),
    ):
        got, out, err = call(monkeypatch, capsys, *words, "--to", "gguf")
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (got, out, len(errors)) == (status, "", 1) and told in errors[0], (words, err)
    assert sorted(here.iterdir()) == before


def test_a_file_that_is_not_what_was_written_is_refused(here, monkeypatch, capsys):
    folder_of("llama", here)
    write = gguf_file.write

    def write_and_flip(path, *args):
        write(path, *args)
        data = bytearray(path.read_bytes())
        data[-40] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(gguf_file, "write", write_and_flip)
    status, _, err = call(monkeypatch, capsys, "base", "--to", "gguf", "--out", "it.gguf")
    assert status == 1 and "is not in the file as it was written; nothing was saved" in err
    monkeypatch.setattr(gguf_file, "write", write)
    monkeypatch.setitem(sys.modules, "gguf", None)
    status, _, err = call(monkeypatch, capsys, "base", "--to", "gguf", "--out", "it.gguf")
    assert status == 1 and "requirements-export.txt" in err and "package gguf, which is not installed" in err
    assert [path.name for path in here.iterdir()] == ["base"]
