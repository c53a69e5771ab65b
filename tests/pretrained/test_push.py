"""What is pushed to a hub, which is a local server: it comes back the same, says nothing of this machine, and what goes
wrong is one line without the token."""

from __future__ import annotations

import json
import re
import shlex
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import transformers
from huggingface_hub import constants, hf_api
from local_hub import TOKEN, Hub, serving
from test_hub import run
from tiny_models import make, save
from tiny_runs import call, lora_run

from jobs.generating.load import load
from runtime.hub.background import Newest

IDS = torch.arange(48).reshape(2, 24) * 7 % 90


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    save(make("llama"), tmp_path / "hub/Owner/tiny")
    (tmp_path / "hub/somebody/theirs").mkdir(parents=True)
    with serving(tmp_path / "hub") as address:
        yield address


@pytest.fixture
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the runs, of a user whose hub is the local one."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name, value in {"HF_TOKEN": TOKEN, "HOME": str(folder)}.items():
        monkeypatch.setenv(name, value)
    settings = {"ENDPOINT": str(hub), "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    settings |= {"HF_HUB_CACHE": str(folder / "cache"), "HF_TOKEN_PATH": str(folder / "no-token")}
    settings["HUGGINGFACE_CO_URL_TEMPLATE"] = f"{hub}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in settings.items():  # which are read from the environment when the client is imported
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", str(hub))
    return folder


def told_of(folder: Path, *secrets: str) -> list[str]:
    """The files in which one of these texts is."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return [f"{path}: {text}" for path in paths for text in secrets if text.encode() in path.read_bytes()]


@torch.no_grad()
def ours(name: str) -> torch.Tensor:
    return load(name, ".")[0].float()(IDS)[0]


@torch.no_grad()
def test_what_was_pushed_comes_back_the_same(here, hub, tmp_path, monkeypatch, capsys):
    lora_run(here, "run", "Owner/tiny")
    base = transformers.AutoModelForCausalLM.from_pretrained("Owner/tiny")
    status, out, err = call(monkeypatch, capsys, "run", "--push", "me/adapter")
    assert status == 0 and out.splitlines()[-1] == f"{hub}/me/adapter" and "/tmp" not in out, err
    assert torch.allclose(peft.PeftModel.from_pretrained(base, "me/adapter").eval()(IDS).logits, ours("run"), atol=1e-4)
    card = (tmp_path / "hub/me/adapter/README.md").read_text()
    assert 'base_model: "Owner/tiny"' in card and "license" not in card and "| rank | 8 |" in card
    assert "PeftModel.from_pretrained(base, 'me/adapter')" in card

    status, out, err = call(monkeypatch, capsys, "run", "--to", "hf", "--push", "me/whole", "--public", "--out", "kept")
    assert status == 0 and "from_pretrained('me/whole') reads it" in out and (here / "kept/config.json").exists(), err
    theirs = transformers.AutoModelForCausalLM.from_pretrained("me/whole", dtype=torch.float32).eval()(IDS).logits
    assert torch.allclose(theirs, ours("run"), atol=1e-4) and torch.allclose(ours("me/whole"), ours("run"), atol=1e-4)
    assert [(tmp_path / "hub/me" / name / ".private").exists() for name in ("adapter", "whole")] == [True, False]
    assert len(hub.handler.commits) == 2 and all("README.md" in names for names in hub.handler.commits)
    assert not told_of(tmp_path / "hub/me", TOKEN, str(tmp_path), "MANIFEST") and not told_of(here, TOKEN)


def test_a_base_in_a_folder_is_named_without_its_path(here, tmp_path, monkeypatch, capsys):
    save(make("llama"), here / "base")
    config = json.loads((here / "base/config.json").read_bytes())
    (here / "base/config.json").write_text(json.dumps(config | {"_name_or_path": str(here / "elsewhere")}))
    lora_run(here, "run", "base")
    assert told_of(here / "run/adapter", str(here))  # PEFT finds a base here by its path
    status, out, err = call(monkeypatch, capsys, "run", "--push", "me/adapter")
    assert status == 0, err
    for words in (("--to", "hf"), ("--to", "gguf", "--no-tokenizer")):
        status, out, err = call(monkeypatch, capsys, "run", *words, "--push", f"me/{words[1]}")
        assert status == 0, err
    assert not told_of(tmp_path / "hub/me", str(tmp_path), TOKEN)
    assert "base_model:" not in (tmp_path / "hub/me/adapter/README.md").read_text()
    assert sorted(p.name for p in (tmp_path / "hub/me/gguf").iterdir()) == [
        ".private", "README.md", "run.gguf"
    ]  # fmt: skip


def test_a_card_that_was_changed_on_the_hub_stays(here, hub, tmp_path, monkeypatch, capsys):
    lora_run(here, "run", "Owner/tiny")
    card = tmp_path / "hub/me/adapter/README.md"
    (tmp_path / "hub/me/adapter").mkdir(parents=True)  # public
    for change, kept in ((None, False), (None, False), ("license: mit\n", True)):
        card.write_text(card.read_text() + change) if change else None
        status, _, err = call(monkeypatch, capsys, "run", "--push", "me/adapter")
        assert status == 0 and "me/adapter is public already, and stays so" in err, err
        assert ("README.md of me/adapter was changed on the hub, and stays as it is there" in err) == kept
    assert card.read_text().endswith("license: mit\n") and "README.md" not in hub.handler.commits[-1]
    assert len(hub.handler.commits) == 3


AGAIN = r"then: \S*python\S* \S*export\.py run --push {} --checkpoints-dir \."


@pytest.mark.parametrize(
    ("token", "name", "failing", "status", "told"),
    [
        ("", "me/new", {}, 2, "pushing to me/new needs a token that may write: set HF_TOKEN in the environment"),
        ("hf_unknown", "me/new", {}, 2, "the hub does not know HF_TOKEN, or it has expired"),
        ("hf_ secret", "me/new", {}, 2, "HF_TOKEN is no token: it has characters that none has"),
        ("hf_\u00e9secret", "me/new", {}, 2, "HF_TOKEN is no token: it has characters that none has"),
        ("hf_reader", "me/new", {}, 2, "HF_TOKEN is a token that may only read: make one that may write"),
        (TOKEN, "somebody/new", {}, 2, "somebody is not the owner of HF_TOKEN, which may push to me, our-group"),
        ("hf_fine", "somebody/new", {}, 1, "HF_TOKEN may not write to somebody/new: take a name of your own"),
        ("hf_fine", "somebody/theirs", {}, 1, "HF_TOKEN may not write to somebody/theirs: take a name of your own"),
        (TOKEN, "me/new", {"whoami": 503}, 1, "the hub failed with status 503; wait a little"),
        (TOKEN, "me/new", {"create": 409}, 1, "the hub refused me/new with status 409"),
        (TOKEN, "me/new", {"put": 403}, 1, "HF_TOKEN may not write to me/new"),
        (TOKEN, "me/new", {"commit": 500}, 1, "the hub failed with status 500; wait a little"),
        (TOKEN, "me/new", {"offline": 0}, 1, "the hub cannot be reached (HF_HUB_OFFLINE, or no network)"),
        (TOKEN, "me/new", {"network": 0}, 1, "the hub cannot be reached (HF_HUB_OFFLINE, or no network)"),
        (TOKEN, "name", {}, 2, "--push name (flag): must be user/name"),
        (TOKEN, "me/a--b", {}, 2, "me/a--b cannot be a name on the hub"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_line(token, name, failing, status, told, here, hub, monkeypatch, capsys):
    lora_run(here, "run", "Owner/tiny")
    monkeypatch.setenv("HF_TOKEN", token)
    hub.handler.failing = {part: code for part, code in failing.items() if code}
    if "offline" in failing:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if "network" in failing:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    got, out, err = call(monkeypatch, capsys, "run", "--push", name)
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert got == status and told in error and "Traceback" not in err, err
    if name != "name" and "--" not in name:
        assert re.search(AGAIN.format(name), error), error
    assert not token or token not in out + err
    assert "secret" not in out + err and not hub.handler.commits


ROOT_WORDS = ("--test-mode", "--use-lora", "--base", "Owner/tiny", "--dataset", "letters.txt", "--block-size", "16")
ROOT_WORDS += ("--max-iters", "4", "--eval-interval", "2", "--run-name", "run")


def test_a_run_pushes_its_saves_and_its_end(hub, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    words = (*ROOT_WORDS, "--push-to-hub", "me/run", "--push-strategy", "every_save")
    done = run(home, hub, "training.py", *words)
    assert done.returncode == 2 and not (home / "checkpoints").exists()
    assert "error: pushing to me/run needs a token that may write: set HF_TOKEN" in done.stderr
    (home / ".env").write_text(f"HF_TOKEN={TOKEN}\n")
    hub.handler.most = 1
    done = run(home, hub, "training.py", *words)
    assert done.returncode == 0 and len(hub.handler.commits) == 1, done.stderr  # a save's
    last = done.stderr.splitlines()[-1]
    assert last.startswith("run is whole, and was not pushed: the hub failed") and "export.py run --push me/run" in last
    card = (tmp_path / "hub/me/run/README.md").read_text()
    assert re.search(r"\| steps \| [24] \|", card) and "| dataset sha256 |" in card and "| validation loss |" in card
    printed, hub.handler.most = done.stdout + done.stderr, 2
    command = shlex.split(last.rpartition("then: ")[2])
    done = run(home, hub, *command[1:])
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"{hub}/me/run", done.stderr
    printed += done.stdout + done.stderr
    (home / ".env").unlink()
    assert TOKEN not in printed and not told_of(tmp_path, TOKEN) and not told_of(tmp_path / "hub/me", str(tmp_path))


def test_one_upload_at_a_time_and_of_those_that_wait_the_newest():
    uploads, started, go_on, done = Newest(), threading.Event(), threading.Event(), []

    def first() -> None:
        started.set()
        assert go_on.wait(10)
        done.append("first")

    for last in ("third", "never"):
        started.clear(), go_on.clear(), done.clear()
        uploads.offer(first)
        assert started.wait(10) and uploads.busy
        uploads.offer(lambda: done.append("second"))
        uploads.offer(lambda last=last: done.append(last))
        if last == "never":
            threading.Timer(0.02, go_on.set).start()
            uploads.end()  # what waits is forgotten
            assert done == ["first"] and not uploads.busy
        else:
            go_on.set()
            while uploads.busy:
                time.sleep(0.01)
            assert done == ["first", "third"]
