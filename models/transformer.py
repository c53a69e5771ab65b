"""The whole transformer: pre-norm blocks of attention and MLP whose linears can carry LoRA adapters.

`models.config.ModelConfig` says which kind of each part it has: GPT-2, Llama, Mistral, Qwen and StarCoder 2 are such.
Shapes: B batch, T positions, C embedding width, H heads, K heads of keys and values, D head width, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora.attach import adapter_parameters
from lora.functional import at_least_fp32, compute_dtype
from lora.layers.dropout import dropout
from lora.layers.linear import LoRALinear, fused_projection
from lora.layers.others import LoRAEmbedding
from models.attention import causal_attention
from models.config import ModelConfig
from models.generation import sampling
from models.generation.cache import KVCache, LayerCache
from models.loss import chunked_cross_entropy, whole
from models.norms import RMSNorm, make_norm
from models.rotary import Rotary, rotate
from runtime.device import existing_device
from runtime.training.batch import mean_cross_entropy
from runtime.training.recompute import making_again, recomputable, recompute


class Attention(nn.Module):
    """Causal self-attention with several heads, which may share keys and values."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.head_width, self.dropout, self.fused_qkv = config.head_width, dropout, config.fused_qkv
        q, kv = config.n_head * config.head_width, config.kv_heads * config.head_width
        self.heads, bias = (config.n_head, config.kv_heads, config.kv_heads), config.has_bias("qkv")
        if config.fused_qkv:
            self.qkv_proj = LoRALinear(config.n_embd, q + 2 * kv, bias=bias)
        else:
            self.q_proj = LoRALinear(config.n_embd, q, bias=bias)
            self.k_proj = LoRALinear(config.n_embd, kv, bias=bias)
            self.v_proj = LoRALinear(config.n_embd, kv, bias=bias)
        self.o_proj = LoRALinear(q, config.n_embd, bias=config.has_bias("output"))
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(config.head_width, config.norm_eps) for _ in range(2))

    def forward(
        self,
        x_BTC: Tensor,
        cos_sin: tuple[Tensor, Tensor] | None = None,
        cache: LayerCache | None = None,
        segments_BT: Tensor | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C). cos_sin: of rotary positions, where there are such. With a cache, T new positions
        that also attend to what it holds. With segments, each position attends to its own only."""
        q_BTHD, k_BTKD, v_BTKD = self.project(x_BTC)
        if self.q_norm is not None:
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        if cos_sin:
            both = rotate(torch.cat((q_BTHD, k_BTKD), 2), *cos_sin)
            q_BTHD, k_BTKD = both.split((q_BTHD.shape[2], k_BTKD.shape[2]), 2)
        q_BHTD, k_BKTD, v_BKTD = (t.transpose(1, 2) for t in (q_BTHD, k_BTKD, v_BTKD))
        if cache is None or cache.store(k_BKTD, v_BKTD):
            p = self.dropout if self.training else 0.0
            y_BHTD = causal_attention(q_BHTD, k_BKTD, v_BKTD, p, segments_BT)
        else:
            y_BHTD = cache.attend(q_BHTD)
        return self.o_proj(y_BHTD.transpose(1, 2).flatten(2))

    def project(self, x_BTC: Tensor) -> Iterable[Tensor]:
        """Queries (B, T, H, D), keys and values (B, T, K, D)."""
        if self.fused_qkv:
            return self.qkv_proj(x_BTC).unflatten(-1, (-1, self.head_width)).split(self.heads, 2)
        return fused_projection((self.q_proj, self.k_proj, self.v_proj), x_BTC, self.head_width)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class MLP(nn.Module):
    """Two linears with a GELU between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation, bias = ACTIVATIONS[config.mlp], config.has_bias("mlp")
        self.up_proj = LoRALinear(config.n_embd, config.inner_width, bias=bias)
        self.down_proj = LoRALinear(config.inner_width, config.n_embd, bias=bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        up_BTI = self.up_proj(x_BTC)
        return self.down_proj(recomputable(self.activation(up_BTI), lambda: self.activation(up_BTI)))


class GatedMLP(nn.Module):
    """A linear times the SiLU of another, and one that leads back.

    Shazeer 2020, "GLU Variants Improve Transformer", arXiv 2002.05202.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        bias = config.has_bias("mlp")
        self.gate_proj = LoRALinear(config.n_embd, config.inner_width, bias=bias)
        self.up_proj = LoRALinear(config.n_embd, config.inner_width, bias=bias)
        self.down_proj = LoRALinear(config.inner_width, config.n_embd, bias=bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        gate_BTI, up_BTI = fused_projection((self.gate_proj, self.up_proj), x_BTC)
        active_BTI = recomputable(F.silu(gate_BTI), lambda: F.silu(gate_BTI))
        return self.down_proj(recomputable(active_BTI * up_BTI, lambda: F.silu(gate_BTI) * up_BTI))


class Block(nn.Module):
    """Attention, then the MLP, each on the normalised stream and added back to it."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.norm_1 = make_norm(config)
        self.attention = Attention(config, dropout)
        self.norm_2 = make_norm(config)
        self.mlp = GatedMLP(config) if config.mlp == "gated_silu" else MLP(config)
        self.dropout = dropout

    def forward(self, x_BTC: Tensor, *positions_and_past) -> Tensor:
        """(B, T, C) -> (B, T, C). The residual stream stays in its own dtype, matmuls run in the compute dtype.

        positions_and_past: what else attention takes.
        """
        p = self.dropout if self.training else 0.0
        x_BTC = x_BTC + dropout(self.attention(normalised(self.norm_1, x_BTC), *positions_and_past), p)
        return x_BTC + dropout(self.mlp(normalised(self.norm_2, x_BTC)), p)

    def again(self, *inputs) -> Tensor:
        """`forward`, for what runs it a second time when gradients are due."""
        with making_again():
            return self(*inputs)


def normalised(norm: nn.Module, x_BTC: Tensor) -> Tensor:
    """The norm of the stream, in the dtype of matmuls."""
    dtype = compute_dtype(x_BTC)
    return recomputable(norm(x_BTC).to(dtype), lambda: norm(x_BTC).to(dtype))


def lora_presets(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The linears of a model of this config that a name in `lora_targets` stands for.

    `all` has an untied head too; `all-linear` is what PEFT calls so.
    """
    attention = ("qkv_proj", "o_proj") if config.fused_qkv else ("q_proj", "k_proj", "v_proj", "o_proj")
    gate = ("gate_proj",) if config.mlp == "gated_silu" else ()
    inside = (*attention, *gate, "up_proj", "down_proj")
    return {
        "minimal": attention[:1] if config.fused_qkv else ("q_proj", "v_proj"),
        "standard": attention,
        "all": inside if config.tied_head else (*inside, "lm_head"),
        "all-linear": inside,
    }


def presets_of_run(about: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The same for the model of a run, from what its run.json says, which in some of earlier versions has no config."""
    return lora_presets(ModelConfig.from_dict(about.get("config") or {"vocab_size": 1}))


class Transformer(nn.Module):
    """A causal language model of any `ModelConfig`, whose attention, MLP and head are LoRA-capable linears.

    dropout: probability on embeddings, attention weights and both branches of a block. device: where the weights are
    made. Its weights are fresh, and it has no adapter.
    """

    tokenizer = None  # of the run that the model was loaded from
    checkpoint_activations = "none"  # what training makes again for the backward pass: none, cheap or block

    def __init__(self, config: ModelConfig, dropout: float = 0.0, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self.config, self.dropout = config, dropout
        with existing_device(device):
            self.token_embedding = LoRAEmbedding(config.vocab_size, config.n_embd)
            if config.positions == "learned":
                self.position_embedding = LoRAEmbedding(config.max_positions, config.n_embd)
            self.blocks = nn.ModuleList(Block(config, dropout) for _ in range(config.n_layer))
            self.norm = make_norm(config)
            self.lm_head = LoRALinear(config.n_embd, config.vocab_size, bias=config.has_bias("head"))
            self.init_weights()
        self.rotary = Rotary(config) if config.positions == "rotary" else None
        self.tie_head()

    def tie_head(self) -> None:
        """Make the head's weight the token embedding where the config says so, also after weights were replaced."""
        if self.config.tied_head:
            self.lm_head.weight = self.token_embedding.weight

    def weights_of_one_input(self) -> list[list[str]]:
        """The names of all parameters, those together whose linears have one input, as q, k and v have."""
        names, groups = dict(self.named_parameters()), []
        for i in range(self.config.n_layer):
            groups += [[f"blocks.{i}.attention.{name}_proj.weight" for name in "qkv"]]
            groups += [[f"blocks.{i}.mlp.{name}_proj.weight" for name in ("gate", "up")]]
        groups = [group for group in groups if names.keys() >= set(group)]
        return groups + [[name] for name in names.keys() - set(itertools.chain(*groups))]

    def linears_of_blocks(self) -> list[str]:
        """The names of the matrices that QUANTIZE stores in fewer bits: not the head, nor embeddings, as elsewhere."""
        linears = (name for name, module in self.blocks.named_modules() if isinstance(module, LoRALinear))
        return [f"blocks.{name}.weight" for name in linears]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal weights of deviation 0.02, as in GPT-2; what writes into the stream shrinks with the depth."""
        if self.token_embedding.weight.is_meta:
            return
        for path, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                last = path.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * self.config.n_layer) if last else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Token ids (B, T) -> logits (B, T, V), and the mean cross-entropy in nats where targets (B, T) are given;
        targets of -100 do not count, and where none counts the loss is 0. With targets, more logits than
        `models.loss.whole` are not kept, and None is returned in their place.

        With a cache, idx are the positions that follow what it holds, and the logits are (B, 1, V): those of each
        row's last position. positions (B, T): where each token stands in its text, else one after the other. segments
        (B, T): tokens of different ones do not see each other. Raises ValueError where T exceeds block_size.
        """
        T = idx.shape[1]
        if T > self.config.max_positions:
            raise ValueError(f"{T} positions, but block_size is {self.config.max_positions}")
        if positions is None:
            positions = torch.arange(T, device=idx.device) if cache is None else cache.positions(T)
        x_BTC, cos_sin = at_least_fp32(self.token_embedding(idx)), None
        if self.rotary:
            cos_sin = self.rotary.at(positions, T if cache is None else cache.width)
        else:
            x_BTC = x_BTC + self.position_embedding(positions)
        x_BTC = dropout(x_BTC, self.dropout if self.training else 0.0)
        keeps = self.checkpoint_activations if torch.is_grad_enabled() and cache is None else "none"
        with recompute() if keeps == "cheap" and not torch.compiler.is_compiling() else nullcontext():
            for i, block in enumerate(self.blocks):
                run = partial(checkpoint, block.again, use_reentrant=False) if keeps == "block" else block
                x_BTC = run(x_BTC, cos_sin, None if cache is None else cache.layers[i], segments)
            if cache is not None:
                x_BTC = cache.last(x_BTC)
            x_BTC = normalised(self.norm, x_BTC)
        if targets is not None and targets.numel() * self.config.vocab_size > whole(idx.device):
            return None, chunked_cross_entropy(x_BTC, targets, self.lm_head, self.config.vocab_size)
        logits_BTV = self.lm_head(x_BTC)
        if targets is None:
            return logits_BTV, None
        return logits_BTV, mean_cross_entropy(logits_BTV, targets)

    @property
    def lora_presets(self) -> dict[str, tuple[str, ...]]:
        """The linears that a name in `lora_targets` stands for."""
        return lora_presets(self.config)

    @property
    def lora_refused(self) -> dict[str, str]:
        """The linears that no adapter may have, and why."""
        if not self.config.tied_head:
            return {}
        return {"lm_head": "its weight is the token embedding too, which an adapter of the head alone would not fit"}

    @property
    def lora_embeddings(self) -> tuple[str, ...]:
        """The embeddings that `lora_train_embeddings` trains copies of."""
        return ("token_embedding",) if self.rotary else ("token_embedding", "position_embedding")

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The matrices between the embeddings and the head that train now, an adapter's among them."""
        return [p for p in self.blocks.parameters() if p.dim() == 2 and p.requires_grad]

    def generate(self, idx: Tensor, max_new_tokens: int, seed: int | None = None, **options) -> Tensor:
        """Continue token ids (B, T) by sampling: (B, T + max_new_tokens), or fewer where stop tokens ended all rows.

        A row that ended before the others is filled up with stop tokens.

        options: the fields of `models.generation.choosing.Sampling`. Without a seed, one is drawn from torch's
        generator.
        """
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        how = sampling.Sampling(**options)
        rows = sampling.generate(self, idx.tolist(), max_new_tokens, how, seed)
        longest = max(map(len, rows))
        return torch.tensor([row + [*how.stop_ids[:1]] * (longest - len(row)) for row in rows], device=idx.device)

    def generate_text(self, prompt: str, max_new_tokens: int = 500, seed: int | None = None, **options) -> str:
        """The text that `stream_text` yields, whole."""
        return "".join(self.stream_text(prompt, max_new_tokens, seed, **options))

    def stream_text(self, prompt: str, max_new_tokens: int = 500, seed: int | None = None, **options) -> Iterator[str]:
        """The text that follows the prompt, piece by piece as it is made; it ends at a stop token where the tokenizer
        has one.

        options: as for `generate`. Raises ValueError for a model that `load` did not give a tokenizer, UserError for
        characters that the tokenizer does not know.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: jobs.generating.load.load gives a run's model its own")
        ids, decoder = self.tokenizer.encode(prompt or "\n"), self.tokenizer.stream()
        how = sampling.Sampling(**{"temperature": 0.8, "stop_ids": self.tokenizer.stop_ids} | options)
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        for (token,) in sampling.stream(self, [ids], max_new_tokens, how, seed):
            yield decoder.feed(token)
        yield decoder.flush()

    def get_parameter_info(self) -> dict[str, int | float]:
        """Counts of parameters: `lora` + `embedding` + `frozen` = `total` where adapters are attached, active or not.

        `lora` are the adapters' but for their copies of embeddings, `embedding` those copies, or the embeddings of a
        model that trains whole; `frozen` is the base; `trainable` all that trains now; `lora_percentage` 100 lora /
        total.
        """
        adapters, layers = adapter_parameters(self), [self.get_submodule(name) for name in self.lora_embeddings]
        copies = {p for layer in layers for p in layer.lora.parameters()}

        def count(parameters: Iterable[Tensor]) -> int:
            return sum(p.numel() for p in parameters)

        total, lora = count(self.parameters()), count(adapters - copies)
        return {
            "total": total,
            "trainable": count(p for p in self.parameters() if p.requires_grad),
            "frozen": count(p for p in self.parameters() if not p.requires_grad and p not in adapters),
            "lora": lora,
            "embedding": count(copies) + count(layer.weight for layer in layers if layer.weight.requires_grad),
            "lora_percentage": 100 * lora / total,
        }
