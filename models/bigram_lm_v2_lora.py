"""The whole transformer: pre-norm blocks of attention and MLP whose linears can carry LoRA adapters.

Shapes: B batch, T positions, C embedding width, H heads, D head width (C = H D), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.attach import adapter_parameters, attach
from lora.config import LoRAConfig
from lora.functional import compute_dtype, dropout
from lora.layers import LoRAEmbedding, LoRALayerNorm, LoRALinear, fused_projection
from models import sampling
from models.attention import causal_attention
from models.cache import KVCache, LayerCache
from models.config import ModelConfig
from runtime.device import existing_device
from runtime.training.batch import mean_cross_entropy


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, dropout
        self.q_proj = LoRALinear(config.n_embd, config.n_embd, bias=config.bias)
        self.k_proj = LoRALinear(config.n_embd, config.n_embd, bias=config.bias)
        self.v_proj = LoRALinear(config.n_embd, config.n_embd, bias=config.bias)
        self.o_proj = LoRALinear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x_BTC: Tensor, cache: LayerCache | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C); with a cache, T new positions that also attend to what it holds."""
        B, T, C = x_BTC.shape
        qkv_BT3HD = fused_projection((self.q_proj, self.k_proj, self.v_proj), x_BTC).view(B, T, 3, self.n_head, -1)
        q_BHTD, k_BHTD, v_BHTD = (t.transpose(1, 2) for t in qkv_BT3HD.unbind(2))
        if cache is None or cache.store(qkv_BT3HD[:, :, 1:].permute(2, 0, 3, 1, 4)):
            y_BHTD = causal_attention(q_BHTD, k_BHTD, v_BHTD, self.dropout if self.training else 0.0)
        else:
            y_BHTD = cache.attend(q_BHTD)
        return self.o_proj(y_BHTD.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two linears with a GELU between them, four times as wide inside."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = LoRALinear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.down_proj = LoRALinear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.down_proj(F.gelu(self.up_proj(x_BTC)))


class Block(nn.Module):
    """Attention, then the MLP, each on the normalised stream and added back to it."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.norm_1 = LoRALayerNorm(config.n_embd, bias=config.bias)
        self.attention = Attention(config, dropout)
        self.norm_2 = LoRALayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = dropout

    def forward(self, x_BTC: Tensor, cache: LayerCache | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C). The residual stream stays in its own dtype, matmuls run in the compute dtype."""
        dtype, p = compute_dtype(x_BTC), self.dropout if self.training else 0.0
        x_BTC = x_BTC + dropout(self.attention(self.norm_1(x_BTC).to(dtype), cache), p)
        return x_BTC + dropout(self.mlp(self.norm_2(x_BTC).to(dtype)), p)


class BigramLanguageModelLoRA(nn.Module):
    """A small GPT whose attention, MLP and head are LoRA-capable linears.

    vocab_size, n_embd, block_size, n_head, n_layer, bias: the shape. dropout: probability on embeddings, attention
    weights and both branches of a block. device: where the weights are made. use_lora: attach a fresh adapter named
    `default`; trained weights of a base may be loaded under it, with `load_state_dict(base, strict=False)`, as long as
    it is untrained. lora_*: see `lora.config.LoRAConfig`; lora_presets, lora_embeddings: what lora_targets may name
    together, and what lora_train_embeddings trains copies of.

    Raises ValueError where n_embd is not a multiple of n_head, UsageError for LoRA settings that make no sense.
    """

    lora_presets: ClassVar[dict[str, tuple[str, ...]]] = {
        "minimal": ("q_proj", "v_proj"),
        "standard": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "all": ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head"),
    }
    lora_embeddings: ClassVar[tuple[str, ...]] = ("token_embedding", "position_embedding")

    tokenizer = None  # of the run that the model was loaded from

    def __init__(
        self,
        vocab_size: int,
        n_embd: int = 256,
        block_size: int = 128,
        device: str | torch.device = "cpu",
        dropout: float = 0.0,
        n_head: int = 4,
        n_layer: int = 4,
        bias: bool = False,
        use_lora: bool = False,
        lora_rank: int = 8,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        lora_targets: str = "all",
        lora_variant: str = "lora",
        lora_bias: str = "none",
        lora_train_embeddings: bool = True,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.config = config = ModelConfig(vocab_size, n_embd, n_layer, n_head, max_positions=block_size, bias=bias)
        with existing_device(device):
            self.token_embedding = LoRAEmbedding(vocab_size, n_embd)
            self.position_embedding = LoRAEmbedding(block_size, n_embd)
            self.blocks = nn.ModuleList(Block(config, dropout) for _ in range(n_layer))
            self.norm = LoRALayerNorm(n_embd, bias=bias)
            self.lm_head = LoRALinear(n_embd, vocab_size, bias=bias)
            self.init_weights()
        if use_lora:
            attach(
                self,
                LoRAConfig(
                    lora_rank, lora_alpha, lora_dropout, lora_targets, lora_variant, lora_bias, lora_train_embeddings
                ),
            )

    @classmethod
    def from_config(
        cls, config: ModelConfig, dropout: float = 0.0, device: str | torch.device = "cpu"
    ) -> BigramLanguageModelLoRA:
        """A base of this config, with fresh weights and no adapter. Raises UserError for what is not implemented."""
        config.check_implemented()
        sizes = {name: getattr(config, name) for name in ("n_embd", "n_head", "n_layer", "bias")}
        return cls(config.vocab_size, block_size=config.max_positions, dropout=dropout, device=device, **sizes)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal weights of deviation 0.02, as in GPT-2; what writes into the stream shrinks with the depth."""
        for path, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                last = path.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * self.config.n_layer) if last else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Token ids (B, T) -> logits (B, T, V), and the mean cross-entropy in nats where targets (B, T) are given;
        targets of -100 do not count, and where none counts the loss is 0.

        With a cache, idx are the positions that follow what it holds, and the logits are (B, 1, V): those of each
        row's last position. Raises ValueError where T exceeds block_size.
        """
        T = idx.shape[1]
        if T > self.config.max_positions:
            raise ValueError(f"{T} positions, but block_size is {self.config.max_positions}")
        positions = torch.arange(T, device=idx.device) if cache is None else cache.positions(T)
        x_BTC = self.token_embedding(idx) + self.position_embedding(positions)
        x_BTC = dropout(x_BTC, self.dropout if self.training else 0.0)
        for i, block in enumerate(self.blocks):
            x_BTC = block(x_BTC, None if cache is None else cache.layers[i])
        if cache is not None:
            x_BTC = cache.last(x_BTC)
        x_BTC = self.norm(x_BTC)
        logits_BTV = self.lm_head(x_BTC.to(compute_dtype(x_BTC)))
        if targets is None:
            return logits_BTV, None
        return logits_BTV, mean_cross_entropy(logits_BTV, targets)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The matrices between the embeddings and the head that train now, an adapter's among them."""
        return [p for p in self.blocks.parameters() if p.dim() == 2 and p.requires_grad]

    def generate(self, idx: Tensor, max_new_tokens: int, seed: int | None = None, **options) -> Tensor:
        """Continue token ids (B, T) by sampling: (B, T + max_new_tokens), or fewer where stop tokens ended all rows.

        A row that ended before the others is filled up with stop tokens.

        options: the fields of `models.sampling.Sampling`. Without a seed, one is drawn from torch's generator.
        """
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        how = sampling.Sampling(**options)
        rows = sampling.generate(self, idx.tolist(), max_new_tokens, how, seed)
        longest = max(map(len, rows))
        return torch.tensor([row + [*how.stop_ids[:1]] * (longest - len(row)) for row in rows], device=idx.device)

    def generate_text(self, prompt: str, max_new_tokens: int = 500, seed: int | None = None, **options) -> str:
        """The text that follows the prompt, which ends at a stop token where the tokenizer has one.

        options: as for `generate`. Raises ValueError for a model that `load` did not give a tokenizer, UserError for
        characters that the tokenizer does not know.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: jobs.generating.load.load gives a run's model its own")
        idx = torch.tensor([self.tokenizer.encode(prompt or "\n")], device=self.token_embedding.weight.device)
        options = {"temperature": 0.8, "stop_ids": self.tokenizer.stop_ids} | options
        return self.tokenizer.decode(self.generate(idx, max_new_tokens, seed, **options)[0, idx.shape[1] :].tolist())

    def get_parameter_info(self) -> dict[str, int | float]:
        """Counts of parameters: `lora` + `embedding` + `frozen` = `total` where adapters are attached, active or not.

        `lora` are the adapters' but for their copies of embeddings, `embedding` those copies, or the embeddings of a
        model that trains whole; `frozen` is the base; `trainable` all that trains now; `lora_percentage` 100 lora /
        total.
        """
        adapters, layers = adapter_parameters(self), (self.token_embedding, self.position_embedding)
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
