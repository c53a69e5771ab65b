"""Which run counts as the same one, and which base a run takes and finds again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import jobs.runs.base
import lora.adapter
from jobs.adapting.adapted import open_adapters
from jobs.comparing.comparison import make_method
from jobs.generating.choice import choose
from jobs.runs.base import find_base
from jobs.runs.job import identity
from jobs.training import train as training
from runtime.device import pick_machine
from runtime.errors import UsageError, UserError
from runtime.settings.config import Settings
from runtime.settings.sources import Resolved
from runtime.storage import folders
from runtime.storage.encoding import to_sealed_json
from runtime.storage.runs import Run, open_run
from tests.commands.command_line import run
from tests.tiny import TINY

FAST = {"test_mode": True, "device": "cpu", "dtype": "fp32", "batch_size": 4, "eval_iters": 2, "max_iters": 4}
TEXT = "To be, or not to be, that is the question.\n"
FIXTURES = Path(__file__).resolve().parent.parent / "fixtures/runs"


def train(**changes) -> Run:
    return training.train(Resolved(Settings.from_dict(FAST | {"dataset": "b.txt"} | changes), {}))


def adapt(**changes) -> Run:
    return train(**{"use_lora": True, "base": "base", "lora_rank": 2} | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with two texts, `base` and an adapter of it, `lora-b-r2`."""
    folder = tmp_path_factory.mktemp("bases")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("b.txt").write_text(TEXT * 50)
        Path("c.txt").write_text(TEXT.upper() * 50)
        train(run_name="base", dataset="b.txt", **TINY)
        assert adapt().name == "test-lora-b-r2"
    return folder


@pytest.fixture
def root(trained: Path, tmp_path: Path, monkeypatch) -> Path:
    """The folder of runs in a copy of it, which is the current folder."""
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "here"))
    return Path("checkpoints")


def changed(folder: Path, **about) -> None:
    """Let a run.json say something else."""
    old = open_run(folder).metadata
    settings = old["settings"] | about.pop("settings", {})
    (folder / "run.json").write_bytes(to_sealed_json(old | {"settings": settings} | about))


# --- the same run -------------------------------------------------------------------------------------------------

SAME = [
    {},
    {"base": ""},
    {"base": "checkpoints/base"},
    {"dataset": "./b.txt"},
    {"dataset": "copy.txt"},
    {"lora_target_rank": 1},
    {"vocab_size": 300},
    {"lora_targets": "all"},
    {"lora_targets": "lm_head, q_proj,k_proj,v_proj,o_proj,up_proj,down_proj"},
]


def test_spellings_of_one_run_are_one_run(root, capsys):
    shutil.copy("b.txt", "copy.txt")
    before = sorted(root.rglob("*"))
    for changes in [*SAME, {"base": str(Path.cwd() / "checkpoints/base")}]:
        changes = {
            key: value.format(here=Path.cwd()) if type(value) is str else value for key, value in changes.items()
        }
        assert adapt(**changes).name == "test-lora-b-r2", changes
        assert "finished already" in capsys.readouterr().out
    assert sorted(root.rglob("*")) == before
    about = open_run(root / "test-lora-b-r2").metadata
    auto = about | {"settings": about["settings"] | {"dtype": "auto"}}
    assert identity(auto) == identity(about) != identity(about | {"machine": "x86_64, cpu, bf16, 1 threads"})


DIFFERENT = [{"seed": 2}, {"lora_rank": 3}, {"lora_alpha": 8.0}, {"dataset": "c.txt"}, {"max_iters": 5}]


@pytest.mark.parametrize("changes", DIFFERENT, ids=str)
def test_what_changes_the_numbers_is_another_run(root, changes):
    assert adapt(**changes).name != "test-lora-b-r2"


def test_what_a_variant_reads_decides_its_runs(root):
    names = {adapt(lora_variant="vera", lora_alpha=alpha).name for alpha in (4.0, 8.0)}
    assert names == {"test-vera-b-r2"}


def test_a_run_is_found_under_its_hashed_name_and_as_an_earlier_version_wrote_it(root, capsys):
    hashed = adapt(max_iters=3)
    assert hashed.name.startswith("test-lora-b-r2-")
    shutil.rmtree(root / "test-lora-b-r2")
    changed(hashed.folder, identity="0" * 12)
    assert adapt(max_iters=3).name == hashed.name and "finished already" in capsys.readouterr().out


def test_a_run_that_was_made_is_never_taken_for_one_that_was_trained():
    assert all(identity(open_run(FIXTURES / name).metadata) == open_run(FIXTURES / name).metadata["identity"]
               for name in ("merged", "combined", "imported"))  # fmt: skip


# --- which base ---------------------------------------------------------------------------------------------------


def test_a_base_on_the_default_text_comes_before_a_newer_one_on_a_text_of_ones_own(root, capsys):
    shutil.copytree(root / "base", root / "own")
    settings = Settings.from_dict({"use_lora": True, "test_mode": True})
    assert find_base(settings).name == "own"
    changed(root / "base", settings={"dataset": "shakespeare"})
    capsys.readouterr()
    assert find_base(settings).name == "base"
    told = capsys.readouterr().err
    assert "Base: base, the newest one here trained on shakespeare; for another, --base with: own" in told
    changed(root / "own", settings={"tokenizer": "bpe"})
    byte_pairs = Settings.from_dict({"use_lora": True, "test_mode": True, "tokenizer": "bpe"})
    assert find_base(byte_pairs, ["tokenizer"]).name == "own"
    shutil.rmtree(root / "own")
    capsys.readouterr()
    assert find_base(settings).name == "base" and capsys.readouterr().err == ""


def test_a_run_of_test_mode_is_sampled_from_only_where_there_is_no_other(root):
    assert choose(root, "", None, ()).attached.keys() == {"test-lora-b-r2"}
    shutil.copytree(FIXTURES / "base-bias", root / "real")
    assert choose(root, "", None, ()).base.run.name == "real"


def test_fresh_on_a_base_tells_whose_base_it_is(root, capsys):
    train(run_name="base", fresh=True, **TINY)
    assert "the base of test-lora-b-r2, which stays usable: its base is then base.old1" in capsys.readouterr().err


# --- where a base is found again ------------------------------------------------------------------------------------


def opened(root: Path, name: str = "test-lora-b-r2") -> Path:
    """The folder of the base that an adapter is opened with."""
    return open_adapters(root, (name,))[0].base.run.folder


def test_a_base_in_another_folder_is_found_by_its_path(root):
    shutil.move(root / "base", "elsewhere/base")
    run = adapt(base="elsewhere/base", seed=5)
    assert run.metadata["base"]["path"] == str(Path("elsewhere/base").resolve())
    assert opened(root, run.name) == Path("elsewhere/base").resolve()
    assert choose(root, run.name, {}, ()).base.run.name == "base"
    with pytest.raises(UserError, match="the base of test-lora-b-r2 is gone: there is no base in checkpoints"):
        opened(root)


@pytest.mark.parametrize("newer", [None, "base-bias"])
def test_a_base_with_another_name_is_found_by_its_weights_and_told(root, capsys, newer):
    (root / "base").rename(root / "base.old1")
    if newer:
        shutil.copytree(FIXTURES / newer, root / "base")
    shutil.copytree(FIXTURES / "full", root / "another")
    assert opened(root) == root / "base.old1"
    assert "base, the base of test-lora-b-r2, is now checkpoints/base.old1, which has its weights" in (
        capsys.readouterr().err
    )


def test_a_base_with_other_weights_is_refused(root):
    shutil.rmtree(root / "base")
    shutil.copytree(FIXTURES / "base-bias", root / "base")
    with pytest.raises(UserError, match="trained on base with weights [0-9a-f]{12}, not [0-9a-f]{12}, and no other"):
        opened(root)


def test_a_comparison_takes_a_base_of_another_folder(root):
    shutil.move(root / "base", "elsewhere/base")
    settings = FAST | {"dataset": "b.txt", "use_lora": True}
    method = make_method("lora", settings, pick_machine("cpu", "fp32"), open_run(Path("elsewhere/base")))
    found = find_base(method.job.settings)
    assert found.folder == Path("elsewhere/base").resolve()


def test_a_command_that_opens_an_adapter_reads_and_hashes_its_base_once(root, monkeypatch):
    hashed, read = [], []
    for module in (jobs.runs.base, lora.adapter):
        honest = module.fingerprint
        monkeypatch.setattr(module, "fingerprint", lambda t, honest=honest: hashed.append(len(t)) or honest(t))
    honest_read = folders.read_folder
    monkeypatch.setattr(folders, "read_folder", lambda folder: read.append(folder.parent.name) or honest_read(folder))
    choose(root, "test-lora-b-r2", None, ())
    assert len(hashed) == 1 and sorted(read) == ["base", "test-lora-b-r2"]


def test_an_adapter_may_train_on_shorter_windows_than_its_base_takes(tmp_path, data_dir):
    shutil.copytree(FIXTURES / "base", tmp_path / "runs/base")
    (tmp_path / "short.txt").write_text(
        "To be, or not to be: that is the question.\n" * 3
    )  # 129 characters, 13 held out
    lora = ("--use-lora", "--dataset", "short.txt", "--checkpoints-dir", "runs", "--max-iters", "3", "--dtype", "fp32")
    refused = run(tmp_path, data_dir, "training.py", *lora)
    assert refused.returncode == 1
    found = re.search(r"has 13 tokens, and BLOCK_SIZE=16 needs 17; set (--block-size) (12),", refused.stderr)
    done = run(tmp_path, data_dir, "training.py", *lora, *found.groups())
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs/lora-short-r8/run.json").read_bytes())["window"] == 12
    again = run(tmp_path, data_dir, "training.py", *lora, "--block-size", "8")
    assert "lora-short-r8 was trained with BLOCK_SIZE=12" in again.stderr, "another window is another run"
    longer = run(tmp_path, data_dir, "training.py", *lora, "--block-size", "17")
    assert longer.returncode == 2
    assert longer.stderr.endswith("BLOCK_SIZE=17: the base base takes at most 16 tokens; lower it to that\n")


def test_a_shorter_window_chooses_no_other_base_and_the_next_command_names_the_base(tmp_path, data_dir):
    (tmp_path / "mine.txt").write_text("To be, or not to be, that is the question.\n" * 30)
    tiny = ("--test-mode", "--max-iters", "3", "--n-layer", "1", "--n-embd", "16", "--dtype", "fp32")
    assert run(tmp_path, data_dir, "training.py", *tiny).returncode == 0
    mine = run(tmp_path, data_dir, "training.py", *tiny, "--dataset", "mine.txt", "--block-size", "29")
    assert "--use-lora --base test-base-mine --test-mode" in mine.stdout
    lora = ("--test-mode", "--use-lora", "--dataset", "mine.txt", "--max-iters", "3")
    for size in ("29", "28"):
        done = run(tmp_path, data_dir, "training.py", *lora, "--block-size", size)
        assert done.returncode == 0 and "Base: test-base-shakespeare, text: mine" in done.stdout


def test_a_base_that_is_gone_is_not_mistaken_for_another_run(tmp_path):
    root = tmp_path / "runs"
    for name in ("lora-bias", "base"):
        shutil.copytree(FIXTURES / name, root / name)
    with pytest.raises(UserError, match="the base of lora-bias is gone: there is no base-bias in "):
        open_adapters(root, ("lora-bias",))


# --- architectures --------------------------------------------------------------------------------------------------


def test_a_base_of_any_architecture_is_adapted_and_known_for_what_it_is(root):
    architectures = ("gpt", "gpt-rotary", "llama")
    for architecture in architectures:
        base = train(run_name=architecture, architecture=architecture, seed=7, **TINY)
        assert ("position_embedding.weight" in load_file(base.artifact / "model.safetensors")) == (
            architecture == "gpt"
        )
        for asked in architectures:
            settings = FAST | {"dataset": "b.txt", "use_lora": True, "base": architecture, "architecture": asked}
            given = Resolved(Settings.from_dict(settings | {"lora_rank": 2}), {"ARCHITECTURE": "the test"})
            if asked == architecture:
                assert training.train(given).metadata["base"]["run"] == architecture
            else:
                with pytest.raises(UsageError, match=rf"ARCHITECTURE={asked} \(it has {architecture}\)"):
                    training.train(given)
