"""Tensors as bytes and fingerprints; what a run saves, keeps, falls back to, and publishes."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.errors import UserError
from runtime.storage import folders
from runtime.storage.content import OpenFile
from runtime.storage.encoding import read_json, to_json
from runtime.storage.folders import CorruptedError
from runtime.storage.runs import Run
from runtime.storage.tensors import DTYPES, bytes_of, fingerprint, pack, unpack
from tests.commands.command_line import ROOT


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = {str(dtype): torch.randn(3, 4).abs().mul(9).to(dtype) for dtype in DTYPES.values()}
    shapes = {"0-dim": torch.tensor(2.5), "0-dim bf16": torch.tensor(2.5, dtype=torch.bfloat16)}
    empty = {"empty": torch.zeros(0), "empty rows": torch.zeros(0, 4, dtype=torch.bfloat16)}
    return made | shapes | empty | {"transposed": torch.randn(3, 4).T, "trains": torch.nn.Parameter(torch.randn(2))}


# --- tensors --------------------------------------------------------------------------------------------------------


def test_tensors_survive_packing_bit_for_bit():
    before, metadata = tensors(), {"format": "pt", "base": "é"}
    data = bytes(pack(before, metadata))
    after = unpack(data, "x.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and after[name].shape == tensor.shape, name
        assert described(after[name]) == described(tensor.contiguous()), name
    assert json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"] == metadata
    assert unpack(pack({}), "x") == {}


def test_what_is_unpacked_can_be_written_to_without_changing_the_bytes():
    data = OpenFile(io.BytesIO(before := bytes(pack({"a": torch.ones(3)}))))
    unpack(data, "x")["a"].add_(1)
    assert data == before


def safetensors_file(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def no_tensors(data: bytes) -> None:
    """Bytes that are no safetensors file are refused by one line that names it, whatever the library makes of them."""
    with pytest.raises(CorruptedError) as caught:
        unpack(data, "step-000001/weights.safetensors")
    assert str(caught.value).startswith("step-000001/weights.safetensors") and str(caught.value).isprintable()


@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [2**62, 2**62, 0], [0, 2**64 - 1], [0, 2**70], [-1], [1, 2]])
@pytest.mark.parametrize("dtype", ["F32", "F4", "BF16", "nonsense", ["F32"]])
def test_a_header_with_impossible_sizes_is_refused(shape, dtype):
    no_tensors(safetensors_file({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"\0" * 8,
        b"\xff" * 64,
        struct.pack("<Q", 5) + b"[" * 5,
        struct.pack("<Q", 2**63) + b"{}",
        safetensors_file([]),
        safetensors_file({"a": 3}),
        safetensors_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
        safetensors_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"1234"),
    ],
    ids=range(10),
)
def test_garbage_is_no_safetensors_file(data):
    no_tensors(data)


def test_no_part_of_a_safetensors_file_is_taken_for_one():
    data = bytes(pack({"a": torch.arange(3.0), "b": torch.tensor(1, dtype=torch.bfloat16)}))
    for length in range(len(data)):
        no_tensors(data[:length])
    no_tensors(data + b"\0")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_corrupted_header_is_refused_or_read_but_never_a_traceback(data):
    good = bytearray(bytes(pack({"a": torch.arange(3.0)})))
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        ours = unpack(bytes(good), "x")
    except CorruptedError as error:
        assert str(error).startswith("x ") and str(error).isprintable()
        ours = None
    try:
        theirs = safetensors.torch.load(bytes(good))
    except Exception:
        theirs = None
    assert ours is None or {k: described(t) for k, t in ours.items()} == {k: described(t) for k, t in theirs.items()}


def described(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, bytes(bytes_of(tensor))


def test_the_bytes_are_those_of_the_safetensors_library():
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors().items()}
    for metadata in (None, {"format": "pt"}):
        assert bytes(pack(tensors(), metadata)) == safetensors.torch.save(contiguous, metadata)


# --- fingerprints ---------------------------------------------------------------------------------------------------


def test_a_fingerprint_knows_names_dtypes_shapes_and_values_and_no_order():
    base = tensors()
    want = fingerprint(base)
    assert want == fingerprint(dict(reversed(base.items()))) == fingerprint({n: t.clone() for n, t in base.items()})
    assert len(want) == 64
    seen = {want, fingerprint({})}
    for name, tensor in base.items():
        rest = {key: value for key, value in base.items() if key != name}
        others = [rest, rest | {f"{name}2": tensor}, rest | {name: tensor[None]}]
        if tensor.numel():
            changed = tensor.detach().clone().reshape(-1)
            changed[-1] = changed[-1] == 0
            others.append(rest | {name: changed.view(tensor.shape)})
        seen |= (new := {fingerprint(other) for other in others})
        assert len(new) == len(others), name
    assert len(seen) == 2 + sum(3 + bool(t.numel()) for t in base.values()), "no two of all these are the same"


def test_a_fingerprint_sees_the_dtype_behind_equal_bytes_and_the_order_behind_equal_storage():
    zeros = {fingerprint({"a": torch.zeros(2, 2, dtype=dtype)}) for dtype in DTYPES.values()}
    assert len(zeros) == len(DTYPES)
    square = torch.arange(4.0).view(2, 2)
    assert fingerprint({"a": square}) != fingerprint({"a": square.T})
    assert fingerprint({"a": square.T}) == fingerprint({"a": square.T.contiguous()})
    assert fingerprint({"a": torch.zeros(1)}) != fingerprint({"a": -torch.zeros(1)}), "bits, not values"
    assert fingerprint({"a": torch.zeros(2), "b": torch.ones(2)}) != fingerprint(
        {"a": torch.ones(2), "b": torch.zeros(2)}
    )


def test_the_fingerprint_of_a_base_that_adapters_name_does_not_change_between_versions():
    known = "9f47c33b8a55ded50b6466beef6a139234770727d3cbfa33ea5d0db3039d7f0e"
    assert fingerprint({"b": torch.ones(2), "a": torch.arange(6.0).view(2, 3)}) == known


# --- JSON -----------------------------------------------------------------------------------------------------------


def test_json_round_trips_also_what_is_no_plain_text():
    value = {"é": ["🔧", 1.5, None], "best": float("inf"), "path": "caf\udce9"}
    assert read_json(to_json(value), "x") == value
    assert "é".encode() in to_json(value) and to_json(value).endswith(b"}\n")
    to_json(value).decode("utf-8")


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"3", b"null", b"{", b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5_000 + b"}"]
)
def test_what_is_no_json_object_is_refused(data):
    with pytest.raises(CorruptedError) as caught:
        read_json(data, "here/run.json")
    assert str(caught.value).startswith("here/run.json is corrupted") and str(caught.value).isprintable()


# --- saving ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path) -> Run:
    folders.write_file(tmp_path / "lora-folio-r8" / "run.json", b"{}")
    return Run(tmp_path / "lora-folio-r8", {"kind": "lora", "identity": "abc"})


def content(value: int) -> dict[str, bytes]:
    return {"weights": b"weights %d" % value, "state": b"state"}


def names(run: Run) -> list[str]:
    return sorted(path.name for path in run.folder.iterdir() if path.is_dir())


def damage(folder: Path) -> Path:
    (folder / "weights").write_bytes(b"weights ?")
    return folder


def test_as_many_steps_are_kept_as_were_asked_for(run):
    for step in (5, 10, 999_990, 1_000_000, 1_000_010):
        run.save("step", step, content(step), keep=3)
        run.save("best", step, content(step), keep=1)
    assert [step for step, _ in run.saved("step")] == [999_990, 1_000_000, 1_000_010], "in order of number, not of name"
    assert [step for step, _ in run.saved("best")] == [1_000_010]
    assert run.newest("step") == (1_000_010, content(1_000_010))


def test_other_folders_are_neither_steps_nor_removed(run):
    others = ["step-", "step-12a", "mystep-000001", "step-000001.copy", "best", ".tmp-step-000009-1"]
    for name in others:
        (run.folder / name).mkdir()
    run.save("step", 2, content(2), keep=1)
    run.save("step", 3, content(3), keep=1)
    assert names(run) == sorted([*others, "step-000003"])


def test_nothing_is_removed_before_the_new_one_is_safe(run, monkeypatch):
    run.save("step", 1, content(1), keep=1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="free some space"):
            run.save("step", 2, content(2), keep=1)
    assert run.newest("step") == (1, content(1)) and names(run) == ["step-000001"]


def test_a_corrupted_step_is_named_and_the_one_before_is_taken(run, capsys):
    for step in (1, 2, 3):
        run.save("step", step, content(step), keep=3)
    damage(run.folder / "step-000003")
    (run.folder / "step-000002" / folders.MANIFEST).unlink()
    assert run.newest("step") == (1, content(1))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "step-000003" in lines[0] and "step-000002" in lines[1]
    assert all("the one before" in line for line in lines)
    assert names(run) == ["step-000001", "step-000002", "step-000003"], "reading removes nothing"


def test_a_step_that_could_not_be_read_this_once_is_still_there_the_next_time(run, monkeypatch, capsys):
    run.save("step", 1, content(1), keep=3)
    run.save("step", 2, content(2), keep=3)
    read = Path.read_bytes

    def busy(path: Path) -> bytes:
        if path.parent.name == "step-000002":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return read(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", busy)
        assert run.newest("step") == (1, content(1))
    assert os.strerror(errno.EMFILE) in capsys.readouterr().err
    assert run.newest("step") == (2, content(2))


def test_without_any_good_step_there_is_none_and_this_is_said(run, capsys):
    assert run.newest("step") is None and capsys.readouterr().err == ""
    run.save("step", 1, content(1), keep=1)
    damage(run.folder / "step-000001")
    assert run.newest("step") is None
    assert "step-000001" in (told := capsys.readouterr().err) and "there is none before it" in told


def test_a_run_that_fell_back_saves_over_what_was_corrupted(run):
    run.save("step", 100, content(1), keep=1)
    run.save("step", 200, content(2), keep=1)
    damage(run.folder / "step-000200")
    folders.commit_folder(run.folder / "step-000100", content(1))
    assert run.newest("step") == (100, content(1))
    run.save("step", 200, content(7), keep=1)
    assert run.newest("step") == (200, content(7)) and names(run) == ["step-000200"]


def test_a_run_that_fell_back_keeps_what_it_saves_then_and_not_what_came_after(run):
    for step in (100, 200, 300):
        run.save("step", step, content(step), keep=3)
    damage(run.folder / "step-000300")
    damage(run.folder / "step-000200")
    assert run.newest("step") == (100, content(100))
    run.save("step", 150, content(150), keep=2)
    assert names(run) == ["step-000100", "step-000150"] and run.newest("step") == (150, content(150))


def test_a_good_folder_is_left_where_a_run_reaches_it_a_second_time(run):
    run.save("best", 250, content(1), keep=1)
    run.save("best", 250, content(2), keep=1)
    assert run.read() == content(1)


# --- reading and publishing -----------------------------------------------------------------------------------------


def test_an_unfinished_run_gives_its_best_weights(run, capsys):
    assert not run.finished and run.result == {}
    with pytest.raises(UserError, match="lora-folio-r8 has not saved anything yet; start it again"):
        run.read()
    run.save("best", 100, content(1), keep=1)
    run.save("best", 200, content(2), keep=2)
    assert run.read() == content(2) and capsys.readouterr().err == ""
    damage(run.folder / "best-000200")
    assert run.read() == content(1) and "best-000200" in capsys.readouterr().err
    damage(run.folder / "best-000100")
    with pytest.raises(CorruptedError, match="lora-folio-r8.*FRESH=True"):
        run.read()


def test_a_finished_run_has_its_product_and_its_result_and_no_steps(run):
    run.save("step", 200, content(9), keep=2)
    run.save("best", 200, content(2), keep=1)
    (run.folder / "metrics.jsonl").write_bytes(b"")
    run.publish({"best": 1.5})
    assert run.finished and run.artifact == run.folder / "adapter" and run.result == {"best": 1.5}
    assert run.read() == content(2) == folders.read_folder(run.artifact)
    assert sorted(p.name for p in run.folder.iterdir()) == ["adapter", "metrics.jsonl", "result.json", "run.json"]
    damage(run.artifact)
    with pytest.raises(CorruptedError, match="adapter"):
        run.read()


def test_what_is_published_is_what_was_read(run):
    run.save("best", 100, content(1), keep=1)
    run.save("best", 200, content(2), keep=2)
    damage(run.folder / "best-000200")
    assert run.read() == content(1)
    run.publish({})
    assert run.read() == content(1)


@pytest.mark.parametrize("failing", ["result.json", "adapter"])
def test_publishing_that_fails_can_be_done_again(run, monkeypatch, failing):
    run.save("step", 200, content(9), keep=1)
    run.save("best", 200, content(2), keep=1)
    with monkeypatch.context() as patched:
        for name in ("rename", "replace"):
            real = getattr(os, name)

            def full(source, target, real=real):
                if Path(target).name == failing:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                real(source, target)

            patched.setattr(os, name, full)
        with pytest.raises(UserError, match=failing):
            run.publish({"best": 1.5})
    assert not run.finished and run.read() == content(2) and run.newest("step") == (200, content(9))
    run.publish({"best": 1.5})
    assert run.finished and run.read() == content(2) and run.result == {"best": 1.5}


@pytest.mark.parametrize(("kind", "product"), [("base", "model"), ("full", "model"), ("lora", "adapter")])
def test_what_each_kind_of_run_is_for(tmp_path, kind, product):
    assert Run(tmp_path, {"kind": kind}).artifact == tmp_path / product


def test_a_corrupted_result_is_refused_by_name(run):
    (run.folder / "result.json").write_bytes(b'{"best": ')
    with pytest.raises(CorruptedError, match=r"result\.json is corrupted"):
        _ = run.result


PEAK = """
import resource, sys, torch
from pathlib import Path
from runtime.storage.folders import commit_folder, read_folder
from runtime.storage.tensors import TensorFile, bytes_of, pack

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

bytes_of(torch.ones(2, 2).T.contiguous())  # what only the first use takes
torch.empty_like(torch.empty(2, device="meta"), device="cpu").copy_(torch.ones(2))
tensors = {f"{i}": torch.full((2048, 2048), float(i)).T for i in range(8)}
started = peak()
commit_folder(Path(sys.argv[1]), {"model.safetensors": pack(tensors, {"format": "pt"})})
saved = peak()
packed = TensorFile(read_folder(Path(sys.argv[1]))["model.safetensors"], "")
for name, tensor in tensors.items():
    tensor.sub_(packed[name])
assert not any(tensor.any() for tensor in tensors.values())
print((saved - started) / tensor.nbytes, (peak() - saved) / tensor.nbytes)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no getrusage")
def test_saving_and_loading_take_memory_for_one_tensor(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "saved")], capture_output=True, text=True, check=True, cwd=ROOT
    )
    saving, loading = map(float, done.stdout.split())
    assert saving < 1.2 and loading < 2.4, "in tensors, of which there are 8; the allocator may keep one that is freed"
