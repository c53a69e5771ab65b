"""Tensors as safetensors files, written and read one tensor at a time; their fingerprints and differences.

The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from runtime.processes.pieces import in_pieces, whole
from runtime.storage.content import PART, Content, OpenFile
from runtime.storage.encoding import no_duplicates
from runtime.storage.folders import CorruptedError, plain_errors

DTYPES = {  # in the order in which the safetensors library writes their tensors
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 10**8  # bytes; what the safetensors library takes too


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's own bytes; what is written there is in the tensor."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())  # numpy has no bf16


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> PackedTensors:
    """Tensors as the bytes of a safetensors file; the same bytes for the same tensors and metadata."""
    return PackedTensors(tensors, metadata or {})


class PackedTensors(Content):
    """A safetensors file, made while it is written, so that it is never held beside the tensors; those that are made
    when they are asked for are there one at a time.

    gathered: whether tensors are in pieces on several processes, which then all must go through its parts.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        order, self.tensors, described = list(DTYPES.values()), tensors, described_of(tensors)
        self.names = sorted(described, key=lambda name: (order.index(described[name].dtype), name))
        self.gathered = any(map(in_pieces, described.values()))
        header, start = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}, 0
        for name in self.names:
            tensor = described[name]
            end = start + tensor.nbytes
            header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that tensors are aligned
        self.header, self.length = len(text).to_bytes(8, "little") + text, 8 + len(text) + start

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[memoryview | bytes]:
        yield self.header
        for name in self.names:
            yield from _parts(whole(self.tensors[name]).detach())


def _parts(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes, in parts."""
    rows = tensor.unsqueeze(0) if tensor.dim() == 0 else tensor
    for some in rows.split(max(1, PART * len(rows) // max(1, tensor.nbytes))):
        yield bytes_of(some.cpu().contiguous())


def described_of(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Shapes and dtypes of tensors by name: those that are made or read when they are asked for have them in
    `described`."""
    return getattr(tensors, "described", tensors)


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each made when it is asked for. described: their shapes and dtypes."""

    def __init__(self, described: Mapping[str, Tensor], make: Mapping[str, Callable[[], Tensor]]) -> None:
        self.described, self._make = described, make

    def __getitem__(self, name: str) -> Tensor:
        return self._make[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.described)

    def __len__(self) -> int:
        return len(self.described)


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, each read when it is asked for, and then the caller's own.

    described: the same on the meta device, with nothing read; metadata: the texts that the file holds beside them.
    """

    def __init__(self, data: bytes | Content, name: str) -> None:
        """name: what messages call the file. Raises CorruptedError where it is no safetensors file."""
        self.file = data if isinstance(data, OpenFile) else OpenFile(io.BytesIO(bytes(data)))
        self.name, self.metadata = name, {}
        self.described: dict[str, Tensor] = {}
        self._starts: dict[str, int] = {}
        try:
            self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
            why = ascii(str(error).partition("\n")[0])[1:-1]  # torch adds a stack to some, a header anything
            raise CorruptedError(f"{name} is not a whole safetensors file: {why}") from None

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.empty(self.described[name].shape, dtype=self.described[name].dtype)
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, tensor: Tensor) -> None:
        """Read a tensor into another of its shape and dtype, which is contiguous and on the CPU."""
        with plain_errors(Path(self.name), "read"):
            self.file.read_into(bytes_of(tensor), self._starts[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.described)

    def __len__(self) -> int:
        return len(self.described)

    def _read(self, start: int, length: int) -> bytes:
        if start + length > len(self.file):
            raise ValueError(f"it is cut short at {len(self.file):,} bytes")
        data = bytearray(length)
        with plain_errors(Path(self.name), "read"):
            self.file.read_into(memoryview(data), start)
        return bytes(data)

    def _read_header(self) -> None:
        length = int.from_bytes(self._read(0, 8), "little")
        if length > LONGEST_HEADER:
            raise ValueError(f"its header would have {length:,} bytes")
        text = self._read(8, length).decode()
        header = json.loads(text, object_pairs_hook=no_duplicates)
        if not text.startswith("{"):
            raise ValueError("its header is no JSON object")
        self.metadata = header.pop("__metadata__", {})
        if not isinstance(self.metadata, dict) or not all(isinstance(text, str) for text in self.metadata.values()):
            raise ValueError("its metadata are not texts")
        ends = [8 + length]
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            self.described[name] = described = _describe(name, **entry)
            self._starts[name] = ends[-1]
            ends.append(ends[-1] + described.nbytes)
            if entry["data_offsets"] != [end - ends[0] for end in ends[-2:]]:
                raise ValueError(f"{name!r} has {described.nbytes:,} bytes, and its place is {entry['data_offsets']}")
        if ends[-1] != len(self.file):
            raise ValueError(f"it has {len(self.file):,} bytes, and its tensors end after {ends[-1]:,}")


def _describe(name: str, *, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    """The tensor of a header's entry on the meta device. Raises ValueError where there can be none."""
    if dtype not in DTYPES:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")
    numbers = [*shape, *data_offsets]
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers) or len(data_offsets) != 2:
        raise ValueError(f"{name!r} has the impossible shape {shape} at {data_offsets}")
    if math.prod(max(size, 1) for size in shape) >= 2**59:  # also where one is 0: strides are products of the others
        raise ValueError(f"{name!r} has the impossible shape {shape}")
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta")


def unpack(data: bytes | Content, name: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises CorruptedError, naming the file, where it is none."""
    return dict(TensorFile(data, name))


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, whatever order or device they are in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(bytes_of(whole(tensor).cpu().contiguous()))
    return digest.hexdigest()


def differences(wanted: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> list[str]:
    """Every tensor that is missing, unexpected or of another shape, in words; dtypes and values may differ."""
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - here.keys())]
    problems += [f"{name} is unexpected" for name in sorted(here.keys() - wanted.keys())]
    shapes = {
        name: (tuple(here[name].shape), tuple(wanted[name].shape)) for name in sorted(wanted.keys() & here.keys())
    }
    return problems + [f"{name} is {shape}, not {right}" for name, (shape, right) in shapes.items() if shape != right]
