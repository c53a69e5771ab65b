"""The peers that our steps are measured against, each as people use it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from torch import nn
from torch.nn import functional as F

from lora.layers.linear import LoRALinear
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from runtime.errors import UserError


class PlainBlock(nn.Module):
    """A pre-norm block of nn.Linear, one matmul for q, k and v, and the fused attention kernel."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class PlainGPT(nn.Module):
    """A GPT as a textbook writes it, on (vocab_size, n_embd, n_head, n_layer, block_size)."""

    def __init__(self, vocab: int, width: int, heads: int, layers: int, context: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(PlainBlock(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, vocab, bias=False)

    def forward(self, x, y):
        h = self.tokens(x) + self.positions.weight[: x.shape[1]]
        logits = self.head(self.norm(self.blocks(h)))
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def ours(size: tuple[int, ...], lora: bool = False, embeddings: bool = True, dropout: float = 0.0) -> nn.Module:
    """Our own model, all linears adapted with rank 8 where `lora` is on, their inputs dropped with this probability."""
    vocab, width, heads, layers, context = size
    shape = {"n_embd": width, "n_head": heads, "n_layer": layers, "block_size": context}
    return BigramLanguageModelLoRA(
        vocab, **shape, use_lora=lora, lora_train_embeddings=embeddings, lora_dropout=dropout
    )


def transformers_gpt2(size: tuple[int, ...], tied: bool = False) -> nn.Module:
    """transformers' GPT-2 of the same shapes, with its cache."""
    import transformers

    vocab, width, heads, layers, context = size
    shape = {"vocab_size": vocab, "n_embd": width, "n_head": heads, "n_layer": layers, "n_positions": context}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    no_specials = {"bos_token_id": None, "eos_token_id": None}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**shape, **no_dropout, **no_specials, tie_word_embeddings=tied)
    )


def transformers_peft(size: tuple[int, ...], tied: bool = False) -> nn.Module:
    """PEFT's LoRA on transformers' GPT-2: all linears adapted with rank 8, embeddings trained as PEFT does. With a head
    that is `tied` to the embeddings, as GPT-2's is, the linears of the blocks alone."""
    import peft

    more = {} if tied else {"modules_to_save": ["wte", "wpe"]}
    targets = ["c_attn", "c_proj", "c_fc"] if tied else ["c_attn", "c_proj", "c_fc", "lm_head"]
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, fan_in_fan_out=True, **more)
    model = peft.get_peft_model(transformers_gpt2(size, tied), config)

    class WithLoss(nn.Module):
        """transformers' own loss shifts the targets itself; ours are shifted already."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x, y):
            logits = self.model(input_ids=x, use_cache=False).logits
            return logits, F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())

    return WithLoss()


def peft_on_ours(size: tuple[int, ...]) -> nn.Module:
    """PEFT's LoRA put on our own model in place of ours."""
    import peft

    model = ours(size)
    config = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=list(model.lora_presets["all"]),
        modules_to_save=list(model.lora_embeddings),
    )
    return peft.get_peft_model(model, config)


def loralib_on_ours(size: tuple[int, ...]) -> nn.Module:
    """loralib's layers put on our own model in place of ours; it trains embeddings as they are."""
    import loralib

    model = ours(size)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            parent, _, name = path.rpartition(".")
            other = loralib.Linear(layer.in_features, layer.out_features, r=8, lora_alpha=16, bias=False)
            other.weight.data.copy_(layer.weight.data)
            setattr(model.get_submodule(parent), name, other)
    loralib.mark_only_lora_as_trainable(model)
    model.token_embedding.requires_grad_(True)
    model.position_embedding.requires_grad_(True)
    return model


def nanogpt(folder: Path) -> ModuleType:
    """nanoGPT's own model.py in this folder. Raises UserError where it is missing."""
    path = folder / "model.py"
    if not path.is_file():
        raise UserError(f"--nanogpt {folder}: {path} is missing; it must be a copy of nanoGPT's repository")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
