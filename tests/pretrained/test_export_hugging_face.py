"""export.py --to hf: what transformers computes of a folder is what the run does, and what cannot be is refused."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import folder_of
from tiny_runs import GPT, LLAMA, ROTARY, TEXT, call, lora_run, own_run

from data.tokenizers import build_tokenizer
from jobs.exporting.hugging_face import folder as hf_folder
from jobs.generating.load import load

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "runs"
IDS = torch.arange(48).reshape(2, 24) * 7 % 90
TEXTS = ("Enter Hamlet, and the cat sat on the mat: 'tis 1623.\n\n  And so.", "a\n", " ")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def theirs(folder: str) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS).logits


def ours(name: str) -> torch.Tensor:
    model, _ = load(name, ".")
    with torch.no_grad():
        return model.float()(IDS)[0]


@pytest.mark.parametrize("case", ["gpt2", "llama biases, own head_dim", "qwen3", "mistral"])
def test_base_and_adapter_are_one_folder(case, here, monkeypatch, capsys):
    folder_of(case, here)
    lora_run(here, "adapted", "base", rank_pattern={"o_proj": 2})
    status, out, err = call(monkeypatch, capsys, "adapted", "--to", "hf", "--out", "folder")
    assert status == 0 and "the logits of transformers differ by" in out and "tokenizer encodes as" in out, err
    assert (theirs("folder") - ours("adapted")).abs().max() <= 1e-5 * ours("adapted").abs().max()
    assert (ours("base") - ours("adapted")).abs().max() > 0.1
    assert "| base | base |" in (here / "folder/README.md").read_text() and not list(here.glob(".tmp*"))


def test_weights_in_16_bits_stay_so(here, monkeypatch, capsys):
    folder_of("qwen2 tied", here, torch.bfloat16)
    lora_run(here, "adapted", "base")
    (here / "base/chat_template.jinja").write_text("{{ messages[0].content }}")
    for name, limit in (("base", "1e-05"), ("adapted", "0.02")):
        status, out, err = call(monkeypatch, capsys, name, "--to", "hf", "--out", f"{name}-out")
        assert status == 0 and f"(up to {limit} passes)" in out, err
        assert transformers.AutoModelForCausalLM.from_pretrained(f"{name}-out").dtype == torch.bfloat16
        assert (here / f"{name}-out/chat_template.jinja").read_text() == "{{ messages[0].content }}"
    status, out, err = call(monkeypatch, capsys, "adapted", "--to", "hf", "--out", "wide", "--outtype", "f32")
    assert status == 0 and "(up to 1e-05 passes)" in out, err
    assert transformers.AutoModelForCausalLM.from_pretrained("wide").dtype == torch.float32


OWN = {
    "gpt": (GPT, "bpe", "GPT2LMHeadModel"),
    "gpt of characters": (replace(GPT, bias=True, head_bias=False, n_inner=40), "char", "GPT2LMHeadModel"),
    "gpt-rotary": (ROTARY, "bpe", "Starcoder2ForCausalLM"),
    "gpt-rotary, biases": (replace(ROTARY, bias=True, head_bias=False), "char", "Starcoder2ForCausalLM"),
    "llama": (replace(LLAMA, bias=True, head_bias=False), "bpe", "LlamaForCausalLM"),
    "llama of characters": (replace(LLAMA, n_kv_head=2, norm_eps=1e-3), "char", "LlamaForCausalLM"),
}


@pytest.mark.parametrize("name", OWN)
def test_models_of_ours_are_theirs_and_bases_here(name, here, monkeypatch, capsys):
    config, kind, theirs_is = OWN[name]
    run = own_run(here, "own", config, build_tokenizer(kind, TEXT, 300))
    if kind == "bpe":
        lora_run(here, "own-adapted", "own", train_embeddings=True)
        run = Path("own-adapted")
    status, out, err = call(monkeypatch, capsys, run.name, "--to", "hf", "--out", "folder")
    assert status == 0, err
    assert json.loads((here / "folder/config.json").read_bytes())["architectures"] == [theirs_is]
    assert (theirs("folder") - ours(run.name)).abs().max() <= 1e-5 * ours(run.name).abs().max()
    assert torch.allclose(ours("folder"), ours(run.name), atol=1e-4)
    read, (_, tokenizer) = transformers.AutoTokenizer.from_pretrained("folder"), load("own", ".")
    for text in TEXTS:
        assert read(text)["input_ids"] == tokenizer.encode(text) and read.decode(tokenizer.encode(text)) == text


def test_a_base_in_8_bits_is_written_dense(here, monkeypatch, capsys):
    pytest.importorskip("bitsandbytes")
    from jobs.adapting.making import quantize_run
    from jobs.runs.base import Base
    from models.pretrained.source import find_source

    folder_of("llama", here)
    quantize_run(Base.of(find_source(here, "base"), form="int8"), here / "small")
    status, _, err = call(monkeypatch, capsys, "small", "--to", "hf", "--out", "folder")
    assert status == 0 and "quantization_config" not in (here / "folder/config.json").read_text(), err
    assert torch.allclose(theirs("folder"), ours("small"), atol=1e-4)


def test_what_is_refused(here, monkeypatch, capsys):
    own_run(here, "own", replace(GPT, bias=True))
    own_run(here, "other", replace(GPT, qk_norm=True))
    shutil.copytree(FIXTURES / "stopped-base", here / "stopped-base")
    (here / "there").mkdir()
    for words, status, told in (
        (("own", "--out", "x"), 1, "a GPT2LMHeadModel has no place for head_bias=True"),
        (("other", "--out", "x"), 1, "a GPT2LMHeadModel has no place for qk_norm=True"),
        (("stopped-base", "--out", "x"), 1, "stopped-base has not finished training"),
        (("own", "--out", "there"), 2, "there is there already, and nothing is overwritten"),
        (("nobody", "--out", "x"), 2, "there is no run 'nobody'"),
        (("own", "--out", "x", "--outtype", "q8_0"), 2, "--outtype q8_0 is for --to gguf, not --to hf"),
        (("own",), 2, "where to? --out PATH writes it there, and --push USER/NAME to the Hugging Face hub"),
    ):
        got, out, err = call(monkeypatch, capsys, *words, "--to", "hf")
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (got, out, len(errors)) == (status, "", 1) and told in errors[0], (words, err)
    assert not (here / "x").exists() and not list(here.glob(".tmp*")) and not list((here / "there").iterdir())


def test_what_does_not_verify_leaves_nothing(here, monkeypatch, capsys):
    own_run(here, "own", GPT)
    monkeypatch.setattr(hf_folder, "LIMITS", {False: -1.0, True: -1.0})
    for words, fix in (((), False), (("--outtype", "f16"), True)):
        status, _, err = call(monkeypatch, capsys, "own", "--to", "hf", "--out", "x", *words)
        assert status == 1 and "the logits of transformers differ by" in err and "nothing was saved" in err
        assert ("--outtype f32 writes all" in err) == fix
    assert sorted(path.name for path in here.iterdir()) == ["own"]


def test_without_transformers_the_line_that_installs_it(here, monkeypatch, capsys):
    own_run(here, "own", GPT)
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, _, err = call(monkeypatch, capsys, "own", "--to", "hf", "--out", "x")
    assert status == 1 and "requirements-export.txt" in err and "transformers, which is not installed" in err
