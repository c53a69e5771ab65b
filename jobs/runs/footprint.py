"""How much memory a run will take, by arithmetic, before any of its weights is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from lora.attach import adaptable_layers, find_targets
from lora.config import LoRAConfig
from lora.functional import LowRankLinear, low_rank_gradients_pay, needs_adding
from lora.layers.linear import LoRALinear
from lora.optim import state_bytes
from lora.variants.registry import VARIANTS
from models.config import ModelConfig
from models.footprint import LOGITS, Linear, Step, at_block, at_loss, kept
from models.loss import chunk_rows, whole
from models.transformer import Transformer
from runtime.device import Machine
from runtime.storage.quantized import FORMS
from runtime.training.muon import update_bytes

FP32 = 4  # bytes of a value that trains, and of its gradient

# On the CPU more is resident than the tensors that are alive: what torch sets up at its first step, holes in glibc's
# heap, and what oneDNN has of matrices in an order of its own. So the peak is taken for PROCESS bytes, HEAP times what
# is alive, WIDEST times the widest tensor inside a block and HEAD times the head in the compute dtype: least squares
# over the cases of docs/memory.md, with peaks from 36 MB to 3.7 GB, which come within 15 %.
# Quantising and its kernels add QUANTISED bytes.
PROCESS, HEAP, WIDEST, HEAD, QUANTISED = 11e6, 1.1, 7.5, 2.7, 25e6

# On CUDA torch gives cuBLAS memory to work in, once for the forward pass and once for the backward pass, whose thread
# is another. Measured on an H200: with 32 MiB each, 78 cases of benchmarks/estimates come within 14 %.
WORKSPACES = 2 * 2**25


@dataclass(frozen=True)
class Shape:
    """What is known of a model before its weights are read. stored: the dtype of its weights; form: in which its
    matrices are, nf4, int8 or none. aliases: names of its linears in its family."""

    config: ModelConfig
    stored: torch.dtype = torch.float32
    form: str = "none"
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def model(self) -> Transformer:
        """A model of this shape whose tensors have no values."""
        model = Transformer(self.config, 0.0, "meta")
        model.lora_aliases = self.aliases
        return model


@dataclass(frozen=True)
class Plan:
    """What decides how much memory a process of a run takes. lora: its adapter, or None where all weights train. A step
    has `batches` of `rows` of `positions` tokens, and is cut into `parts`: where that is None, as many as it has
    batches. keeps: CHECKPOINT_ACTIVATIONS. quantize: QUANTIZE. dropout: of the model."""

    shape: Shape
    machine: Machine
    lora: LoRAConfig | None
    rows: int
    positions: int
    batches: int = 1
    keeps: str = "cheap"
    quantize: str = "none"
    dropout: float = 0.0
    optimizer: str = "adamw"
    parts: int | None = None
    reduce: str = "exact"
    processes: int = 1
    shard: bool = False

    @property
    def pieces(self) -> int:
        """Into how many pieces the base is cut."""
        return self.processes if self.shard else 1

    @property
    def rows_at_once(self) -> int:
        """The rows of a part, which are computed at a time."""
        return -(-self.rows * self.batches // (self.parts or self.batches))

    @property
    def own_parts(self) -> int:
        """How many parts of a step a process computes."""
        return max(1, (self.parts or self.batches) // self.processes)

    @property
    def sums(self) -> int:
        """How many gradients of earlier parts are held at most while a part is computed."""
        if self.reduce == "fast":
            return min(1, self.own_parts - 1)
        return self.own_parts.bit_length() - 1  # branches of a balanced tree

    @property
    def form(self) -> str:
        """The form of the matrices in the blocks, as they are held."""
        return self.shape.form if self.quantize == "none" else self.quantize

    @property
    def stored(self) -> torch.dtype:
        """The dtype of the base's weights, as they are held: a model that trains whole is in fp32."""
        return self.shape.stored if self.lora else torch.float32


@dataclass(frozen=True)
class Footprint:
    """Sizes in bytes; `parameters` and `trained` are numbers of them. adapter: the size of the adapter's file, 0 for
    none. activations: what is kept for the backward pass, by what it is. running: what stands beside it for a while.
    peak: the most that is held at a time."""

    parameters: int
    trained: int
    adapter: int
    weights: int
    gradients: int
    optimizer: int
    activations: Counter[str]
    running: int
    peak: int


def footprint(plan: Plan) -> Footprint:
    """The memory that a run takes. Raises UsageError for LORA_TARGETS that match nothing."""
    model = plan.shape.model
    own = dict(model.named_parameters())
    trained = adapter_tensors(model, plan.lora) if plan.lora else {name: tuple(p.shape) for name, p in own.items()}
    hidden = {name for name, shape in trained.items() if name.startswith("blocks.") and len(shape) == 2}
    counts = {name: torch.Size(shape).numel() for name, shape in trained.items()}
    adapter = FP32 * sum(counts.values()) if plan.lora else 0
    weights = bytes_of_base(plan) + adapter
    own_share = 1 if plan.lora else plan.pieces  # an adapter is whole on each process
    gradients = FP32 * sum(counts.values()) // own_share
    optimizer = sum(state_bytes(plan.optimizer, count, name in hidden) for name, count in counts.items()) // own_share
    linears, step, config = linears_of(model, plan), step_of(plan), plan.shape.config
    activations = kept(config, step, linears)
    loss, block = at_loss(config, step, linears["lm_head"]), at_block(config, step, linears)
    before = gradients * plan.sums
    # A part of a step holds most when its loss is known, when its last block's backward pass runs, or its first one's.
    highest = before + max(sum(activations.values()) + loss, sum(activations.values()) - activations[LOGITS] + block)
    last = gradients + block + (own["token_embedding.weight"].numel() * FP32 if step.embeddings else 0)
    if plan.optimizer == "muon":
        last = max(last, gradients + update_bytes([trained[name] for name in hidden], plan.machine.dtype))
    if plan.processes > own_share:  # gradients lie in one vector too, and half of another process's is received
        last = max(last, 2 * gradients + gradients // 2)
    running = max(highest, last) - sum(activations.values())
    live = weights + optimizer + max(highest, last)
    peak = resident(live, plan, step) if plan.machine.device.type == "cpu" else live + WORKSPACES * plan.machine.is_cuda
    parameters = sum(p.numel() for p in own.values()) + adapter // FP32
    return Footprint(
        parameters, sum(counts.values()), adapter, weights, gradients, optimizer, activations, running, peak
    )


def resident(live: int, plan: Plan, step: Step) -> int:
    """What the system counts as the process's on the CPU, beyond what it held before, where `live` bytes are alive."""
    config = plan.shape.config
    widest = step.tokens * config.inner_width * step.size
    head = config.vocab_size * config.n_embd * step.size
    quantised = QUANTISED if plan.form != "none" else 0
    return round(PROCESS + quantised + HEAP * live + WIDEST * widest + HEAD * head)


def adapter_tensors(model: Transformer, lora: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of what an adapter trains, by names that begin with the path of its layer."""
    variant, targets, found = VARIANTS[lora.variant], set(find_targets(model, lora.targets)), {}
    for path, layer in adaptable_layers(model).items():
        if path in targets:
            sizes = dict(zip(("out", "in"), layer.shape, strict=True)) | {"rank": lora.rank_at(path)}
            found |= {f"{path}.{name}": tuple(sizes.get(n, n) for n in dims) for name, dims in variant.shapes.items()}
        if lora.train_embeddings and path in model.lora_embeddings:
            found[f"{path}.weight"] = tuple(layer.weight.shape)
        if getattr(layer, "bias", None) is not None and (
            lora.bias == "all" or (lora.bias == "lora_only" and path in targets)
        ):
            found[f"{path}.bias"] = tuple(layer.bias.shape)
    return found


def bytes_of_base(plan: Plan) -> int:
    """What the base takes as it is held: in pieces, where these are many, this process's, what is outside the blocks
    whole, and of two blocks the weights, and in training whole their gradients."""
    model = plan.shape.model
    inside = set(model.linears_of_blocks()) if plan.form != "none" else ()
    sizes = (
        FORMS[plan.form].bytes_of(p.shape) if name in inside else p.numel() * plan.stored.itemsize
        for name, p in model.named_parameters()
    )
    if plan.pieces == 1:
        return sum(sizes)
    together = list(model.blocks[:2].parameters()) + [
        p for n, p in model.named_parameters() if ".blocks." not in f".{n}"
    ]
    widths = plan.stored.itemsize + (0 if plan.lora else FP32)
    return sum(sizes) // plan.pieces + sum(p.numel() for p in together) * widths


def step_of(plan: Plan) -> Step:
    """A part of a step, as arithmetic needs it."""
    embeddings = plan.lora.train_embeddings if plan.lora else True
    cpu = plan.machine.device.type == "cpu"
    config = plan.shape.config
    chunk = chunk_rows(plan.machine.device, config.n_embd, config.vocab_size, not plan.lora) * config.vocab_size
    about = {"dropout": plan.dropout > 0, "cpu": cpu, "whole": whole(plan.machine.device), "chunk": chunk}
    return Step(
        plan.rows_at_once,
        plan.positions,
        plan.machine.dtype.itemsize,
        plan.keeps,
        **about,
        embeddings=embeddings,
        norms=not plan.lora,
    )


def linears_of(model: Transformer, plan: Plan) -> dict[str, Linear]:
    """Each linear of a model as a step computes it, by its path."""
    paths = [path for path, layer in adaptable_layers(model).items() if isinstance(layer, LoRALinear)]
    targets = set(find_targets(model, plan.lora.targets)) if plan.lora else set()
    inside = {name.removesuffix(".weight") for name in model.linears_of_blocks()} if plan.form != "none" else set()
    found = {}
    for path in paths:
        outputs, inputs = model.get_submodule(path).shape
        about = {"stored": plan.stored.itemsize, "quantized": path in inside}
        found[path] = Linear(inputs, outputs, not plan.lora, **about)
        if path in targets:
            variant = VARIANTS[plan.lora.variant]
            about |= {"rank": plan.lora.rank_at(path), "dropped": plan.lora.dropout > 0, "output": variant.full_rank}
            found[path] = found[path]._replace(**about)
    for group in ([name.removesuffix(".weight") for name in names] for names in model.weights_of_one_input()):
        group = [path for path in group if path in targets]
        for each in [group] if group and len(group) > 1 else [[path] for path in group]:
            kind = _kind(plan, [found[path] for path in each])
            found |= {path: found[path]._replace(kind=kind) for path in each}
    return found


def _kind(plan: Plan, group: list[Linear]) -> str:
    """How the adapters of linears of one input are computed."""
    tokens = plan.rows_at_once * plan.positions
    with torch.device("meta"):
        parts = [_part(linear, plan.stored) for linear in group]
    if group[0].dropped or needs_adding(parts[0].W, plan.machine.dtype):
        return "added"
    return "effective" if group[0].quantized or low_rank_gradients_pay(tokens, parts) else "plain"


def _part(linear: Linear, dtype: torch.dtype) -> LowRankLinear:
    """A linear with a low-rank update, without values."""
    A = torch.empty(linear.rank, linear.inputs, requires_grad=True)
    W, B = torch.empty(linear.outputs, linear.inputs, dtype=dtype), torch.empty(linear.outputs, linear.rank)
    return LowRankLinear(W, None, A, B, 1.0)
