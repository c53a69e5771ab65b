"""export.py --to gguf-lora: llama.cpp puts the file on its base and must compute what the run does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import folder_of
from tiny_runs import GPT, LLAMA, ROTARY, call, lora_run, own_run

from data.chat import GUIDE
from data.tokenizers import build_tokenizer
from jobs.exporting.gguf import adapter as gguf_adapter
from jobs.exporting.gguf import llama_server
from jobs.exporting.gguf.layout import Layout
from jobs.generating.load import load

gguf = pytest.importorskip("gguf")
needs_llama_cpp = pytest.mark.skipif(
    not llama_server.installed(), reason="llama.cpp with adapters is not here: pip install xllamacpp"
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


PATTERNS = {"rank_pattern": {"o_proj": 2, "up_proj": 12}, "alpha_pattern": {"q_proj": 3}}


@needs_llama_cpp
@pytest.mark.parametrize(
    ("case", "config"),
    [
        ("own", {"variant": "rslora", "targets": "q_proj,k_proj,down_proj,lm_head"}),
        ("llama biases, own head_dim", PATTERNS),
        ("qwen2 tied", {}),
        ("own gpt", PATTERNS | {"targets": "q_proj,v_proj,o_proj"}),
        ("own gpt-rotary", PATTERNS),
        ("gpt2", {}),
    ],
)
def test_llama_cpp_computes_what_base_and_adapter_do(case, config, here, monkeypatch, capsys):
    own = {"own": LLAMA, "own gpt": GPT, "own gpt-rotary": ROTARY}
    own_run(here, "base", own[case]) if case in own else folder_of(case, here)
    lora_run(here, "adapted", "base", **config)
    status, out, err = call(monkeypatch, capsys, "adapted", "--to", "gguf-lora", "--out", "it.gguf")
    assert status == 0 and "logits of llama.cpp with its base and --lora differ by" in out, err
    assert "base --to gguf --out base.gguf" in out
    assert "\nllama-server -m base.gguf --lora it.gguf\n" in out
    assert (here / "it.Modelfile").read_text().startswith("FROM ./base.gguf\nADAPTER ./it.gguf\nPARAMETER num_ctx ")
    assert call(monkeypatch, capsys, "base", "--to", "gguf", "--out", "base.gguf", "--outtype", "f32")[0] == 0
    ids, letter = torch.arange(24)[None] * 7 % 90, load("base", ".")[1].encode_inside("a")[0]
    with torch.no_grad():
        with_it, without = (load(name, ".")[0].float()(ids)[0][:, -1].log_softmax(-1) for name in ("adapted", "base"))
    found = llama_server.LlamaServer(here / "base.gguf", here / "it.gguf", 32, letter).last_logprobs(ids)
    assert (found - with_it).abs().max() < (1e-2 if "gpt" in case else 1e-3) < 0.1 < (with_it - without).abs().max()


@needs_llama_cpp
def test_what_does_not_verify_leaves_nothing(here, monkeypatch, capsys):
    own_run(here, "base", LLAMA)
    lora_run(here, "adapted", "base")
    monkeypatch.setattr(Layout, "rows", lambda self, path, W: W.flip(0) if "q_proj" in path and W.shape[1] == 8 else W)
    status, out, err = call(monkeypatch, capsys, "adapted", "--to", "gguf-lora", "--out", "it.gguf")
    assert (status, out) == (1, "") and "the logits of llama.cpp with its base and --lora differ by" in err
    assert sorted(path.name for path in here.iterdir()) == ["adapted", "base"]


def test_what_is_in_the_file_and_beside_it(here, monkeypatch, capsys):
    monkeypatch.setattr(gguf_adapter, "installed", lambda: False)
    own_run(here, "base", LLAMA)
    lora_run(here, "tuned", "base", template=GUIDE, **PATTERNS)
    status, out, err = call(monkeypatch, capsys, "tuned", "--to", "gguf-lora", "--out", "it.gguf")
    assert status == 0 and "llama.cpp was not asked: pip install xllamacpp" in out, err
    assert "llama-server -m base.gguf --lora it.gguf --jinja --chat-template-file it.jinja" in out
    assert (here / "it.jinja").read_text().endswith(GUIDE)
    read = gguf.GGUFReader(here / "it.gguf")
    said = {name: read.fields[name].contents() for name in ("general.type", "adapter.type", "adapter.lora.alpha")}
    assert said == {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 16.0}
    shapes = {tensor.name: tensor.data.shape for tensor in read.tensors}
    assert shapes["blk.1.ffn_up.weight.lora_a"] == (12, 32) and shapes["blk.1.ffn_up.weight.lora_b"] == (64, 12)


def test_what_is_refused(here, monkeypatch, capsys):
    own_run(here, "base", LLAMA)
    own_run(here, "chars", LLAMA, build_tokenizer("char", "abc\n", 0))
    lora_run(here, "on-chars", "chars")
    lora_run(here, "dora", "base", variant="dora")
    lora_run(here, "embedded", "base", train_embeddings=True)
    (here / "there.jinja").touch()
    before = sorted(here.iterdir())
    for words, status, told in (
        (("base", "--out", "x.gguf"), 2, "base has no adapter; --to gguf exports the whole model"),
        (("dora", "--out", "x.gguf"), 1, "LORA_VARIANT=dora changes more than llama.cpp reads"),
        (("embedded", "--out", "x.gguf"), 1, "of its own, which llama.cpp does not read; train with LORA_TRAIN_EMBED"),
        (("on-chars", "--out", "x.gguf"), 1, "no token that ends a text"),
        (("dora", "--out", "x.gguf", "--outtype", "f16"), 2, "--outtype is for --to hf and gguf, not --to gguf-lora"),
        (("dora", "--out", "there.gguf"), 2, "there.jinja is there already"),
    ):
        got, out, err = call(monkeypatch, capsys, *words, "--to", "gguf-lora")
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (got, out, len(errors)) == (status, "", 1) and told in errors[0], (words, err)
    assert sorted(here.iterdir()) == before
    status, out, err = call(monkeypatch, capsys, "on-chars", "--to", "gguf-lora", "--out", "x.gguf", "--no-tokenizer")
    assert status == 0 and "takes no base without a tokenizer" in out and not (here / "x.Modelfile").exists(), err
