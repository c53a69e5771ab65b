"""Tensors and JSON objects as the bytes of files, and back; whatever is no such file is refused by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import safetensors
import torch
from safetensors.torch import load as read_safetensors
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from runtime.storage.folders import CorruptedError, sha256

SEAL = "sha256"


def pack(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Tensors as the bytes of a safetensors file; the same bytes for the same tensors and metadata."""
    data = safetensors_bytes({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, metadata)
    if not metadata:
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])  # in which the library writes metadata in an order that changes with each call
    text = json.dumps({"__metadata__": dict(sorted(header.pop("__metadata__").items()))} | header, ensure_ascii=False)
    header = text.encode()
    header += b" " * (-len(header) % 8)  # as the library does, so that tensors are aligned
    return len(header).to_bytes(8, "little") + header + data[end:]


def unpack(data: bytes, name: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises CorruptedError, naming the file, where it is none."""
    try:
        return read_safetensors(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        why = str(error).partition("\n")[0]  # torch adds a stack to some
        raise CorruptedError(f"{name} is not a whole safetensors file: {why}") from None


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, whatever order or device they are in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # numpy has no bf16
    return digest.hexdigest()


def differences(wanted: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> list[str]:
    """Every tensor that is missing, unexpected or of another shape, in words; dtypes and values may differ."""
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - here.keys())]
    problems += [f"{name} is unexpected" for name in sorted(here.keys() - wanted.keys())]
    shapes = {
        name: (tuple(here[name].shape), tuple(wanted[name].shape)) for name in sorted(wanted.keys() & here.keys())
    }
    return problems + [f"{name} is {shape}, not {right}" for name, (shape, right) in shapes.items() if shape != right]


def read_json(data: bytes, name: str) -> dict:
    """A JSON object. Raises CorruptedError, naming the file, where it is none or says something twice."""
    try:
        value = json.loads(data, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CorruptedError(f"{name} is corrupted: {error}") from None
    if not isinstance(value, dict):
        raise CorruptedError(f"{name} is corrupted: not a JSON object")
    return value


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there more than once")
    return value


def to_json(value: dict) -> bytes:
    """A JSON object as readable bytes."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _digest(value: dict) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode())


def to_sealed_json(value: dict) -> bytes:
    """A JSON object as readable bytes, with a checksum of its own as the last entry."""
    return to_json(value | {SEAL: _digest(value)})


def read_sealed_json(data: bytes, name: str) -> dict:
    """What `to_sealed_json` wrote. An object without a checksum, as earlier versions wrote it, is taken as it is.

    Raises CorruptedError, naming the file, where it is no JSON object or not the one that was written.
    """
    value = read_json(data, name)
    seal = value.pop(SEAL, None)
    if seal is not None and seal != _digest(value):
        raise CorruptedError(f"{name} is corrupted: its checksum is not the one that was saved")
    return value
