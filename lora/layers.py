"""Layers that are torch's own, and can carry named adapters.

With no adapter each has the keys, the seed stream and the output of the torch layer it is, so a base checkpoint is
the same with and without LoRA. An adapter's tensors stand under `lora.<adapter name>`; the layer's own are never
changed by them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.functional import compute_dtype, concatenated, lora_linear
from lora.variants.lora import AdapterTensors, LoRA
from runtime.errors import UsageError


def added_up(base: Tensor, parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """base + the sum of strength * (tensor - base) over `parts`; one tensor at strength 1 is that tensor itself."""
    if not parts:
        return base
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    return base + sum(strength * (tensor - base) for tensor, strength in parts)


class Adaptable(nn.Module):
    """A mixin for torch layers: adapters by name, and which of them are active, at which strength."""

    lora: nn.ModuleDict
    active: dict[str, float]  # replaced whole, never changed in place
    held_by: str = ""  # the context manager that relies on this layer staying as it is, if any

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.lora, self.active = nn.ModuleDict(), {}

    def __getstate__(self) -> dict:
        """What pickles and copies of the layer hold: they are inside no context manager, and keep nothing."""
        return {key: value for key, value in self.__dict__.items() if key not in ("held_by", "kept")}

    def entries(self) -> list[AdapterTensors]:
        """The tensors of the active adapters that have any on this layer."""
        return [self.lora[name] for name in self.active if name in self.lora]

    def strengths(self) -> list[tuple[AdapterTensors, float]]:
        """The same, each with its strength."""
        return [(self.lora[name], strength) for name, strength in self.active.items() if name in self.lora]

    def effective(self, name: str) -> Tensor | None:
        """The tensor `name` of this layer as the active adapters' copies make it: the base plus what each adds."""
        base = getattr(self, name)
        copies = [(copy, s) for entry, s in self.strengths() if (copy := entry.copy_of(name)) is not None]
        return added_up(base, copies).to(base.dtype) if copies else base

    def effective_tensors(self) -> dict[str, Tensor]:
        """Every base tensor of this layer as the active adapters make it, in its own dtype."""
        return {name: self.effective(name) for name in self.base_tensors()}

    def base_tensors(self) -> dict[str, Tensor]:
        """The layer's own tensors by name, whatever adapters there are."""
        return dict(self.named_parameters(recurse=False))

    def check_free(self) -> None:
        """Raises UsageError inside `merged` and `unchanging`, which rely on weights and adapters staying the same."""
        if self.held_by:
            raise UsageError(
                f"inside `with {self.held_by}(model):`, weights and adapters cannot be changed; leave that block first"
            )

    def _load_from_state_dict(self, *args) -> None:
        """Load a base, which the adapters that have not been trained yet then follow; theirs are loaded after this."""
        self.check_free()
        super()._load_from_state_dict(*args)
        for entry in self.lora.values():
            entry.follow(self.base_tensors())


class LoRALinear(Adaptable, nn.Linear):
    """An `nn.Linear` with 0..n adapters."""

    kept: dict | None = None  # while a model is `unchanging`: what it computes with, once made

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, however it is stored: (out, in)."""
        return self.out_features, self.in_features

    def variants(self) -> list[LoRA]:
        """The active adapters that change the weight of this layer."""
        return [entry for entry in self.entries() if isinstance(entry, LoRA)]

    def alone(self) -> LoRA | None:
        """The adapter whose own fast way of computing serves: the only one that changes the weight, at strength 1."""
        found = [(entry, strength) for entry, strength in self.strengths() if isinstance(entry, LoRA)]
        return found[0][0] if len(found) == 1 and found[0][1] == 1 else None

    def effective_weight(self) -> Tensor:
        """The weight as the active adapters make it."""
        W = self.dense_weight()
        with torch.autocast(W.device.type, enabled=False):  # in less than W's precision small changes vanish
            return added_up(W, [(v.effective_weight(W), s) for v, s in self.strengths() if isinstance(v, LoRA)])

    def effective_tensors(self) -> dict[str, Tensor]:
        return super().effective_tensors() | {"weight": self.effective_weight()}

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values of the weight (out, in), in a dtype or in their own: the one way to them, however they are stored.

        No converted copy is kept from call to call: a write through `weight.data`, as PEFT merges, or by a fused
        optimizer raises no version, so that a copy that went stale could not be told from one that did not.
        """
        return self.weight if dtype is None else self.weight.to(dtype)

    def base_tensors(self) -> dict[str, Tensor]:
        return super().base_tensors() | {"weight": self.dense_weight()}

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the compute dtype. Dropout is for an adapter that is alone at strength 1."""
        dtype = compute_dtype(x)
        if self.kept is not None and not torch.is_grad_enabled():
            return F.linear(x.to(dtype), *unchanging_weights((self,), dtype))
        if not self.active:
            return F.linear(x, self.dense_weight(dtype), self.bias)
        bias = self.effective("bias")
        if variant := self.alone():
            return variant(x.to(dtype), self.dense_weight(), bias)
        return F.linear(x, self.effective_weight().to(dtype) if self.variants() else self.dense_weight(dtype), bias)


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer does what `LoRALinear.forward` says and nothing more."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return type(layer) is LoRALinear and not any(hooks) and "forward" not in vars(layer)


def unchanging_weights(layers: tuple[LoRALinear, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of the layers as their active adapters make them, one under the other, made once."""
    kept, key = layers[0].kept, (layers, tuple(layers[0].active.items()), dtype)
    if key not in kept:
        tensors = [layer.effective_tensors() for layer in layers]
        weights, biases = ([t[name].to(dtype) for t in tensors if name in t] for name in ("weight", "bias"))
        kept[key] = weights[0] if len(layers) == 1 else torch.cat(weights), torch.cat(biases) if biases else None
    return kept[key]


def side_by_side(layers: tuple[LoRALinear, ...], x: Tensor) -> Tensor:
    """What linears of one width make of an input that they share: (..., in) -> (..., number of layers, out).

    One product does it where all are plain `LoRALinear`s that work alike; else each is called for itself, so that
    no wrapper, hook or variant is passed over.
    """
    dtype = compute_dtype(x)
    if all(map(_is_plain, layers)):
        if layers[0].kept is not None and not torch.is_grad_enabled():
            return F.linear(x.to(dtype), *unchanging_weights(layers, dtype)).unflatten(-1, (len(layers), -1))
        biases = [layer.effective("bias") for layer in layers]
        if not any(layer.variants() for layer in layers):
            weight = torch.cat([layer.dense_weight(dtype) for layer in layers])
            return F.linear(x, weight, concatenated(biases)).unflatten(-1, (len(layers), -1))
        alone = [layer.alone() for layer in layers]
        alike = len({type(v) for v in alone}) == 1 and None not in alone
        if alike and torch.is_grad_enabled() and not any(v.dropout for v in alone):
            weights = [layer.dense_weight() for layer in layers]
            parts = [v.low_rank(W, bias) for v, W, bias in zip(alone, weights, biases, strict=True)]
            return lora_linear(x.to(dtype), *parts).unflatten(-1, (len(layers), -1))
    return torch.stack([layer(x) for layer in layers], -2)


class LoRAEmbedding(Adaptable, nn.Embedding):
    """An `nn.Embedding` whose adapters bring their own trained copy of it."""

    def forward(self, idx: Tensor) -> Tensor:
        """Token ids of any shape -> (*shape, embedding_dim)."""
        options = (self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
        return F.embedding(idx, self.effective("weight"), *options)


class LoRALayerNorm(Adaptable, nn.LayerNorm):
    """An `nn.LayerNorm` whose adapters may bring their own trained bias (`LORA_BIAS=all`)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> the same shape."""
        bias = self.effective("bias") if self.active else self.bias
        return F.layer_norm(x, self.normalized_shape, self.weight, bias, self.eps)
