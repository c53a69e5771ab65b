"""What is in a GGUF file: sizes, vocabulary and tensors, written one tensor at a time and read back."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.exporting.gguf.layout import Layout
from jobs.exporting.gguf.vocabulary import Vocabulary
from jobs.exporting.kinds import DENSE
from lora.merge import MergedTensors
from models.config import ModelConfig
from runtime.errors import UserError

Tensors = Iterable[tuple[str, np.ndarray, Any]]  # names, bytes and types; gone through more than once
BLOCK = 32  # values that these scale together
WIDE = ("token_embd.weight", "output.weight")  # in 8 bits where others have fewer, as llama.cpp has them in more too


class GGUFTensors:
    """The tensors of a GGUF file, adapters merged, made one at a time. odd: those whose rows are in no blocks."""

    def __init__(self, layout: Layout, kind: str) -> None:
        import gguf

        self.layout, self.config = layout, layout.model.config
        self.types = gguf.GGMLQuantizationType
        self.kind, self.odd = self.types[kind.upper()], []
        self.quantize = gguf.quants.quantize

    def __iter__(self) -> Iterator[tuple[str, np.ndarray, Any]]:
        """Names, bytes and types."""
        self.odd = []
        if (scaling := self.config.rope_scaling) and scaling["rope_type"] == "llama3":
            yield "rope_freqs.weight", _rope_factors(self.config), self.types.F32
        for name, tensor in MergedTensors(self.layout.model, torch.float32).items():
            path, _, leaf = name.rpartition(".")
            values = self.layout.rows(path, tensor).contiguous().numpy()
            theirs = self.layout.name(path, leaf)
            kind = self._type_of(theirs, values)
            yield theirs, self.quantize(values, kind), kind

    def _type_of(self, name: str, values: np.ndarray) -> Any:
        if values.ndim == 1:
            return self.types.F32
        if self.kind.name.lower() in DENSE:
            return self.kind
        if values.shape[-1] % BLOCK:
            self.odd.append(name)
            return self.types.F16
        return self.types.Q8_0 if name in WIDE else self.kind


def _rope_factors(config: ModelConfig) -> np.ndarray:
    """By what llama3's scaling divides each frequency of a head."""
    said, width = config.rope_scaling, config.head_width
    turns = 2 * math.pi * config.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    low, high = said["low_freq_factor"], said["high_freq_factor"]
    share = ((said["original_max_position_embeddings"] / turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / said["factor"] + share)).float().numpy()


def write(
    path: Path, name: str, template: str | list | None, tensors: GGUFTensors, vocabulary: Vocabulary | None
) -> None:
    """Write the whole file, with one tensor in memory at a time beside the model. name: the model's."""
    import gguf

    writer = gguf.GGUFWriter(path, tensors.layout.arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(_file_type(tensors.kind.name))
    _add_sizes(writer, tensors.config)
    _add_vocabulary(writer, vocabulary)
    if vocabulary and template:
        writer.add_chat_template(_with_text(template, vocabulary.template))
    _finish(writer, path, tensors)


def _file_type(kind: str) -> Any:
    from gguf import LlamaFileType

    return LlamaFileType.ALL_F32 if kind == "F32" else LlamaFileType[f"MOSTLY_{kind}"]


def write_adapter(path: Path, arch: str, name: str, base: str, alpha: float, tensors: Tensors) -> None:
    """Write an adapter's file. alpha: by which, divided by its rank, llama.cpp multiplies each product."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base)
    _finish(writer, path, tensors)


def _finish(writer: Any, path: Path, tensors: Tensors) -> None:
    """Write what the writer was told, and then the tensors, which are gone through twice."""
    for theirs, values, kind in tensors:
        writer.add_tensor_info(theirs, values.shape, values.dtype, values.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, values, _ in tensors:
        writer.write_tensor_data(values)
    writer.close()
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _with_text(template: str | list, change: Callable[[str], str]) -> str | list:
    """A template, or several with names, with its text changed."""
    if isinstance(template, str):
        return change(template)
    return [named | {"template": change(named["template"])} for named in template]


def _add_sizes(writer: Any, config: ModelConfig) -> None:
    import gguf

    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.inner_width)
    writer.add_head_count(config.n_head)
    writer.add_vocab_size(config.vocab_size)
    (writer.add_layer_norm_rms_eps if config.norm == "rms" else writer.add_layer_norm_eps)(config.norm_eps)
    if config.positions == "learned":
        return
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_theta)
    if (scaling := config.rope_scaling) and scaling["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])


def _add_vocabulary(writer: Any, vocabulary: Vocabulary | None) -> None:
    from gguf import TokenType

    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        return
    types = [TokenType.UNUSED if token is None else TokenType.NORMAL for token in vocabulary.tokens]
    for ids, kind in ((vocabulary.special, TokenType.CONTROL), (vocabulary.added, TokenType.USER_DEFINED)):
        for i in ids:
            types[i] = kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([f"[PAD{i}]" if token is None else token for i, token in enumerate(vocabulary.tokens)])
    writer.add_token_types(types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.bos_id)
    writer.add_eos_token_id(vocabulary.eos_id)
    writer.add_add_bos_token(vocabulary.puts_bos)


def count_equal(path: Path, tensors: Tensors) -> int:
    """How many tensors the file has, all as they were written. Raises UserError where one is not."""
    from gguf import GGUFReader

    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for name, values, kind in tensors:
        read = found.pop(name, None)
        same = read is not None and read.tensor_type == kind and np.array_equal(_raw(read.data), _raw(values))
        if not same:
            raise UserError(f"{name} is not in the file as it was written; nothing was saved")
    if found:
        raise UserError(f"the file has {', '.join(found)}, which was not written; nothing was saved")
    return sum(1 for _ in tensors)


def _raw(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
