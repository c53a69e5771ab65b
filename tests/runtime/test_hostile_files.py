"""Files that somebody made to do harm: refused in one line, with no side effect, whatever their names say they are."""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from tiny_steps import stepper

from data.corpora import load_corpus
from data.text import tokens_of
from data.tokenizers import build_tokenizer, load_tokenizer
from lora import peft_format as adapter_files
from lora.adapter import Adapter
from lora.attach import attach
from lora.config import LoRAConfig
from models import files as model_files
from models.config import ModelConfig
from models.transformer import Transformer
from runtime.errors import UserError
from runtime.storage import folders
from runtime.storage.encoding import to_sealed_json
from runtime.storage.folders import MANIFEST, CorruptedError
from runtime.storage.lock import RunLock
from runtime.storage.runs import Run, claim, open_run
from runtime.storage.tensors import pack, unpack
from runtime.training import resume
from runtime.training.metrics import MetricsLog, read_metrics

ABOUT = {"kind": "base", "identity": "0123456789ab", "settings": {"test_mode": False, "dataset": "folio"}}
TOKENIZER = build_tokenizer("char", "to be", 0)
CONFIG = ModelConfig(TOKENIZER.vocab_size, n_embd=8, max_positions=8, n_head=1, n_layer=1, bias=False)
POSIX = pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG)


def base_files() -> dict[str, bytes]:
    return model_files.to_files(model()) | {"tokenizer.json": TOKENIZER.dumps()}


def lora_files() -> dict[str, bytes]:
    adapted = model()
    attach(adapted, LoRAConfig(rank=2, alpha=4.0))
    return adapter_files.to_files(Adapter.from_model(adapted))


def step_files() -> dict[str, bytes]:
    return resume.to_files(stepper(), resume.State(step=3))


READERS = {
    "step": (step_files, lambda files: resume.restore(stepper(), files, "here")),
    "model": (
        base_files,
        lambda files: (model_files.from_files(files, "here"), load_tokenizer(files["tokenizer.json"])),
    ),
    "adapter": (lora_files, lambda files: adapter_files.from_files(files, "here").attach_to(model())),
}
FILES = [(kind, name) for kind, (make, _) in READERS.items() for name in make() if name != "README.md"]


def refused(function, *args) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000, "one line"
    return str(caught.value)


@pytest.fixture
def run(tmp_path) -> Run:
    return claim(tmp_path / "runs", "base-x", "", ABOUT, fresh=False)


# --- pickles --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bombs(tmp_path) -> list[bytes]:
    """A pickle, and the same as torch saves it."""
    torch.save(Bomb(tmp_path / "harm"), tmp_path / "bomb.pt")
    return [pickle.dumps(Bomb(tmp_path / "harm")), (tmp_path / "bomb.pt").read_bytes()]


@pytest.mark.parametrize(("kind", "name"), FILES, ids=lambda part: part)
def test_a_pickle_in_a_save_is_refused_though_its_checksum_is_right(tmp_path, bombs, kind, name):
    make, read = READERS[kind]
    for i, bomb in enumerate(bombs):
        folders.commit_folder(tmp_path / f"{i}", make() | {name: bomb})
        refused(read, folders.read_folder(tmp_path / f"{i}"))
    assert not (tmp_path / "harm").exists()


def test_a_pickle_under_any_other_name_is_refused_or_left_out(tmp_path, bombs, run, capsys):
    for bomb in bombs:
        for name in ("run.json", "result.json"):
            before = (run.folder / name).read_bytes() if (run.folder / name).exists() else None
            (run.folder / name).write_bytes(bomb)
            assert name in refused(lambda: open_run(run.folder).result)
            (run.folder / name).write_bytes(before) if before else (run.folder / name).unlink()
        (run.folder / "metrics.jsonl").write_bytes(bomb)
        assert read_metrics(run.folder / "metrics.jsonl") == [] and "corrupted line" in capsys.readouterr().err
        folders.commit_folder(run.folder / "step-000001", step_files())
        (run.folder / "step-000001" / MANIFEST).write_bytes(bomb)
        assert run.newest("step") is None and MANIFEST in capsys.readouterr().err
        folders.remove_folder(run.folder / "step-000001")
        (tmp_path / "text.txt").write_bytes(bomb)
        assert "UTF-8" in refused(load_corpus, str(tmp_path / "text.txt"), tmp_path)
    assert not (tmp_path / "harm").exists()


def test_tokens_that_are_none_are_made_again(tmp_path, bombs, capsys):
    text = "to be or not to be\n" * 9
    right = tokens_of(text, TOKENIZER, tmp_path).tolist()
    (folder,) = (tmp_path / "tokens").iterdir()
    (name,) = (path.name for path in folder.iterdir() if path.name != MANIFEST)
    wrong = [*bombs, b"", b"odd", b"\xff" * 64]
    for files in [{name: data} for data in wrong] + [{}, {"other": b""}]:
        folders.remove_folder(folder)
        folders.commit_folder(folder, files)
        assert tokens_of(text, TOKENIZER, tmp_path).tolist() == right, files
        assert "making it again" in capsys.readouterr().err
    assert not (tmp_path / "harm").exists()


# --- safetensors ----------------------------------------------------------------------------------------------------


def entry(start: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


HEADERS = {
    "overlapping": {"a": entry(0, 8), "b": entry(4, 12)},
    "the same bytes twice": {"a": entry(0, 12), "b": entry(0, 12)},
    "a hole": {"a": entry(0, 4), "b": entry(8, 12)},
    "more at the end": {"a": entry(0, 8)},
    "negative": {"a": entry(-4, 8)},
    "backwards": {"a": entry(8, 0)},
    "huge": {"a": entry(0, 2**63)},
    "larger than any integer": {"a": entry(0, 2**70)},
    "beyond the end": {"a": entry(0, 16)},
    "a shape of another size": {"a": entry(0, 12, [4])},
    "a shape whose size wraps around": {"a": entry(0, 12, [2**62, 2**62, 3])},
    "a negative shape": {"a": entry(0, 12, [-3])},
    "a float": {"a": entry(0, 12, [3.0])},
    "a name that leads elsewhere": {"../../a": entry(0, 12)},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_offsets_that_lie_are_refused(header):
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(12)
    for kind, name in (("model", "model.safetensors"), ("step", "weights.safetensors")):
        refused(READERS[kind][1], READERS[kind][0]() | {name: data})
    refused(READERS["adapter"][1], lora_files() | {"adapter_model.safetensors": data})


def test_a_tensor_that_is_there_twice_is_never_taken_for_another():
    text = json.dumps({"a": entry(0, 4), "b": entry(4, 8)}).replace('"b"', '"a"').encode()
    data = struct.pack("<Q", len(text)) + text + struct.pack("<ff", 1.0, 2.0)
    assert "safetensors" in refused(unpack, data, "x.safetensors")


def test_the_largest_header_is_no_reason_to_allocate():
    for length in (2**63, 2**40, 10**8):
        refused(unpack, struct.pack("<Q", length) + b"{}", "x")


# --- JSON -----------------------------------------------------------------------------------------------------------

JSON = {
    "200,000 deep": b"[" * 200_000 + b"]" * 200_000,
    "200,000 objects deep": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "an integer of 5,000 digits": b'{"a": ' + b"9" * 5_000 + b"}",
    "NaN": b"NaN",
    "cut off in a string": b'{"a": "\\ud8',
    "UTF-16": "[1]".encode("utf-16"),
    "bytes": bytes(range(256)),
}


@pytest.mark.parametrize("data", JSON.values(), ids=JSON)
@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, n in FILES if n.endswith(".json")], ids=lambda part: part)
def test_json_that_is_none_is_refused(kind, name, data):
    make, read = READERS[kind]
    refused(read, make() | {name: data})


@pytest.mark.parametrize("data", JSON.values(), ids=JSON)
def test_json_that_is_none_is_refused_where_runs_are_described(run, data):
    (run.folder / "run.json").write_bytes(data)
    assert "run.json" in refused(open_run, run.folder)
    (run.folder / "result.json").write_bytes(data)
    assert "result.json" in refused(lambda: run.result)


VALUES = [float("nan"), float("inf"), -1, 0, 10**4000, 10**8, 2**63, 1e308, "1", None, True, [], {}, "../../x"]


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, n in FILES if n.endswith(".json")], ids=lambda part: part)
def test_no_value_in_a_file_of_ours_ends_in_a_traceback_or_takes_all_memory(kind, name):
    """Each entry in turn holds each of the values: the file is refused, or read as something that works."""
    make, read = READERS[kind]
    good = make()
    about = json.loads(good[name])
    for key in about:
        for value in VALUES:
            try:
                read(good | {name: json.dumps(about | {key: value}).encode()})
            except UserError as error:
                assert str(error).isprintable(), (key, value)
    for key in about:
        try:
            read(good | {name: json.dumps({k: v for k, v in about.items() if k != key}).encode()})
        except UserError as error:
            assert str(error).isprintable(), key


@pytest.mark.parametrize(
    ("kind", "name"), [("model", "config.json"), ("adapter", "adapter_config.json"), ("step", "state.json")]
)
def test_json_that_says_something_twice_is_refused(kind, name):
    make, read = READERS[kind]
    good = make()
    first = next(iter(json.loads(good[name])))
    data = good[name].rstrip()[:-1] + f', "{first}": 1}}'.encode()
    assert f"{first!r} is there more than once" in refused(read, good | {name: data})


@pytest.mark.parametrize("key", ["kind", "identity", "settings"])
def test_a_description_with_wrong_values_is_refused_though_its_checksum_is_right(run, key):
    for value in (None, 3, [], "x\n", {}):
        if isinstance(value, type(ABOUT[key])) and key != "kind":
            continue
        (run.folder / "run.json").write_bytes(to_sealed_json(ABOUT | {key: value}))
        assert key in refused(open_run, run.folder)


@pytest.mark.parametrize("place", ["settings", "base"])
def test_a_description_without_what_others_rely_on_is_refused_though_its_checksum_is_right(run, place):
    good = ABOUT | {"kind": "lora", "base": {"run": "base"}}
    for key in good[place]:
        for value in (None, 3, []):
            (run.folder / "run.json").write_bytes(to_sealed_json(good | {place: good[place] | {key: value}}))
            assert f"{place}.{key} is {value!r}" in refused(open_run, run.folder)
        left = {name: value for name, value in good[place].items() if name != key}
        (run.folder / "run.json").write_bytes(to_sealed_json(good | {place: left}))
        assert f"{place}.{key} is None" in refused(open_run, run.folder)
    (run.folder / "run.json").write_bytes(to_sealed_json({key: good[key] for key in good if key != place}))
    assert f"{place} is None" in refused(open_run, run.folder)


# --- adapters from elsewhere, which have no manifest ----------------------------------------------------------------


@pytest.fixture
def theirs(tmp_path) -> Path:
    folders.commit_folder(tmp_path / "theirs", lora_files())
    (tmp_path / "theirs" / MANIFEST).unlink()
    return tmp_path / "theirs"


@pytest.mark.parametrize("name", [adapter_files.CONFIG, adapter_files.TENSORS])
def test_a_foreign_file_that_may_not_be_read_is_one_line(theirs, monkeypatch, name):
    honest = Path.open

    def refuse(path: Path, *args, **kwargs):
        if path.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return honest(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    assert refused(adapter_files.load_adapter, theirs) == f"could not read {theirs}: Permission denied"


def test_a_folder_in_the_place_of_a_file_is_a_file_that_is_missing(theirs):
    (theirs / adapter_files.TENSORS).unlink()
    (theirs / adapter_files.TENSORS).mkdir()
    assert f"{adapter_files.TENSORS} is missing" in refused(adapter_files.load_adapter, theirs)


# --- links and names ------------------------------------------------------------------------------------------------


@POSIX
@pytest.mark.parametrize("target", ["secret", "/dev/zero", "step-000001", "nowhere"])
def test_a_save_does_not_follow_links(tmp_path, run, target, capsys):
    (tmp_path / "secret").write_bytes(b"secret")
    files = step_files()
    for name in (*files, MANIFEST):
        folders.commit_folder(run.folder / "step-000001", files)
        (run.folder / "step-000001" / name).unlink()
        (run.folder / "step-000001" / name).symlink_to(Path("../../..") / target)
        assert run.newest("step") is None and f"step-000001/{name}" in capsys.readouterr().err
        folders.remove_folder(run.folder / "step-000001")
    assert (tmp_path / "secret").read_bytes() == b"secret"


@POSIX
def test_a_pipe_in_a_save_is_refused_and_not_waited_for(run, capsys):
    for name in ("state.json", MANIFEST):
        folders.commit_folder(run.folder / "step-000001", step_files())
        (run.folder / "step-000001" / name).unlink()
        os.mkfifo(run.folder / "step-000001" / name)
        assert run.newest("step") is None and "not a plain file" in capsys.readouterr().err
        folders.remove_folder(run.folder / "step-000001")


@POSIX
def test_writing_never_goes_through_a_link(tmp_path, run):
    """Links under every name that a run writes to lead to files and folders outside; those stay as they are."""
    outside, victim = tmp_path / "outside", tmp_path / "victim"
    folders.commit_folder(outside, {"precious": b"precious"})
    victim.write_bytes(b"precious")
    for name in (".lock-holder", "metrics.jsonl", "result.json", ".result.json.1.tmp"):
        (run.folder / name).symlink_to(victim)
    for name in ("step-000001", "best-000001", ".tmp-step-000002-1", ".tmp-removed-x"):
        (run.folder / name).symlink_to(outside, target_is_directory=True)
    with RunLock(run.folder):
        MetricsLog(run.folder / "metrics.jsonl", 0).add(1, loss=1.0)
        run.save("step", 2, step_files(), keep=1)
        run.save("best", 2, base_files(), keep=1)
        run.publish({"best": 1.0})
    assert victim.read_bytes() == b"precious" and folders.read_folder(outside) == {"precious": b"precious"}
    assert not [path for path in run.folder.iterdir() if path.is_symlink()]


@POSIX
def test_a_lock_that_is_a_link_is_refused_and_its_target_stays(tmp_path, run):
    (tmp_path / "victim").write_bytes(b"precious")
    (run.folder / ".lock").unlink(missing_ok=True)
    (run.folder / ".lock").symlink_to(tmp_path / "victim")
    refused(RunLock(run.folder).__enter__)
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_a_log_that_is_a_folder_is_one_line(run):
    (run.folder / "metrics.jsonl").mkdir()
    assert "metrics.jsonl" in refused(MetricsLog, run.folder / "metrics.jsonl", 0)


def test_a_tensor_name_that_leads_elsewhere_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(READERS["model"][1], base_files() | {"model.safetensors": pack({"../../evil": torch.ones(2)})})
    assert not list(tmp_path.iterdir())


def test_a_holder_that_is_no_text_is_told_all_the_same(run):
    with RunLock(run.folder):
        (run.folder / ".lock-holder").write_bytes(b"\xff\0" * 10**5)
        with pytest.raises(UserError, match="is being trained by") as caught:
            RunLock(run.folder).__enter__()
        assert len(str(caught.value)) < 400


def test_damage_is_one_kind_of_error():
    assert issubclass(CorruptedError, UserError)
