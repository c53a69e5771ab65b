"""The tensors in a model's folder by our names, in whatever format, number of files and form they are stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from models.pretrained.families import BUFFERS, Family
from runtime.errors import UserError, join_problems
from runtime.storage.encoding import read_json
from runtime.storage.folders import CorruptedError, Files
from runtime.storage.quantized import FORMS, WEIGHT, parts_among
from runtime.storage.tensors import TensorFile

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # which file has which tensor, where there are several
HEAD, EMBEDDING = "lm_head.weight", "token_embedding.weight"


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a model's folder by our names, each read when it is asked for.

    described: the same on the meta device, with nothing read; a matrix in 4 or 8 bits is one tensor. A tied head is
    not among them. forms: of matrices in 4 or 8 bits, by name.
    """

    def __init__(self, files: Files, where: str, family: Family | None, tied: bool) -> None:
        """Raises UserError for shards that are missing or cut, and a head that is not what the config says,
        CorruptedError for parts of a matrix in 4 or 8 bits that do not fit together."""
        self.family, self.where = family, where
        self.described: dict[str, Tensor] = {}
        self.forms: dict[str, str] = {}
        self._files = {stored: file for file, stored in self._stored(files) if not (family and _is_buffer(stored))}
        self._quantized = parts_among(self._files)
        parts = {name for stored, (_, parts) in self._quantized.items() for name in parts.values() if name != stored}
        self._stored_names = {self._our_name(stored): stored for stored in self._files if stored not in parts}
        for name, stored in self._stored_names.items():
            if stored not in self._quantized:
                described = self._files[stored].described[stored]
                self.described[name] = described.t() if self._is_transposed(name, described) else described
        for name, stored in self._stored_names.items():
            if stored in self._quantized:
                self.forms[name], _ = self._quantized[stored]
                self.described[name] = self._describe_quantized(stored)
        if family and tied:
            self._tie()
        elif family and HEAD not in self.described:
            raise UserError(f"{where}: tie_word_embeddings is false, and there is no {family.theirs('lm_head')}.weight")

    def _describe_quantized(self, stored: str) -> Tensor:
        """The matrix that is called so in the file, on the meta device."""
        form, names = self._quantized[stored]
        parts = {key: self._read(name) for key, name in names.items() if name != stored}
        parts[WEIGHT] = self._files[stored].described[stored]
        dtypes = [tensor.dtype for tensor in self.described.values() if tensor.is_floating_point()]
        try:
            shape, dtype = FORMS[form].described(parts, dtypes[0] if dtypes else torch.float32)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise CorruptedError(f"{self.where}: {stored}, stored in {form}, is corrupted: {error}") from None
        return torch.empty(shape, dtype=dtype, device="meta")

    def _read(self, stored: str) -> Tensor:
        return self._files[stored][stored]

    def _stored(self, files: Files) -> Iterator[tuple[TensorFile, str]]:
        """Every tensor's file and name there."""
        if INDEX not in files:
            file = TensorFile(files[WEIGHTS], f"{self.where}/{WEIGHTS}")
            yield from ((file, name) for name in file)
            return
        places = read_json(files[INDEX], f"{self.where}/{INDEX}").get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise CorruptedError(f"{self.where}/{INDEX} is corrupted: weight_map is {places!r:.60}")
        if gone := sorted(set(places.values()) - files.keys()):
            raise UserError(f"{self.where}: {join_problems(gone)} is missing, which {INDEX} names")
        shards = {name: TensorFile(files[name], f"{self.where}/{name}") for name in sorted(set(places.values()))}
        for name, place in places.items():
            if name not in shards[place]:
                raise UserError(f"{self.where}/{place}: {name} is missing, which {INDEX} says is there")
            yield shards[place], name

    def _our_name(self, stored: str) -> str:
        if self.family is None:
            return stored
        path, _, leaf = stored.rpartition(".")
        try:
            return f"{self.family.ours(path)}.{leaf}"
        except KeyError:
            return stored  # which no model has

    def _is_transposed(self, name: str, tensor: Tensor) -> bool:
        path, _, leaf = name.rpartition(".")
        return bool(self.family) and leaf == "weight" and self.family.is_transposed(path) and tensor.dim() == 2

    def _tie(self) -> None:
        """Leave out the head of a tied model. Raises UserError where it is stored and is not the embedding."""
        if HEAD not in self.described:
            return
        if EMBEDDING not in self.described:
            self._stored_names[EMBEDDING] = self._stored_names[HEAD]
            self.described[EMBEDDING] = self.described[HEAD]
        elif not torch.equal(self[HEAD], self[EMBEDDING]):
            theirs = [f"{self.family.theirs(path)}.weight" for path in ("lm_head", "token_embedding")]
            raise UserError(f"{self.where}: tie_word_embeddings is true, and {' and '.join(theirs)} differ")
        del self._stored_names[HEAD], self.described[HEAD]

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored_names[name]
        if form := self.forms.get(name):
            parts = {key: self._read(part) for key, part in self._quantized[stored][1].items()}
            return FORMS[form](parts, self.described[name].shape, self.described[name].dtype)
        tensor = self._read(stored)
        return tensor.t().contiguous() if self._is_transposed(name, tensor) else tensor

    def read_into(self, name: str, tensor: Tensor) -> None:
        """Read a tensor into another of its shape, in any dtype, without holding it twice where that can be."""
        stored = self._stored_names[name]
        if tensor.dtype == self.described[name].dtype and not self._is_transposed(name, tensor):
            self._files[stored].read_into(stored, tensor)
        else:
            tensor.copy_(self[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.described)

    def __len__(self) -> int:
        return len(self.described)


def _is_buffer(stored: str) -> bool:
    return bool(BUFFERS.fullmatch(stored))
