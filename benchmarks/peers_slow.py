"""Why LoRA is slower than full fine-tuning in many a repository, on the shapes of two of them.

python -m benchmarks.peers_slow --record
python -m benchmarks.peers_slow --shapes tiny --rounds 1

minimind's users report 260 minutes for LoRA against 150 for full fine-tuning. Its LoRA is two nn.Linears whose output
is added to that of a linear; forks of nanoGPT take loralib's layers. Both are put here on a model as those
repositories have it, beside a full step of it, and beside ours, adapted at the same linears with the same rank. All
compute in the same dtype and take the same batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.contest import close, parser, ratio, take_turns, tell
from jobs.comparing.timing import repeatable
from lora.attach import attach
from lora.config import LoRAConfig
from models.config import ModelConfig
from models.transformer import Transformer
from runtime.device import pick_machine
from runtime.processes.command import run_command

RANK, GOAL = 8, 0.7


@dataclass(frozen=True)
class Shape:
    """A model as a repository has it. tokens: of a step. targets: what is adapted, by our names, and by theirs."""

    config: ModelConfig
    tokens: int
    targets: str
    theirs: tuple[str, ...]

    @property
    def is_llama(self) -> bool:
        """Whether it is of Llama's shape, else of GPT-2's."""
        return self.config.positions == "rotary"


def llama(vocab: int, width: int, heads: int, kv_heads: int, layers: int, inner: int, context: int) -> ModelConfig:
    """A shape of Llama's with a tied head."""
    return ModelConfig(
        vocab, width, layers, heads, n_kv_head=kv_heads, n_inner=inner, max_positions=context, positions="rotary",
        norm="rms", mlp="gated_silu", tied_head=True,
    )  # fmt: skip


SHAPES = {
    "minimind": Shape(llama(6400, 512, 8, 2, 8, 1408, 512), 2048, "q_proj,o_proj", ("q_proj", "o_proj")),
    "nanoGPT-LoRA": Shape(
        ModelConfig(50304, 768, 12, 12, max_positions=1024), 1024, "q_proj,k_proj,v_proj,o_proj", ("qkv", "out")
    ),
    "tiny": Shape(llama(96, 32, 2, 1, 1, 64, 16), 32, "q_proj,o_proj", ("q_proj", "o_proj")),
}


class TwoLinears(nn.Module):
    """A linear with LoRA as minimind writes it: B(A(x)) of two nn.Linears, added to its output."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.A = nn.Linear(linear.in_features, RANK, bias=False)
        self.B = nn.Linear(RANK, linear.out_features, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.B(self.A(x))


def of_loralib(linear: nn.Linear) -> nn.Module:
    """The same with loralib's layer."""
    import loralib

    return loralib.Linear(linear.in_features, linear.out_features, r=RANK, lora_alpha=RANK, bias=False)


class WithLoss(nn.Module):
    """transformers' own loss shifts the targets itself; ours are shifted already."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(input_ids=x, use_cache=False).logits
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def theirs(shape: Shape) -> nn.Module:
    """A model as such repositories have it: of Llama's shape transformers', of GPT-2's one that a textbook writes."""
    c = shape.config
    if not shape.is_llama:
        return peers.PlainGPT(c.vocab_size, c.n_embd, c.n_head, c.n_layer, c.max_positions)
    import transformers

    sizes = {"vocab_size": c.vocab_size, "hidden_size": c.n_embd, "intermediate_size": c.inner_width}
    heads = {"num_attention_heads": c.n_head, "num_key_value_heads": c.kv_heads, "num_hidden_layers": c.n_layer}
    rest = {"max_position_embeddings": c.max_positions, "tie_word_embeddings": True, "bos_token_id": None}
    config = transformers.LlamaConfig(**sizes, **heads, **rest, eos_token_id=None, pad_token_id=None)
    return WithLoss(transformers.LlamaForCausalLM(config))


def adapted(shape: Shape, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The same with an adapter at each of its targets; nothing else trains."""
    model = theirs(shape).requires_grad_(False)
    for path, layer in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in shape.theirs:
            setattr(model.get_submodule(parent), name, make(layer))
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith((".A.weight", ".B.weight", "lora_A", "lora_B")))
    return model


def ours(shape: Shape, lora: bool) -> Transformer:
    """Our model of the same shape."""
    model = Transformer(shape.config)
    if lora:
        attach(model, LoRAConfig(rank=RANK, alpha=RANK, targets=shape.targets, train_embeddings=False))
    return model


ROWS = (
    ("two linears", "their full", "two nn.Linears / full, on their model", None),
    ("loralib", "their full", "loralib / full, on their model", None),
    ("our LoRA", "our full", "our LoRA / our full", None),
    ("our LoRA", "two linears", "our LoRA / two nn.Linears on their model", GOAL),
    ("our LoRA", "loralib", "our LoRA / loralib on their model", GOAL),
)


def measure(name: str, rounds: int, device: str) -> list[dict]:
    """The rows of a shape."""
    shape, machine = SHAPES[name], pick_machine(device, "auto")
    context = min(shape.config.max_positions, shape.tokens)
    rows = torch.randint(shape.config.vocab_size, (shape.tokens // context, context + 1))
    models = {
        "their full": theirs(shape),
        "two linears": adapted(shape, TwoLinears),
        "loralib": adapted(shape, of_loralib),
        "our full": ours(shape, lora=False),
        "our LoRA": ours(shape, lora=True),
    }
    calls = {each: partial(repeatable(model, rows, machine).step, 0) for each, model in models.items()}
    seconds = take_turns(calls, rounds, machine)
    return [
        {"what": f"{name}, {shape.tokens} tokens: {what}", "goal": goal} | ratio(seconds, one, other)
        for one, other, what, goal in ROWS
    ]


def main() -> None:
    """Run the command."""
    flags = parser(__doc__, rounds=7)
    flags.add_argument("--shapes", nargs="+", choices=SHAPES, default=["minimind", "nanoGPT-LoRA"])
    options, rows = flags.parse_args(), []
    for name in options.shapes:
        rows += (found := measure(name, options.rounds, options.device))
        tell(found)
    close("peers_slow", rows, options.record)


if __name__ == "__main__":
    run_command(main)
