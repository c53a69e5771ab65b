"""The commands on a pretrained base, run as processes: adapted, fine-tuned, talked to, merged, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from tiny_models import make, save

from jobs.generating.load import load
from runtime.storage.runs import open_run
from tests import warm

ROOT = Path(__file__).resolve().parents[2]
KEPT = ("PATH", "HOME", "TMPDIR", "OMP_NUM_THREADS", "XDG_CACHE_HOME")
FAST = {"MAX_ITERS": "6", "EVAL_INTERVAL": "3", "SAVE_INTERVAL": "3", "BLOCK_SIZE": "32", "BATCH_SIZE": "2"}
FAST |= {"DEVICE": "cpu", "DATASET": "letters.txt", "LEARNING_RATE": "1e-2", "DATA_DIR": "cache"}


def run(folder: Path, command: str, *words: str, typed: str = "", **settings: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key in KEPT}
    return warm.run([ROOT / command, *words], folder, environment | {"HF_HUB_OFFLINE": "1"} | settings, typed)


def good(*args: str, **settings: str) -> str:
    done = run(*args, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a tiny bf16 base in shards, a text, and two runs: lora and full."""
    root = tmp_path_factory.mktemp("pretrained")
    save(make("qwen2 tied", torch.bfloat16, noise=0.02), root / "tiny-qwen")
    (root / "tiny-qwen" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (root / "letters.txt").write_text("the cat and the dog sat on the mat\n" * 200)
    for name, use_lora in (("lora", "True"), ("full", "False")):
        told = good(root, "training.py", BASE="tiny-qwen", USE_LORA=use_lora, RUN_NAME=name, **FAST)
        assert f"✅ {name} has finished: 6 steps" in told
    return root


def test_an_adapter_is_what_peft_reads_and_carries_the_tokenizer(made: Path) -> None:
    folder = made / "checkpoints/lora/adapter"
    config = json.loads((folder / "adapter_config.json").read_bytes())
    assert config["r"] == 16
    assert config["lora_alpha"] == 32
    assert config["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert config["base_model_name_or_path"] == str((made / "tiny-qwen").resolve())
    assert (folder / "chat_template.jinja").exists()
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model, tokenizer = load(str(made / "checkpoints/lora"))
    idx = torch.tensor([tokenizer.encode("the cat sat on the mat")])
    with torch.no_grad():
        assert torch.allclose(model(idx)[0], theirs(idx).logits, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(folder)("the cat")["input_ids"] == tokenizer.encode("the cat")


def test_a_run_adapts_and_its_result_and_list_tell_of_it(made: Path) -> None:
    result = open_run(made / "checkpoints/lora").result
    assert result["val_loss"] < result["base_val_loss"]
    about = open_run(made / "checkpoints/lora").metadata
    assert about["base"]["path"] == str(made / "tiny-qwen")
    assert "finished already" in good(made, "training.py", BASE="tiny-qwen", USE_LORA="True", RUN_NAME="lora", **FAST)
    assert "lora 16" in good(made, "adapters.py", "list")
    assert good(made, "adapters.py", "check", "checkpoints/lora").startswith("checkpoints/lora: good")
    assert "o_proj" in good(made, "adapters.py", "inspect", "lora")


def test_a_fine_tuned_model_is_transformers_and_a_base_again(made: Path) -> None:
    folder = made / "checkpoints/full/model"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model, tokenizer = load(str(made / "checkpoints/full"))
    idx = torch.tensor([tokenizer.encode("the cat sat on the mat")])
    with torch.no_grad():
        assert torch.allclose(model(idx)[0], theirs(idx).logits, atol=1e-4)
    told = good(made, "training.py", BASE="full", USE_LORA="True", RUN_NAME="on-full", **FAST)
    assert "LoRA rank: 16" in told


def test_text_with_and_without_the_adapter_and_merged(made: Path) -> None:
    common = ("--max-new-tokens", "20", "--num-samples", "8", "--prompt", "the cat")
    runs = {"adapted": ("lora",), "plain": ("lora", "--adapter", "none"), "base": ("tiny-qwen",)}
    texts = {name: good(made, "generate.py", "--run", *words, *common, DTYPE="fp32") for name, words in runs.items()}
    assert texts["plain"] == texts["base"] != texts["adapted"]
    told = good(made, "adapters.py", "merge", "lora", "--out", "merged", DATA_DIR="cache")
    assert "which is what rounding the weights to bfloat16 costs" in told
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made / "checkpoints/merged/model")
    assert theirs.dtype == torch.bfloat16
    model, tokenizer = load(str(made / "checkpoints/merged"))
    idx = torch.tensor([tokenizer.encode("the cat sat on the mat")])
    with torch.no_grad():
        assert torch.allclose(model.float()(idx)[0], theirs.float()(idx).logits, atol=1e-4)
    good(made, "generate.py", "--run", "merged", *common)


def test_a_chat_and_a_stop(made: Path) -> None:
    words = ("generate.py", "--run", "lora", "--max-new-tokens", "20")
    assert len(good(made, *words, "--chat", typed="the cat\n\nthe dog\n").splitlines()) >= 2
    prompt = "the cat and the dog"
    text = good(made, *words, "--prompt", prompt).removeprefix(prompt)
    stopped = good(made, *words, "--prompt", prompt, "--stop", text[2:4]).removeprefix(prompt)
    assert stopped == text[: text.index(text[2:4])] + "\n"


def test_a_comparison_runs_without_the_text_of_the_base(made: Path) -> None:
    told = good(made, "compare.py", "--base", "tiny-qwen", **FAST | {"MAX_ITERS": "2", "EVAL_ITERS": "1"})
    assert "lora r16" in told or " r16" in told


def test_check_looks_at_a_folder_of_another_program(made: Path, tmp_path: Path) -> None:
    assert good(made, "adapters.py", "check", "tiny-qwen").startswith("tiny-qwen: good")
    shutil.copytree(made / "tiny-qwen", tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    done = run(made, "adapters.py", "check", str(tmp_path / "cut"))
    assert done.returncode == 1
    assert "is not a whole safetensors file" in done.stdout


def test_an_adapter_that_peft_trained_on_another_base_is_refused(made: Path, tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(made / "tiny-qwen")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    words = ("import", str(tmp_path / "adapter"), "--base", "tiny-qwen", "--out")
    good(made, "adapters.py", *words, "same")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace("tiny-qwen", "other-model"))
    done = run(made, "adapters.py", *words, "another")
    assert done.returncode == 1
    assert "base_model_name_or_path in its adapter_config.json is 'other-model'" in done.stderr


def config(**changes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_bytes()) | changes
        path.write_text(json.dumps({name: value for name, value in values.items() if value != "gone"}))

    return change


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def tensors(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        import safetensors.torch

        found = safetensors.torch.load_file(folder / "model.safetensors")
        change(found)
        safetensors.torch.save_file(found, folder / "model.safetensors", {"format": "pt"})

    return write


def index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    places = {"model.norm.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "architecture": (config(model_type="mamba"), "base/config.json: model_type='mamba' is not supported; gpt2, llama,"),
    "rope": (
        config(rope_scaling={"rope_type": "yarn", "factor": 2.0}, rope_parameters="gone"),
        "base/config.json: rope_type='yarn' is not supported; default, linear, llama3 are",
    ),
    "activation": (config(hidden_act="relu"), "base/config.json: hidden_act='relu' is not supported; silu is"),
    "quantised": (config(quantization_config={"a": 1}), "quantization_config.quant_method=None is not supported"),
    "softcap": (config(final_logit_softcapping=30.0), "final_logit_softcapping=30.0 is not supported"),
    "remote code": (config(auto_map={"a": "b"}), "base/config.json: auto_map={'a': 'b'} is not supported"),
    "sizes": (config(hidden_size=-1), "base/config.json: n_embd=-1: must be above 0"),
    "torn config": (lambda folder: (folder / "config.json").write_text("{"), "base/config.json is corrupted"),
    "pickle": (pickled, "base has only pytorch_model.bin, a pickle, which is never read here"),
    "no weights": (removed("model.safetensors"), "base has no model.safetensors"),
    "cut": (cut, "base/model.safetensors is not a whole safetensors file"),
    "no tokenizer": (removed("tokenizer.json"), "base has no tokenizer.json"),
    "torn tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json is no tokenizer"),
    "shard": (index, "model-00002-of-00002.safetensors is missing, which model.safetensors.index.json names"),
    "missing": (
        tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")), "model.layers.1.mlp.up_proj.weight is missing",
    ),
    "misshapen": (
        tensors(lambda t: t.update({"model.norm.weight": torch.zeros(3)})), "model.norm.weight is (3,), not (32,)",
    ),
    "integers": (
        tensors(lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)})),
        "model.norm.weight is stored as I8, which is not supported",
    ),
    "tied and different": (
        tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        "tie_word_embeddings is true, and lm_head.weight and model.embed_tokens.weight differ",
    ),
    "untied and missing": (
        config(tie_word_embeddings=False), "tie_word_embeddings is false, and there is no lm_head.weight",
    ),
    "context": (lambda folder: None, "BLOCK_SIZE=65: the base base takes at most 64 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_serve_is_refused_in_one_line(case: str, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "tiny-qwen", tmp_path / "base")
    shutil.copy(made / "letters.txt", tmp_path)
    change, told = REFUSED[case]
    change(tmp_path / "base")
    done = run(
        tmp_path,
        "training.py",
        BASE="base",
        USE_LORA="True",
        **FAST | ({"BLOCK_SIZE": "65"} if case == "context" else {}),
    )
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert told in error
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("checkpoints/*/run.json"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--run", "tiny-qwen", "--chat", "--prompt", "a"), "--chat takes its messages from the terminal"),
        (("--run", "no/such-model"), "no/such-model is not in the cache, and the hub cannot be reached"),
        (("--run", "nothing"), "there is no run 'nothing'"),
        (("--system", "Be kind."), "--system is the system prompt of a chat"),
    ],
)
def test_what_generate_refuses(words: tuple[str, ...], told: str, made: Path) -> None:
    done = run(made, "generate.py", *words)
    assert done.returncode in (1, 2)
    assert told in done.stderr
    assert "Traceback" not in done.stderr
