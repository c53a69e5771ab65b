"""A base's folder <-> the model: `config.json` with its config, `model.safetensors` with its weights.

Both are ours or a family's (`models/pretrained/families.py`); `config.json` tells which.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lora.attach import base_tensors
from models.config import ModelConfig
from models.pretrained.families import BUFFERS, Family, config_of, family_of
from models.transformer import Transformer
from runtime.errors import UserError, join_problems
from runtime.storage.encoding import read_json, to_json
from runtime.storage.folders import CorruptedError, Files
from runtime.storage.tensors import NAMES as DTYPE_NAMES
from runtime.storage.tensors import TensorFile, differences, fingerprint, pack

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # which file has which tensor, where there are several
KEPT = (CONFIG, "generation_config.json")  # what a model that is made from a pretrained one has of its files
HEAD, EMBEDDING = "lm_head.weight", "token_embedding.weight"


def read_values(files: Files, where: str) -> dict[str, Any]:
    """What config.json says. Raises UserError where it or the weights are missing."""
    if CONFIG not in files or not {WEIGHTS, INDEX} & set(files):
        raise UserError(f"{where} holds no model: {CONFIG} and {WEIGHTS} are needed")
    return read_json(files[CONFIG], f"{where}/{CONFIG}")


def family_in(files: Files, where: str) -> Family | None:
    """The family in whose format these files are; None for ours."""
    return family_of(read_values(files, where), f"{where}/{CONFIG}")


def config_from(files: Files, where: str) -> ModelConfig:
    """The config of the model that these files hold. Raises UserError where it is missing or makes no sense."""
    values, name = read_values(files, where), f"{where}/{CONFIG}"
    if family := family_of(values, name):
        return config_of(family, values, name)
    try:
        return ModelConfig.from_dict(values)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except (ValueError, TypeError) as error:
        raise CorruptedError(f"{name} is corrupted: {error}") from None


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a model's folder by our names, each read when it is asked for.

    described: the same on the meta device, with nothing read. A tied head is not among them.
    """

    def __init__(self, files: Files, where: str, family: Family | None, tied: bool) -> None:
        """Raises UserError for shards that are missing or cut, and a head that is not what the config says."""
        self.family, self.where = family, where
        self.described: dict[str, Tensor] = {}
        self._places: dict[str, tuple[TensorFile, str]] = {}
        for file, stored in self._stored(files):
            if not (family and _is_buffer(stored)):
                name = self._our_name(stored)
                described = file.described[stored]
                self._places[name] = file, stored
                self.described[name] = described.t() if self._is_transposed(name, described) else described
        if family and tied:
            self._tie()
        elif family and HEAD not in self.described:
            raise UserError(f"{where}: tie_word_embeddings is false, and there is no {family.theirs('lm_head')}.weight")

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
            self._places[EMBEDDING], self.described[EMBEDDING] = self._places[HEAD], self.described[HEAD]
        elif not torch.equal(self[HEAD], self[EMBEDDING]):
            theirs = [f"{self.family.theirs(path)}.weight" for path in ("lm_head", "token_embedding")]
            raise UserError(f"{self.where}: tie_word_embeddings is true, and {' and '.join(theirs)} differ")
        del self._places[HEAD], self.described[HEAD]

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._places[name]
        tensor = file[stored]
        return tensor.t().contiguous() if self._is_transposed(name, tensor) else tensor

    def read_into(self, name: str, tensor: Tensor) -> None:
        """Read a tensor into another of its shape, in any dtype, without holding it twice where that can be."""
        file, stored = self._places[name]
        if tensor.dtype == self.described[name].dtype and not self._is_transposed(name, tensor):
            file.read_into(stored, tensor)
        else:
            tensor.copy_(self[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.described)

    def __len__(self) -> int:
        return len(self.described)


def _is_buffer(stored: str) -> bool:
    return bool(BUFFERS.fullmatch(stored))


def to_files(model: Transformer, like: Files | None = None) -> Files:
    """The model's base as files, ready to be committed; adapters are not in it.

    like: files of the base that it was made from, whose format and config it keeps; without any they are ours. Raises
    UserError for a head that is tied against the config.
    """
    tensors, tied = base_tensors(model), model.lm_head.weight is model.token_embedding.weight
    if tied != model.config.tied_head:
        shared = "share one weight" if tied else "have two weights"
        raise UserError(f"lm_head and token_embedding {shared}, and the model's config has tied_head={not tied}")
    if tied:
        del tensors[HEAD]
    values = read_json(like[CONFIG], CONFIG) if like else {}
    if not (family := family_of(values, CONFIG) if values else None):
        return {CONFIG: to_json(model.config.as_dict()), WEIGHTS: pack(tensors)}
    values = {name: value for name, value in values.items() if name not in ("dtype", "torch_dtype")}
    values["torch_dtype"] = str(tensors[EMBEDDING].dtype).removeprefix("torch.")
    return {**like, CONFIG: to_json(values), WEIGHTS: pack(_their_tensors(tensors, family), {"format": "pt"})}


def _their_tensors(tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        found[f"{family.theirs(path)}.{leaf}"] = (
            tensor.t() if leaf == "weight" and family.is_transposed(path) else tensor
        )
    return found


def load_weights(model: Transformer, files: Files, where: str) -> None:
    """Copy a base's weights into a model without adapters.

    Raises UserError that names what is missing, unexpected or misshapen, all together, before the model is touched.
    """
    tensors = stored_tensors(files, where, model.config)
    _check_fit(model, tensors, where)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


def stored_tensors(files: Files, where: str, config: ModelConfig) -> StoredTensors:
    """The tensors that these files hold, by our names."""
    return StoredTensors(files, where, family_in(files, where), config.tied_head)


def stored_fingerprint(files: Files, where: str) -> str:
    """The fingerprint of the base that these files hold, read one tensor at a time."""
    config = config_from(files, where)
    tensors = stored_tensors(files, where, config)
    return fingerprint(ChainMap({HEAD: tensors[EMBEDDING]} if config.tied_head else {}, tensors))


def _check_size(config: ModelConfig, tensors: StoredTensors, where: str) -> None:
    """Raises CorruptedError for a config that needs more weights than there are, before anybody makes room for them."""
    positions = config.max_positions if config.positions == "learned" else 0
    least = (config.vocab_size + positions) * config.n_embd
    if least > sum(tensor.numel() for tensor in tensors.described.values()) or config.n_layer > len(tensors):
        raise CorruptedError(f"{where}/{WEIGHTS} holds fewer weights than {CONFIG} needs")


def _check_fit(model: Transformer, tensors: StoredTensors, where: str) -> None:
    """Raises UserError for tensors that are not the model's, by the names that they have in the file."""

    def stored(name: str) -> str:
        path, _, leaf = name.rpartition(".")
        return f"{tensors.family.theirs(path)}.{leaf}" if tensors.family and name in wanted else name

    wanted = dict(model.named_parameters())
    if problems := differences(
        {stored(name): p for name, p in wanted.items()}, {stored(name): t for name, t in tensors.described.items()}
    ):
        raise UserError(f"{where}/{WEIGHTS} does not fit its {CONFIG}: {join_problems(sorted(problems))}")
    for name, tensor in tensors.described.items():
        if not tensor.dtype.is_floating_point:
            raise UserError(f"{where}: {stored(name)} is stored as {DTYPE_NAMES[tensor.dtype]}, which is not supported")


def from_files(
    files: Files, where: str, dropout: float = 0.0, dtype: torch.dtype | None = torch.float32
) -> Transformer:
    """The model that these files hold, on the CPU, with no adapter, in a dtype, or None for the files' own."""
    config = config_from(files, where)
    tensors = stored_tensors(files, where, config)
    _check_size(config, tensors, where)
    model = Transformer(config, dropout, "meta")  # nothing is drawn that would be overwritten
    _check_fit(model, tensors, where)
    for names in model.weights_of_one_input():
        described = [tensors.described[name] for name in names]
        dtypes = {dtype or tensor.dtype for tensor in described}
        if len(dtypes) == 1:  # together in memory, so that one matmul serves them uncopied
            whole = torch.empty(sum(map(len, described)), *described[0].shape[1:], dtype=dtypes.pop())
            parts = whole.split([len(tensor) for tensor in described])
        else:
            parts = [torch.empty(tensor.shape, dtype=dtype or tensor.dtype) for tensor in described]
        for name, part in zip(names, parts, strict=True):
            tensors.read_into(name, part)
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, torch.nn.Parameter(part))
    model.tie_head()
    return model
