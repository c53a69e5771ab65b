"""adapters.py on real runs: the walk of docs/adapters.md, and what must be refused."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from command_line import NO_TRACEBACK, PYTHON, ROOT, run

import adapters
from jobs.adapting import checkup, making
from jobs.adapting.adapted import metadata_of_made, open_adapters, publish
from jobs.runs.base import load_trained
from lora.combine import delta
from lora.peft_format import to_files
from runtime.processes.command import run_command
from runtime.storage.runs import find_run
from runtime.storage.tensors import fingerprint

DOC = (ROOT / "docs/adapters.md").read_text("utf-8")
SEVERAL = (
    "import json, os, runpy, sys\n"
    "sys.path.insert(0, sys.argv[1])\n"
    "for command, *flags in json.loads(sys.argv[2]):\n"
    "    sys.argv = [command, *flags]\n"
    "    try:\n"
    "        runpy.run_path(os.path.join(sys.path[0], command), run_name='__main__')\n"
    "    except SystemExit as end:\n"
    "        for stream in (sys.stdout, sys.stderr):\n"
    "            print(f'<end {end.code}>', file=stream, flush=True)\n"
)
ADAPT_AGAIN = "training.py --use-lora --base poet --max-iters 1 --run-name on-poet"  # after the walk, with its model
Walk = dict[str, tuple[int, str, str]]  # status, stdout and stderr of each command of the walk


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", DOC, re.S)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert all(line[0] == "python" for line in lines)
    return [line[1:] for line in lines]


@pytest.fixture(scope="module")
def walked(tmp_path_factory, data_dir) -> tuple[Path, Walk]:
    """A folder where the commands of docs/adapters.md were run, one after the other in one process, and one more."""
    folder, asked = tmp_path_factory.mktemp("walk"), [*commands(), ADAPT_AGAIN.split()]
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, str(ROOT), json.dumps(asked)],
        cwd=folder, env=os.environ | {"DATA_DIR": str(data_dir), "TEST_MODE": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True, encoding="utf-8", check=False, timeout=300,
    )  # fmt: skip
    assert NO_TRACEBACK not in done.stderr, done.stderr
    out, err = (re.split(r"<end (\d+)>\n", text) for text in (done.stdout, done.stderr))
    told = zip(asked, out[1::2], out[::2], err[::2], strict=False)
    return folder, {" ".join(words): (int(status), *texts) for words, status, *texts in told}


@pytest.fixture
def here(walked, monkeypatch, data_dir) -> Path:
    """The folder of the walk as the current one."""
    monkeypatch.chdir(walked[0])
    monkeypatch.setenv("DATA_DIR", str(data_dir))
    return walked[0]


def call(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of adapters.py in this process, which saves starting another."""
    monkeypatch.setattr(sys, "argv", ["adapters.py", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_command(adapters.main)
    out, err = capsys.readouterr()
    return end.value.code, out, err


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(128).reshape(2, 64) * 7 % 90)[0]


def logits_with(*names: str) -> torch.Tensor:
    (adapted,) = open_adapters(Path("checkpoints"), names)
    adapted.adapter.attach_to(adapted.base.model)
    return logits(adapted.base.model)


def logits_of_run(name: str) -> torch.Tensor:
    return logits(load_trained(find_run(Path("checkpoints"), name))[0])


def snapshot(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- the walk -----------------------------------------------------------------------------------------------------


def test_every_command_of_the_doc_works_in_order(walked):
    _, walk = walked
    assert list(walk) == [*(" ".join(words) for words in commands()), ADAPT_AGAIN] and len(walk) >= 15
    assert {words: told for words, told in walk.items() if told[0] != 0} == {}


def test_the_list_tells_of_every_run(walked):
    text = walked[1]["adapters.py list"][1]
    rows = {line.split()[0]: line for line in text.splitlines()}
    assert list(rows) == ["run", "base", "folio", "milton"]
    measured = r"char +\d+ +(\d\.\d{4}) +(\d\.\d{4}) +\d{4}-\d\d-\d\d$"
    assert re.search(rf"^  milton +lora 4 +standard +milton +{measured}", rows["milton"])
    loss, bits = re.search(rf"^base +base +shakespeare +{measured}", rows["base"]).groups()
    assert abs(float(loss) / math.log(2) - float(bits)) < 2e-4 and max(map(len, text.splitlines())) <= 100


def test_inspect_tells_the_size_of_each_change(walked, here):
    out = walked[1]["adapters.py inspect folio"][1]
    (folio,) = open_adapters(Path("checkpoints"), ("folio",))
    base = folio.base.tensors
    for path in folio.adapter.targets():
        B, A = delta(folio.adapter, path, base)
        norm = (B @ A).norm()
        told = re.search(rf"^{path} +8 +16 +([\d.]+) +([\d.]+) +([\d.]+)$", out, re.M)
        assert abs(float(told[1]) - norm) < 1e-3
        assert abs(float(told[2]) - norm / base[f"{path}.weight"].norm()) < 1e-4
        assert 1 <= float(told[3]) <= 8
    assert "token_embedding.weight" in out and fingerprint(base) in out and folio.adapter.sha256 in out
    assert (here / "checkpoints/folio/inspect.png").read_bytes()[1:4] == b"PNG"


def test_diff_tells_cosines_and_what_only_one_has(walked):
    out = walked[1]["adapters.py diff folio milton"][1]
    assert len(re.findall(r"_proj +[+-]0\.\d{4}$", out, re.M)) == 8
    assert len(re.findall(r" +not in milton$", out, re.M)) == 5


def test_strength_goes_from_the_base_to_the_adapter(walked, here):
    out = walked[1]["adapters.py strength folio"][1]
    rows = [line.split() for line in out.splitlines() if re.match(r" +[\d.]+ ", line)]
    assert [row[0] for row in rows] == ["0", "0.25", "0.5", "0.75", "1"]
    own = json.loads((here / "checkpoints/folio/result.json").read_bytes())
    base = json.loads((here / "checkpoints/base/result.json").read_bytes())
    assert abs(float(rows[0][1]) - own["base_val_loss"]) < 2e-3 and abs(float(rows[-1][1]) - own["val_loss"]) < 2e-3
    assert abs(float(rows[0][2]) - base["val_loss"]) < 2e-3
    assert own["base_val_loss"] > own["val_loss"] + 0.05 and float(rows[-1][1]) < float(rows[2][1]) < float(rows[0][1])
    assert (here / "checkpoints/folio/strength.png").read_bytes()[1:4] == b"PNG"


def test_a_combination_is_the_sum_of_the_changes_and_works_as_a_run(walked, here):
    one, two, both = open_adapters(Path("checkpoints"), ("folio", "milton", "both"))
    base, expected = one.base.tensors, {}
    assert both.adapter.metadata["base_sha256"] == fingerprint(base)
    for path in one.adapter.targets():
        parts = [delta(part.adapter, path, base) for part in (one, two)]
        expected[f"{path}.weight"] = base[f"{path}.weight"] + sum(0.5 * p.B @ p.A for p in parts if p).float()
    copies = [part.adapter.tensors["token_embedding"]["weight"] for part in (one, two)]
    expected["token_embedding.weight"] = 0.5 * copies[0] + 0.5 * copies[1]
    one.base.model.load_state_dict(base | expected)
    assert torch.allclose(logits(one.base.model), logits_with("both"), atol=1e-4)
    assert walked[1]["generate.py --run both --prompt O Romeo --max-new-tokens 40"][1].startswith("O Romeo")
    assert "Relative error of the change (Frobenius): 0." in walked[1][
        "adapters.py combine folio milton --method svd --rank 4 --out both-r4"
    ][1]  # fmt: skip
    card = (here / "checkpoints/both/adapter/README.md").read_text("utf-8")
    assert "0.5 x folio + 0.5 x milton, by linear" in card and "| trained on | folio, milton |" in card


def test_a_merged_run_needs_no_adapter_and_can_be_adapted_again(walked, here):
    assert torch.allclose(logits_of_run("poet"), logits_with("both"), atol=1e-4)
    assert not torch.allclose(logits_of_run("poet"), logits_of_run("base"), atol=1e-2)
    texts = [
        walked[1][f"generate.py --run {name} --prompt O Romeo --max-new-tokens 40"][1] for name in ("both", "poet")
    ]
    assert all(len(text) == 48 for text in texts)
    assert not list((here / "checkpoints/poet").glob("adapter*"))
    assert json.loads((here / "checkpoints/on-poet/run.json").read_bytes())["base"]["run"] == "poet"


def test_a_merge_that_does_not_verify_leaves_nothing(here, monkeypatch, capsys):
    monkeypatch.setattr(making, "TOLERANCE", -1.0)
    before = snapshot(here)
    status, _, err = call(monkeypatch, capsys, "merge", "folio", "--out", "wrong")
    assert status == 1 and "the logits of the merged weights differ by" in err and "nothing was saved" in err
    assert snapshot(here) == before and not list(here.glob("checkpoints/.tmp*"))


def test_peft_reads_what_was_exported_and_it_comes_back(walked, here):
    (snippet,) = re.findall(r"```python\n(.*?)```", DOC, re.S)
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(snippet, names)
    assert torch.allclose(logits(names["model"]), logits_with("both"), atol=1e-5)
    assert torch.equal(logits_with("back"), logits_with("both"))


def test_a_trained_adapter_has_a_card(here):
    card = (here / "checkpoints/milton/adapter/README.md").read_text("utf-8")
    for told in (
        "library_name: peft", "| dataset | milton |", "| rank | 4 |", "| variant | lora |",
        "| command | python training.py --use-lora --test-mode --base base --dataset milton --lora-rank 4 "
        "--lora-targets standard |", f"torch {torch.__version__}",
    ):  # fmt: skip
        assert told in card
    result = json.loads((here / "checkpoints/milton/result.json").read_bytes())
    assert re.search(rf"^\| steps? \| {result['best_step']}\b", card, re.M), card
    assert f"{result['best']:.4f}" in card
    assert "README.md" in json.loads((here / "checkpoints/milton/adapter/MANIFEST.json").read_bytes())["files"]


# --- files of others ----------------------------------------------------------------------------------------------


def test_an_adapter_that_peft_trained_comes_in_with_its_patterns(here, monkeypatch, capsys, tmp_path):
    model, _ = load_trained(find_run(Path("checkpoints"), "base"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=r".*\.(q_proj|up_proj)|lm_head", rank_pattern={"up_proj": 2},
            alpha_pattern={"lm_head": 3}, use_rslora=True, modules_to_save=["token_embedding"],
        )  # fmt: skip
        theirs = peft.get_peft_model(model, config)
        with torch.no_grad():
            for p in theirs.parameters():
                if p.requires_grad:
                    p += 0.1 * torch.randn(p.shape)
        theirs.save_pretrained(tmp_path / "theirs")
    status, out, err = call(
        monkeypatch, capsys, "import", str(tmp_path / "theirs"), "--base", "base", "--out", "theirs"
    )
    assert status == 0 and "rank 2-4 on 5 modules" in out, err
    assert torch.allclose(logits_with("theirs"), logits(theirs), atol=1e-5)
    status, _, err = call(monkeypatch, capsys, "strength", "theirs")
    assert status == 1 and "name the text with --dataset" in err
    status, out, _ = call(monkeypatch, capsys, "combine", "theirs", "folio", "--out", "mixed")
    assert status == 0 and call(monkeypatch, capsys, "inspect", "mixed")[0] == 0
    for name in ("theirs", "mixed"):
        shutil.rmtree(here / "checkpoints" / name)


def changed_tensors(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata)


def test_check_names_every_problem_at_once(here, monkeypatch, capsys, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(here / "checkpoints/folio/adapter", folder)
    key = "base_model.model.blocks.{}.attention.q_proj.lora_{}.weight"

    def spoil(tensors):
        del tensors[key.format(0, "A")]
        tensors[key.format(1, "A")][0, 0] = torch.nan
        tensors[key.format(1, "B")] = torch.zeros(3, 8)
        tensors["base_model.model.blocks.9.attention.q_proj.lora_A.weight"] = torch.zeros(8, 64)

    changed_tensors(folder, spoil)
    (folder / "README.md").write_text("another card")
    status, out, err = call(monkeypatch, capsys, "check", str(folder))
    assert status == 1 and err.strip().splitlines()[-1] == f"error: {folder}: 6 problems"
    for told in (
        "README.md is corrupted", "adapter_model.safetensors is corrupted", "blocks.0.attention.q_proj.A is missing",
        "blocks.1.attention.q_proj.A has values that are not finite", "blocks.1.attention.q_proj.B is (3, 8), not (64",
        "blocks.9.attention.q_proj.A is unexpected",
    ):  # fmt: skip
        assert told in out
    (folder / "MANIFEST.json").unlink()
    status, _, err = call(monkeypatch, capsys, "import", str(folder), "--base", "base", "--out", "x")
    assert status == 1 and err.count("; ") == 3 and not (here / "checkpoints/x").exists()
    for told in ("q_proj.A is missing", "q_proj.A is unexpected", "values that are not finite", "not (64, 8)"):
        assert told in err
    status, out, err = call(monkeypatch, capsys, "check", str(folder), "--checkpoints-dir", str(tmp_path))
    assert status == 1 and "blocks.0.attention.q_proj.A is missing" in out and "not finite" in out
    assert "has no manifest" in err and "its base is not here" in err


def test_check_of_files_models_and_runs(here, monkeypatch, capsys, tmp_path):
    for good in ("base", "folio", "checkpoints/poet/model", "checkpoints/folio/adapter/adapter_model.safetensors"):
        status, out, err = call(monkeypatch, capsys, "check", good)
        assert status == 0 and f"{good}: good" in out and "tensors" in out, (out, err)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/adapter_model.bin").write_bytes(b"")
    status, out, _ = call(monkeypatch, capsys, "check", str(tmp_path / "pickled"))
    assert status == 1 and "adapter_model.bin is a pickle, which is never read here" in out
    lone = tmp_path / "lone.safetensors"
    safetensors.torch.save_file({"a": torch.tensor([1.0, torch.inf])}, lone)
    assert "a has values that are not finite" in call(monkeypatch, capsys, "check", str(lone))[1]
    lone.write_bytes(lone.read_bytes()[:20])
    assert "is not a whole safetensors file" in call(monkeypatch, capsys, "check", str(lone))[1]
    shutil.copytree(here / "checkpoints/base", tmp_path / "base")
    weights = tmp_path / "base/model/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    (tmp_path / "base/model/tokenizer.json").unlink()
    status, out, _ = call(monkeypatch, capsys, "check", str(tmp_path / "base"))
    assert status == 1 and "tokenizer.json is missing" in out and "model.safetensors is corrupted" in out
    assert checkup.corrupted_files(tmp_path / "base/model")[0].endswith("tokenizer.json is missing")


# --- what is refused ----------------------------------------------------------------------------------------------


def rewritten(here: Path, name: str, **changes) -> None:
    """A LoRA run like folio, with other metadata in its adapter's file or another base in run.json."""
    (source,) = open_adapters(Path("checkpoints"), ("folio",))
    adapter = replace(source.adapter, metadata=source.adapter.metadata | changes.get("metadata", {}))
    about = metadata_of_made(here / "checkpoints", "lora", source.base, adapter, [], {"how": "test"})
    if "base" in changes:
        about["base"] = {"run": changes["base"], "sha256": "e" * 64}
    publish(here / "checkpoints" / name, about, to_files(adapter), {})


REFUSED = [
    (("inspect", "nobody"), 2, "there is no adapter 'nobody' in checkpoints; adapters there: "),
    (("inspect", "nobody"), 2, "adapters.py list"),
    (("inspect", "miltn"), 2, "did you mean milton?"),
    (("inspect", "base"), 2, "base is no LoRA run; adapters there: "),
    (("inspect", "../folio"), 2, "NAME=../folio (argument): must be a run's name, not a path"),
    (("inspect", "/etc"), 2, "must be a run's name, not a path"),
    (("inspect", "a\nb"), 2, "must be a run's name, not a path"),
    (("inspect",), 2, "the following arguments are required: NAME"),
    (("inspect", "folio", "milton"), 2, "milton is one argument too many"),
    (("inspect", "folio", "--out", "both-for-peft"), 2, "both-for-peft is there already, and nothing is overwritten"),
    (("merge", "folio"), 2, "the following arguments are required: --out"),
    (("merge", "folio", "--out", "../x"), 2, "--out ../x (flag): must be a run's name"),
    (("merge", "folio", "--out", "base"), 2, "is there already, and nothing is overwritten"),
    (("merge", "foreign", "--out", "x"), 1,
     "no adapter for base: foreign: its tokenizer is eeeeeeeeeeee, and that of base is"),
    (("merge", "foreign", "--out", "x"), 1, "foreign: it was trained on base with weights ffffffffffff, not"),
    (("combine", "folio", "milton", "--out", "both"), 2, "is there already"),
    (("combine", "folio", "../milton", "--out", "x"), 2, "not a path"),
    (("combine", "folio", "milton", "--weights", "1", "--out", "x"), 2, "1 for 2 adapters; one for each is needed"),
    (("combine", "folio", "milton", "--weights", "1,-x", "--out", "x"), 2, "must be numbers with commas between them"),
    (("combine", "folio", "milton", "--method", "ties", "--out", "x"), 2, "must be one of linear, cat, svd"),
    (("combine", "folio", "milton", "--method", "svd", "--out", "x"), 2, "--method svd needs --rank"),
    (("combine", "folio", "milton", "--rank", "3", "--out", "x"), 2, "--method linear takes no --rank"),
    (("combine", "folio", "milton", "--method", "svd", "--rank", "13", "--out", "x"), 2,
     "rank=13 is above 12, the rank of this combination"),
    (("combine", "folio", "elsewhere", "--out", "x"), 1, "adapters of 2 bases do not go together: folio of base, else"),
    (("strength", "folio", "--strengths", "0,,1"), 2, "must be numbers with commas between them"),
    (("strength", "folio", "--dataset", "shakespear"), 2, "shakespeare"),
    (("import", "nowhere", "--base", "base", "--out", "x"), 2, "nowhere: there is no such file or folder"),
    (("import", "checkpoints", "--base", "base", "--out", "x"), 1, "this is not an adapter folder"),
    (("import", "both-for-peft", "--base", "folio", "--out", "x"), 2, "folio is a LoRA run; name the base it was"),
    (("import", "both-for-peft", "--base", "poet", "--out", "x"), 1, "it was trained on base with weights"),
    (("export", "both", "--out", "folder"), 2, "export.py NAME --to peft --out FOLDER"),
    (("check", "nowhere"), 2, "nowhere: there is no such file, and no such run in checkpoints"),
    (("check", "checkpoints"), 1, "checkpoints is no run, adapter or model"),
    (("mrge", "folio"), 2, "there is no command 'mrge'; did you mean merge?"),
    ((), 2, "There are: list, inspect, diff, strength, merge, quantize, combine, check, import, remove"),
]  # fmt: skip


def test_bad_input_is_one_line_and_nothing_is_written(here, monkeypatch, capsys):
    rewritten(here, "foreign", metadata={"base_sha256": "f" * 64, "tokenizer_sha256": "e" * 64})
    rewritten(here, "elsewhere", base="poet")
    before = snapshot(here)
    for words, status, told in REFUSED:
        got, out, err = call(monkeypatch, capsys, *words)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (got, len(errors), out) == (status, 1, "") and told in errors[0], (words, got, out, err)
    assert snapshot(here) == before and not list(here.glob("checkpoints/.tmp*"))
    for name in ("foreign", "elsewhere"):
        shutil.rmtree(here / "checkpoints" / name)


def test_a_flipped_bit_and_a_torn_file_are_refused_by_every_command(here, monkeypatch, capsys):
    shutil.copytree(here / "checkpoints/milton", here / "checkpoints/torn")
    path = here / "checkpoints/torn/adapter/adapter_model.safetensors"
    whole = path.read_bytes()
    for data in (whole[:-40] + bytes([whole[-40] ^ 4]) + whole[-39:], whole[:-1], whole[:7], b""):
        path.write_bytes(data)
        for words in (
            ("inspect", "torn"), ("diff", "folio", "torn"), ("merge", "torn", "--out", "x"), ("strength", "torn"),
            ("combine", "folio", "torn", "--out", "x"), ("check", "torn"),
        ):  # fmt: skip
            status, out, err = call(monkeypatch, capsys, *words)
            assert status == 1 and "adapter_model.safetensors" in out + err and "corrupted" in out + err, (words, err)
    status, out, _ = call(monkeypatch, capsys, "list")
    assert status == 0 and "adapter_model.safetensors is corrupted" in out and "folio" in out
    assert not (here / "checkpoints/x").exists() and not (here / "x").exists()
    shutil.rmtree(here / "checkpoints/torn")


def test_pictures_take_the_next_free_name_and_need_an_extra(here, monkeypatch, capsys, tmp_path):
    before = snapshot(here / "checkpoints/folio")
    status, out, _ = call(monkeypatch, capsys, "inspect", "folio")
    assert status == 0 and f"Picture: {Path('checkpoints/folio/inspect-2.png')}" in out
    (here / "checkpoints/folio/inspect-2.png").unlink()
    assert call(monkeypatch, capsys, "inspect", "folio", "--out", str(tmp_path / "a.png"))[0] == 0
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib" or name == "jobs.adapting.plots"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delattr("jobs.adapting.plots", raising=False)
    status, out, err = call(monkeypatch, capsys, "inspect", "folio")
    assert status == 0 and f"-m pip install -r {ROOT}/requirements-plots.txt" in err and "Picture" not in out
    assert snapshot(here / "checkpoints/folio") == before


def test_it_runs_from_anywhere_as_a_process(tmp_path, data_dir):
    done = run(tmp_path, data_dir, "adapters.py", "list")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: there is no run in checkpoints yet; train one with: {PYTHON}training.py\n"
