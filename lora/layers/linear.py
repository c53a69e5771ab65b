"""Linears with adapters, by themselves and several of one input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.functional import (
    LowRankLinear,
    at_least_fp32,
    cat_or_none,
    compute_dtype,
    forgotten,
    frozen_linear,
    lora_linear,
    needs_adding,
)
from lora.layers.adaptable import Adaptable, weighted_sum
from lora.layers.inference import RANKS, SMALL, Cached, Prepared, joined_cache, product
from lora.variants.lora import LoRA
from runtime.storage.quantized import Quantized
from runtime.training.recompute import recomputable


class LoRALinear(Adaptable, nn.Linear):
    """An `nn.Linear` with any number of adapters."""

    # Inside `cached_weights`: what this linear, or several of which it is the first, compute with, made once.
    cache: dict[tuple[LoRALinear, ...], Prepared] | None = None

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

    def changes(self, name: str) -> bool:
        return bool(self.variants()) if name == "weight" else super().changes(name)

    def effective(self, name: str) -> Tensor | None:
        return self.effective_weight() if name == "weight" else super().effective(name)

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
        if self.mix or (self.cache is not None and not torch.is_grad_enabled()):
            return _prepared_product((self,), x)[0]
        dtype = compute_dtype(x)
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


def is_plain(layer: nn.Module) -> bool:
    """Return whether calling the layer runs `LoRALinear.forward` and nothing else."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return type(layer) is LoRALinear and not any(hooks) and "forward" not in vars(layer)


def _mixed_tensors(layer: LoRALinear, dtype: torch.dtype) -> Cached:
    """Return a layer's own weight and bias, and what each adapter of its mix adds to them."""
    W, bias, changes = layer.dense_weight(), layer.bias, ()
    variants = {i: module for i, module in enumerate(layer.modules_of_mix()) if isinstance(module, LoRA)}
    if full := {i: variant for i, variant in variants.items() if variant.full_rank}:
        W = at_least_fp32(W)  # slow, but nothing is lost
        dtype, changes = W.dtype, tuple((i, variant.effective_weight(W) - W) for i, variant in full.items())
    low = {i: variant.low_rank_linear(W, None) for i, variant in variants.items() if i not in full}
    A = B = None
    if rank := max((len(part.A) for part in low.values()), default=0):
        rank = -(-rank // RANKS) * RANKS
        low_dtype = torch.float32 if W.device.type == "cpu" else dtype  # small products in bf16 start slowly there
        A = torch.zeros(len(layer.mix.names), layer.in_features, rank, dtype=low_dtype, device=W.device)
        B = A.new_zeros(len(A), rank, layer.out_features)
        for i, part in low.items():
            A[i, :, : len(part.A)], B[i, : len(part.A)] = part.A.t(), (part.B * part.scale).t()
    own = W if isinstance(W, Quantized) else W.to(dtype), None if bias is None else bias.to(dtype)
    return Cached(*own, A, B, layer.mixed_changes("bias"), changes)


def _cached_tensors(layer: LoRALinear, dtype: torch.dtype) -> Cached:
    """Return a layer's effective weight and bias in a dtype, or what they are made of where rounding would lose it, or
    where the weight is in 4 or 8 bits: dense copies of all such weights would take the memory that these save."""
    if layer.mix:
        return _mixed_tensors(layer, dtype)
    W, bias = layer.dense_weight(), layer.bias_in(dtype)
    quantized = isinstance(W, Quantized)
    if not layer.variants():
        return Cached(W if quantized else W.to(dtype), bias)
    if not quantized and not needs_adding(W, dtype):
        return Cached(layer.effective_weight().to(dtype), bias)
    if part := layer.low_rank_sum():
        return Cached(W if quantized else W.to(dtype), bias, part.A.to(dtype), part.B.to(dtype))
    return Cached(layer.effective_weight(), layer.bias_in(torch.float32))


def _prepared_product(layers: tuple[LoRALinear, ...], x: Tensor) -> list[Tensor]:
    """Apply linears to one input (..., in), by what the first layer's cache holds of them: their outputs (..., out)
    each, or one that is theirs, concatenated.

    One matmul serves weights that lie together or are small; a copy of large ones would take more memory than it saves
    time.
    """
    first = layers[0]
    ready = first.cache.get(layers)
    if ready is None or ready.dtype is not x.dtype:  # asked for last, as it takes as long as all the rest
        x = x.to(compute_dtype(x))
    if ready is None or (ready.active, ready.mix, ready.dtype) != (first.active, first.mix, x.dtype):
        ready = first.cache[layers] = _prepared(layers, x.dtype)
    return [product(x, each, first.mix) for each in ready.parts] or [layer(x) for layer in layers]


def _prepared(layers: tuple[LoRALinear, ...], dtype: torch.dtype) -> Prepared:
    """Return what these linears compute with now."""
    apart = len(layers) > 1 and not all(map(is_plain, layers))
    parts = [] if apart else joined_cache([_cached_tensors(layer, dtype) for layer in layers])
    return Prepared(layers[0].active, layers[0].mix, dtype, parts)


def fused_projection(layers: tuple[LoRALinear, ...], x: Tensor, head_width: int | None = None) -> Sequence[Tensor]:
    """Apply linears to one input (..., in), as q, k and v: their outputs (..., out) each, or, with a head width, (...,
    out / head_width, head_width).

    One matmul computes all of them if they are plain `LoRALinear`s that take the same path. Otherwise each is called,
    so that no wrapper, hook or variant is bypassed.
    """
    ys, widths, dim = _projections(layers, x), [layer.out_features for layer in layers], -1
    if head_width:  # before they are split: gradients of heads are then copied once, into their places
        ys, widths, dim = [y.unflatten(-1, (-1, head_width)) for y in ys], [w // head_width for w in widths], -2
    return ys if len(ys) == len(layers) else ys[0].split(widths, dim)


def _projections(layers: tuple[LoRALinear, ...], x: Tensor) -> list[Tensor]:
    """Apply linears to one input (..., in): their outputs (..., out) each, or one that is theirs, concatenated."""
    if getattr(layers[0], "cache", None) is not None and (layers[0].mix or not torch.is_grad_enabled()):
        return _prepared_product(layers, x)  # a wrapper has no cache
    dtype = compute_dtype(x)
    if len(layers) > 1 and all(map(is_plain, layers)):
        biases = [layer.bias_in(dtype) for layer in layers]
        if not any(layer.variants() for layer in layers):
            if sum(layer.weight.numel() for layer in layers) > SMALL:
                return [layer(x) for layer in layers]
            return [_joined_projection([layer.dense_weight() for layer in layers], x.to(dtype), cat_or_none(biases))]
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
