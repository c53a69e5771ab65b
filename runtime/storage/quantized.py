"""Frozen matrices that are stored in 4 or 8 bits, as bitsandbytes stores them and transformers writes them to files.

A quantised matrix is a tensor like any other: it has the shape, the dtype and, rounded, the values of the matrix that
it was made of. Whatever is computed with it is computed with its dequantised values, which are made for that and not
kept. It cannot be changed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from runtime.errors import UserError
from runtime.extras import bitsandbytes

BLOCK = 64  # values that have one scale in nf4
PIECE = 2**18  # values that are quantised at once
WEIGHT = "weight"

aten = torch.ops.aten


class Quantized(Tensor):
    """A matrix (out, in) in one of the FORMS. parts: the tensors that hold it, by what a file calls them after the path
    of the linear; the values are in `weight`.
    """

    form: ClassVar[str]
    names: ClassVar[re.Pattern]  # of parts
    mark: ClassVar[str]  # the part by which a file's matrices in this form are told
    parts: dict[str, Tensor]
    about: tuple = ()  # what else it is made with, where the parts themselves may not be read

    @staticmethod
    def __new__(cls, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype, *about: Any) -> Quantized:
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=parts[WEIGHT].device)

    def __init__(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
        self.parts = dict(parts)

    @classmethod
    def quantize(cls, W: Tensor) -> Quantized:
        """The matrix W (out, in) in this form."""
        raise NotImplementedError

    @classmethod
    def described(cls, parts: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of the matrix that a file's parts hold; `dtype` where they do not tell it. Of the values only
        their description is needed, which may be on the meta device.

        Raises ValueError for parts that do not fit together: the kernels read memory as they are told.
        """
        raise NotImplementedError

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Its values (out, in) as a new tensor, rounded to its own dtype, in that or in another."""
        raise NotImplementedError

    def scales_are_finite(self) -> bool:
        """Whether the matrix that this was made of was finite: a value that is not spoils its scale."""
        raise NotImplementedError

    @classmethod
    def bytes_of(cls, shape: torch.Size) -> int:
        """What a matrix of a shape takes in this form."""
        raise NotImplementedError

    @property
    def stored_bytes(self) -> int:
        """What it takes in memory."""
        return sum(part.nbytes for part in self.parts.values())

    def moved(self, move: Callable[[Tensor], Tensor]) -> Quantized:
        """The same with each part moved or copied."""
        parts = {name: move(part) for name, part in self.parts.items()}
        return type(self)(parts, self.shape, self.dtype, *self.about)

    def __tensor_flatten__(self) -> tuple[list[str], tuple]:
        for i, part in enumerate(self.parts.values()):
            setattr(self, f"part_{i}", part)  # torch.compile takes no names with dots
        return [f"part_{i}" for i in range(len(self.parts))], (tuple(self.parts), self.dtype, *self.about)

    @classmethod
    def __tensor_unflatten__(cls, inner: Mapping[str, Tensor], about: tuple, size: torch.Size, stride: Any) -> Tensor:
        names, *others = about
        return cls({name: inner[f"part_{i}"] for i, name in enumerate(names)}, size, *others)

    def __deepcopy__(self, memo: dict) -> Quantized:
        return self.moved(torch.clone)

    def __repr__(self, **_: Any) -> str:
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op is aten.detach.default:
            return args[0].moved(lambda part: part)
        if op is aten.clone.default:
            return args[0].moved(torch.clone)
        if op is aten._to_copy.default and isinstance(args[0], Quantized):
            matrix, dtype, device = args[0], kwargs.get("dtype"), kwargs.get("device")
            if dtype not in (None, matrix.dtype):
                return matrix.dense(dtype).to(device or matrix.device)
            # Where only the device was asked for, torch names the dtype all the same.
            return matrix if device is None else matrix.moved(lambda part: part.to(device))
        if op._schema.is_mutable and isinstance(args[0], Quantized):
            raise TypeError(f"a matrix in {args[0].form} cannot be changed")
        dense = pytree.tree_map_only(Quantized, lambda matrix: matrix.dense(), (args, kwargs))
        return op(*dense[0], **dense[1])


class NF4(Quantized):
    """4 bits a value, whose 16 levels are quantiles of a normal distribution, and a scale for each 64 values, which
    is itself kept in 8 bits: 4.127 bits in all. Files whose scales are in fp32 are read too.

    Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.
    """

    form = "nf4"
    names = re.compile(r"weight(\..+)?")
    mark = "weight.quant_state.bitsandbytes__nf4"  # a JSON object as bytes

    @classmethod
    def bytes_of(cls, shape: torch.Size) -> int:
        scales = -(-shape.numel() // BLOCK)
        tables = 4 * (16 + 256)  # of the levels of values and of scales
        return -(-shape.numel() // 2) + scales + 4 * -(-scales // 256) + tables

    @classmethod
    def quantize(cls, W: Tensor) -> NF4:
        # What bitsandbytes does of a whole matrix, with the same bits, and not with several of its size in fp32.
        library, data, scales = bitsandbytes(), [], []
        for values in W.view(-1).split(PIECE):
            packed, state = library.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
            data.append(packed)
            scales.append(state.absmax)
        scales = torch.cat(scales)
        nested = {"offset": scales.mean()}
        nested["absmax"], nested["state2"] = library.quantize_blockwise(scales - nested["offset"], blocksize=256)
        about = {"shape": W.shape, "dtype": W.dtype, "blocksize": BLOCK, "code": state.code, "quant_type": "nf4"}
        stored = library.QuantState(**about, **nested).as_dict(packed=True)
        return cls(
            {WEIGHT: torch.cat(data)} | {f"{WEIGHT}.{name}": part for name, part in stored.items()}, W.shape, W.dtype
        )

    def __init__(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype, told: str = "") -> None:
        """told: the JSON object, where it was read before."""
        super().__init__(parts, shape, dtype)
        self.about = (told or bytes(parts[self.mark].tolist()).decode(),)
        state = {
            name.removeprefix(f"{WEIGHT}."): part for name, part in parts.items() if name not in (WEIGHT, self.mark)
        }
        state |= json.loads(self.about[0])
        self.state = bitsandbytes().QuantState.from_dict(state, parts[WEIGHT].device)
        if self.state.nested:  # a number, as torch.compile would not know where a tensor is from
            self.state.offset = float(state["nested_offset"])

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return bitsandbytes().dequantize_4bit(self.parts[WEIGHT], self.state).to(dtype or self.dtype)

    def scales_are_finite(self) -> bool:
        return math.isfinite(self.state.offset)  # the mean of all scales

    @classmethod
    def described(cls, parts: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[torch.Size, torch.dtype]:
        about = json.loads(bytes(parts[cls.mark].tolist()))
        shape, dtype = torch.Size(about["shape"]), getattr(torch, about["dtype"])
        blocks = -(-shape.numel() // about["blocksize"])
        wanted = {WEIGHT: (torch.uint8, -(-shape.numel() // 2)), "weight.quant_map": (torch.float32, 16)}
        if nested := about.get("nested_blocksize"):
            wanted |= {"weight.absmax": (torch.uint8, blocks), "weight.nested_quant_map": (torch.float32, 256)}
            wanted |= {"weight.nested_absmax": (torch.float32, -(-blocks // nested))}
        else:
            wanted |= {"weight.absmax": (torch.float32, blocks)}
        _check(parts, wanted)
        return shape, dtype


class Int8(Quantized):
    """8 bits a value, and a scale for each row.

    Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv 2208.07339, whose
    form of a weight this is; products are made with the dequantised weight.
    """

    form = "int8"
    names = re.compile("weight|weight_format|SCB")
    mark = "SCB"  # the scales (out,)

    @classmethod
    def bytes_of(cls, shape: torch.Size) -> int:
        return shape.numel() + 4 * shape[0]

    @classmethod
    def quantize(cls, W: Tensor) -> Int8:
        data, scales, _ = bitsandbytes().int8_vectorwise_quant(W.half())  # in fp16, as transformers does it
        return cls({WEIGHT: data, cls.mark: scales}, W.shape, W.dtype)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        values = bitsandbytes().int8_vectorwise_dequant(self.parts[WEIGHT], self.parts[self.mark])
        return values.to(self.dtype).to(dtype or self.dtype)

    def scales_are_finite(self) -> bool:
        return bool(self.parts[self.mark].isfinite().all())

    @classmethod
    def described(cls, parts: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[torch.Size, torch.dtype]:
        shape = parts[WEIGHT].shape
        _check(parts, {WEIGHT: (torch.int8, shape.numel()), cls.mark: (torch.float32, shape[0])})
        if "weight_format" in parts and parts["weight_format"].item():  # of CUDA cards before 2018
            raise ValueError("its values are not in rows")
        return shape, dtype


FORMS: dict[str, type[Quantized]] = {cls.form: cls for cls in (NF4, Int8)}


def _check(parts: Mapping[str, Tensor], wanted: Mapping[str, tuple[torch.dtype, int]]) -> None:
    """Raises ValueError for a part that is missing, or of another dtype or length."""
    for name, what in wanted.items():
        if name not in parts:
            raise ValueError(f"{name} is missing")
        if (parts[name].dtype, parts[name].numel()) != what:
            raise ValueError(
                f"{name} has {parts[name].numel():,} values in {parts[name].dtype}, not {what[1]:,} in {what[0]}"
            )


def parts_among(names: Collection[str]) -> dict[str, tuple[str, dict[str, str]]]:
    """Of the names in a file, those of matrices in 4 or 8 bits: of each its form, and its parts' names there by what
    they are called."""
    found = {}
    for form, cls in FORMS.items():
        for path in (name.removesuffix(f".{cls.mark}") for name in names if name.endswith(f".{cls.mark}")):
            parts = {name.removeprefix(f"{path}."): name for name in names if name.startswith(f"{path}.")}
            found[f"{path}.{WEIGHT}"] = form, {part: name for part, name in parts.items() if cls.names.fullmatch(part)}
    return found


def quantize(form: str, W: Tensor, name: str) -> Quantized:
    """The matrix W (out, in) in one of the FORMS. name: what messages call it.

    Raises UserError for a matrix that is not finite, since one value would spoil its block, or does not divide into
    blocks.
    """
    if form == NF4.form and W.numel() % BLOCK:
        raise UserError(f"{name} has {W.numel():,} values, which do not divide into blocks of {BLOCK} for {form}")
    made = FORMS[form].quantize(W.detach().contiguous())
    if not made.scales_are_finite():
        raise UserError(f"{name} has values that are not finite, or too large, and cannot be quantised")
    return made


def config_of_form(form: str, dtype: str) -> dict[str, Any]:
    """What a config.json says as `quantization_config`, so that transformers reads the matrices of a file so."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": form == NF4.form,
        "load_in_8bit": form == Int8.form,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }


def check_config(values: Mapping[str, Any]) -> None:
    """Raises ValueError for a `quantization_config` of which we read no matrices."""
    method = values.get("quant_method")
    if method != "bitsandbytes":
        raise ValueError(f"quantization_config.quant_method={method!r} is not supported; bitsandbytes is")
    if values.get("load_in_4bit") and (kind := values.get("bnb_4bit_quant_type", "fp4")) != "nf4":
        raise ValueError(f"quantization_config.bnb_4bit_quant_type={kind!r} is not supported; nf4 is")
