"""torch's own layers, with named adapters on them.

Without an adapter each layer has the state dict, the random initialisation and the output of its torch parent, so a
base checkpoint is the same with and without LoRA. An adapter's tensors are under `lora.<adapter name>`, and the layer's
own tensors never change through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.functional import (
    LowRankLinear,
    added_product,
    at_least_fp32,
    cat_or_none,
    compute_dtype,
    forgotten,
    frozen_linear,
    lora_linear,
    needs_adding,
)
from lora.variants.lora import AdapterModule, LoRA
from runtime.errors import UsageError
from runtime.storage.quantized import Quantized
from runtime.training.recompute import recomputable

MERGED, CACHED = "merged", "cached_weights"  # the context managers that lock a layer
SMALL = 2**20  # values of weights up to which concatenating them for one matmul pays


def weighted_sum(base: Tensor, parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return base + the sum of strength * (tensor - base) over `parts`; one tensor at strength 1 is returned itself."""
    if not parts:
        return base
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    return base + sum(strength * (tensor - base) for tensor, strength in parts)


class Adaptable(nn.Module):
    """A mixin that gives a torch layer named adapters, some of them active, each at a strength."""

    lora: nn.ModuleDict
    active: dict[str, float]  # replaced as a whole, never changed in place
    locked_by: str = ""  # the context manager that refuses changes now

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.lora, self.active = nn.ModuleDict(), {}

    def __getstate__(self) -> dict:
        """Leave the lock and the cache out of pickles and copies."""
        return {key: value for key, value in self.__dict__.items() if key not in ("locked_by", "cache")}

    def active_modules(self) -> dict[AdapterModule, float]:
        """Return the modules of the active adapters that have one on this layer, each with its strength."""
        return {self.lora[name]: strength for name, strength in self.active.items() if name in self.lora}

    def effective(self, name: str) -> Tensor | None:
        """Return this layer's tensor `name` with the active adapters' copies applied, in its own dtype."""
        base = getattr(self, name)
        # no walrus here: its cell variable breaks torch.compile's graph
        copies = [(m.copy_of(name), s) for m, s in self.active_modules().items() if m.copy_of(name) is not None]
        return weighted_sum(base, copies).to(base.dtype) if copies else base

    def effective_tensors(self) -> dict[str, Tensor]:
        """Return every base tensor of this layer with the active adapters applied, in its own dtype."""
        return {name: self.effective(name) for name in self.base_tensors()}

    def base_tensors(self) -> dict[str, Tensor]:
        """Return the layer's own tensors by name, without any adapter."""
        return dict(self.named_parameters(recurse=False))

    def check_unlocked(self) -> None:
        """Raises UsageError inside `merged` and `cached_weights`, where weights and adapters must not change."""
        if self.locked_by:
            block = f"with {self.locked_by}(model):"
            raise UsageError(f"inside `{block}`, weights and adapters cannot be changed; leave that block first")

    def _load_from_state_dict(self, *args) -> None:
        """Load the base's tensors, and sync untrained adapters with them; torch loads the adapters' own afterwards."""
        self.check_unlocked()
        super()._load_from_state_dict(*args)
        for module in self.lora.values():
            module.sync_with_base(self.base_tensors())


class LoRALinear(Adaptable, nn.Linear):
    """An `nn.Linear` with any number of adapters."""

    cache: dict | None = None  # inside `cached_weights`: effective weights and biases, computed once

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight, (out, in), however it is stored."""
        return self.out_features, self.in_features

    def variants(self) -> dict[LoRA, float]:
        """Return the active modules that change the weight of this layer, each with its strength."""
        return {module: s for module, s in self.active_modules().items() if isinstance(module, LoRA)}

    def sole_variant(self) -> LoRA | None:
        """Return the only module that changes the weight, if it is at strength 1: its fast path serves then."""
        found = self.variants()
        return next(iter(found)) if list(found.values()) == [1] else None

    def effective_weight(self) -> Tensor:
        """Return the weight with the active adapters applied, in its own dtype or fp32, whichever is more precise;
        without any, the weight itself."""
        W = self.dense_weight()
        if not self.variants():
            return W
        W = at_least_fp32(W)
        with torch.autocast(W.device.type, enabled=False):  # below W's precision, small changes vanish
            return weighted_sum(W, [(module.effective_weight(W), s) for module, s in self.variants().items()])

    def effective_tensors(self) -> dict[str, Tensor]:
        return super().effective_tensors() | {"weight": self.effective_weight()}

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the values of the weight (out, in), in a dtype or in its own. All code reads the weight through here,
        so that a subclass may store it otherwise.

        No converted copy is cached between calls: a write through `weight.data`, as PEFT merges, or by a fused
        optimizer does not raise the version counter, so a stale copy could not be detected.
        """
        return self.weight if dtype is None else self.weight.to(dtype)

    def base_tensors(self) -> dict[str, Tensor]:
        return super().base_tensors() | {"weight": self.dense_weight()}

    def bias_in(self, dtype: torch.dtype) -> Tensor | None:
        """Return the bias with the active adapters applied, in a dtype; None without one."""
        bias = self.effective("bias")
        return None if bias is None else bias.to(dtype)

    def low_rank_sum(self) -> LowRankLinear | None:
        """Return the weight and what all active adapters add to it; None where an adapter adds more than a low rank."""
        variants = self.variants()
        if any(variant.full_rank for variant in variants):
            return None
        parts = [(v.low_rank_linear(self.dense_weight(), None), s) for v, s in variants.items()]
        A, B = torch.cat([part.A for part, _ in parts]), torch.cat([part.B * part.scale * s for part, s in parts], 1)
        return LowRankLinear(self.dense_weight(), self.effective("bias"), A, B, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out), in the compute dtype. Only a sole adapter at strength 1 applies dropout."""
        dtype = compute_dtype(x)
        if self.cache is not None and not torch.is_grad_enabled():
            return _cached_product((self,), x.to(dtype))[0]
        if not self.variants():
            W, bias = self.dense_weight(), self.bias_in(dtype)
            if not W.requires_grad and forgotten(W):
                return frozen_linear(x.to(dtype), [W], bias)
            return F.linear(x, recomputable(W.to(dtype), lambda: W.to(dtype)), bias)
        if variant := self.sole_variant():
            return variant(x.to(dtype), self.dense_weight(), self.effective("bias"))
        if not needs_adding(self.dense_weight(), dtype):
            return F.linear(x, self.effective_weight().to(dtype), self.bias_in(dtype))
        if part := self.low_rank_sum():
            return lora_linear(x.to(dtype), [part])[0]
        with torch.autocast(x.device.type, enabled=False):  # slow, but nothing is lost
            return F.linear(x.float(), self.effective_weight(), self.bias_in(torch.float32)).to(dtype)


def _is_plain(layer: nn.Module) -> bool:
    """Return whether calling the layer runs `LoRALinear.forward` and nothing else."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return type(layer) is LoRALinear and not any(hooks) and "forward" not in vars(layer)


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return tensors (n, m) as one, uncopied, where they lie one after the other in memory; else None."""
    first, place = tensors[0], tensors[0].storage_offset()
    if any(isinstance(t, Quantized) for t in tensors):
        return None
    for t in tensors:
        here = t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and t.storage_offset() == place
        if not (here and t.is_contiguous() and t.dtype == first.dtype):
            return None
        place += t.numel()
    return first.detach().as_strided((sum(map(len, tensors)), first.shape[1]), first.stride())


class _Cached(NamedTuple):
    """What `_cached_product` needs: a weight in the compute dtype, or one with a low-rank update to be added."""

    W: Tensor
    bias: Tensor | None
    A: Tensor | None = None
    B: Tensor | None = None


def _joined_cache(found: list[_Cached]) -> list[_Cached]:
    """Return the tensors of several linears as those of one, where that costs no copy of large weights."""
    Ws, biases, As, Bs = zip(*found, strict=True)
    unlike = len({W.dtype for W in Ws}) > 1 or len({A is None for A in As}) > 1
    if len(found) == 1 or unlike or any(isinstance(W, Quantized) for W in Ws):
        return found
    W = joined(Ws)
    if W is None and sum(W.numel() for W in Ws) > SMALL:
        return found
    W = torch.cat(Ws) if W is None else W
    low = (None, None) if As[0] is None else (torch.cat(As), torch.block_diag(*Bs))
    return [_Cached(W, cat_or_none(biases), *low)]


def _cached_tensors(layer: LoRALinear, dtype: torch.dtype) -> _Cached:
    """Return a layer's effective weight and bias in a dtype, or what they are made of where rounding would lose it, or
    where the weight is in 4 or 8 bits: dense copies of all such weights would take the memory that these save."""
    W, bias = layer.dense_weight(), layer.bias_in(dtype)
    quantized = isinstance(W, Quantized)
    if not layer.variants():
        return _Cached(W if quantized else W.to(dtype), bias)
    if not quantized and not needs_adding(W, dtype):
        return _Cached(layer.effective_weight().to(dtype), bias)
    if part := layer.low_rank_sum():
        return _Cached(W if quantized else W.to(dtype), bias, part.A.to(dtype), part.B.to(dtype))
    return _Cached(layer.effective_weight(), layer.bias_in(torch.float32))


def _cached_product(layers: tuple[LoRALinear, ...], x: Tensor) -> list[Tensor]:
    """Apply linears to one input (..., in) in the compute dtype, by what the first layer's cache holds of them.

    One matmul serves weights that lie together or are small; a copy of large ones would take more memory than it saves
    time.
    """
    cache, key = layers[0].cache, (layers, tuple(layers[0].active.items()), x.dtype)
    if key not in cache:
        cache[key] = _joined_cache([_cached_tensors(layer, x.dtype) for layer in layers])
    ys = [_product(x, *each) for each in cache[key]]
    return ys if len(ys) == len(layers) else list(ys[0].split([layer.out_features for layer in layers], -1))


def _product(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor | None, B: Tensor | None) -> Tensor:
    if A is not None:
        tokens = x.reshape(-1, x.shape[-1])
        return added_product(tokens, tokens @ A.t(), W.to(x.dtype), B, bias).view(*x.shape[:-1], len(W))
    if W.dtype == x.dtype or isinstance(W, Quantized):  # in x's dtype, which is the one that autocast would choose
        return F.linear(x, W.to(x.dtype), bias)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(W.dtype), W, bias).to(x.dtype)


def fused_projection(layers: tuple[LoRALinear, ...], x: Tensor) -> list[Tensor]:
    """Apply linears to one input (..., in), as q, k and v: their outputs (..., out) each.

    One matmul computes all of them if they are plain `LoRALinear`s that take the same path. Otherwise each is called,
    so that no wrapper, hook or variant is bypassed.
    """
    dtype, cache = compute_dtype(x), getattr(layers[0], "cache", None)  # a wrapper has none
    if cache is not None and not torch.is_grad_enabled():
        if layers not in cache:
            cache[layers] = all(map(_is_plain, layers))
        return _cached_product(layers, x.to(dtype)) if cache[layers] else [layer(x) for layer in layers]
    if len(layers) > 1 and all(map(_is_plain, layers)):
        biases = [layer.bias_in(dtype) for layer in layers]
        if not any(layer.variants() for layer in layers):
            if sum(layer.weight.numel() for layer in layers) > SMALL:
                return [layer(x) for layer in layers]
            y = _joined_projection([layer.dense_weight() for layer in layers], x.to(dtype), cat_or_none(biases))
            return list(y.split([layer.out_features for layer in layers], -1))
        variants = [layer.sole_variant() for layer in layers]
        if len({type(v) for v in variants}) == 1 and None not in variants and torch.is_grad_enabled():
            weights = [layer.dense_weight() for layer in layers]
            parts = [v.low_rank_linear(W, bias) for v, W, bias in zip(variants, weights, biases, strict=True)]
            return lora_linear(x.to(dtype), parts, variants[0].dropout)
    return [layer(x) for layer in layers]


def _joined_projection(Ws: list[Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    """x times weights under each other, for x (..., in) in the compute dtype."""
    dtype = x.dtype  # what makes the weight again must not hold x

    def weight() -> Tensor:
        return torch.cat([W.to(dtype) for W in Ws])

    if any(map(forgotten, Ws)) and not any(W.requires_grad for W in Ws):
        return frozen_linear(x, Ws, bias)
    return F.linear(x, recomputable(weight(), weight), bias)


class LoRAEmbedding(Adaptable, nn.Embedding):
    """An `nn.Embedding` whose adapters have their own trained copy of it."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # where there is nothing to draw, and torch imports 800 modules to draw it
            super().reset_parameters()

    def forward(self, idx: Tensor) -> Tensor:
        """Map token ids of any shape to (*shape, embedding_dim)."""
        options = (self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
        return F.embedding(idx, self.effective("weight"), *options)


class LoRALayerNorm(Adaptable, nn.LayerNorm):
    """An `nn.LayerNorm` whose adapters may have their own trained bias (`LORA_BIAS=all`)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., dim) in its own dtype; the shape stays."""
        weight, bias = (None if t is None else t.to(x.dtype) for t in (self.weight, self.effective("bias")))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
