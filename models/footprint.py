"""What a training step of a transformer keeps for its backward pass, by arithmetic: nothing is built or computed.

The terms are those of `models/transformer.py`, read off its forward pass. `tests/jobs/test_footprint.py` compares them
with the tensors that are alive after one. Sizes are in bytes. Letters: N tokens of a part of a step, C embedding width,
Q width of all queries, K of all keys, I inner width of the MLP, V vocabulary, T positions of a row, b bytes of a value
in the compute dtype (2 in bf16). The stream between blocks is in fp32, 4 bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lora.layers.dropout import COLUMNS
from lora.layers.inference import SMALL
from models.attention import BLOCK, LONGEST_BY_BLOCKS
from models.config import ModelConfig

STREAM = 4  # bytes of a value in the stream between blocks

NORMS, INPUTS, ATTENTION, MLP = "norm inputs", "inputs of linears", "attention", "MLP"
WEIGHTS, DROPOUT, LOGITS, BLOCKS = "weights in the compute dtype", "dropout", "logits and head", "inputs of blocks"


class Step(NamedTuple):
    """How a part of a step is computed. rows of `positions` tokens each; size: bytes of a value in the compute dtype.

    keeps: CHECKPOINT_ACTIVATIONS. dropout: whether the model has any. cpu: whether attention goes by blocks where rows
    are short, and norms of heads keep their inputs as they are. whole: how many logits are computed at once
    (`models.loss.whole`); chunk: how many where there are more. embeddings, norms: whether these train.
    """

    rows: int
    positions: int
    size: int
    keeps: str
    dropout: bool
    cpu: bool
    whole: int
    chunk: int
    embeddings: bool
    norms: bool

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return self.rows * self.positions

    def mask(self, count: int, size: int) -> int:
        """What is kept of a dropout mask of so many values of `size` bytes: on the CPU what it is made of."""
        return 4 * (COLUMNS + 2 * -(-count * size // (4 * COLUMNS))) if self.cpu else count


class Linear(NamedTuple):
    """One linear as a step computes it.

    inputs, outputs: its widths. trains: whether its own weight does. rank: its adapter's, or 0. kind: how an adapter is
    computed, `added`, `effective` or `plain`, as `lora.functional.lora_linear` chooses. stored: bytes of a value of the
    weight, as its dtype says; quantized: whether it is in 4 or 8 bits. dropped: whether the adapter's input is dropped.
    output: whether the adapter keeps the output too, as one with a magnitude does.
    """

    inputs: int
    outputs: int
    trains: bool
    rank: int = 0
    kind: str = ""
    stored: int = 4
    quantized: bool = False
    dropped: bool = False
    output: bool = False

    @property
    def count(self) -> int:
        """How many weights it has."""
        return self.inputs * self.outputs


def linears_of_block(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The linears of a block: inputs and outputs by their path in it."""
    C, I = config.n_embd, config.inner_width  # noqa: E741 - the legend's
    Q, K = config.n_head * config.head_width, config.kv_heads * config.head_width
    if config.fused_qkv:
        found = {"attention.qkv_proj": (C, Q + 2 * K)}
    else:
        found = {"attention.q_proj": (C, Q), "attention.k_proj": (C, K), "attention.v_proj": (C, K)}
    found |= {"attention.o_proj": (Q, C)}
    gate = {"mlp.gate_proj": (C, I)} if config.mlp == "gated_silu" else {}
    return found | gate | {"mlp.up_proj": (C, I), "mlp.down_proj": (I, C)}


def kept(config: ModelConfig, step: Step, linears: Mapping[str, Linear]) -> Counter[str]:
    """What is alive when the loss of a part of a step is known, by what it is. linears: by their paths in the model."""
    dropped = step.mask(step.tokens * config.n_embd, STREAM) if step.dropout else 0
    found, graph = Counter({DROPOUT: dropped}), step.embeddings
    if config.positions == "rotary":
        found[ATTENTION] += step.positions * config.head_width * 4  # cos and sin, which all blocks share
    for i in range(config.n_layer):
        block = {path: linears[f"blocks.{i}.{path}"] for path in linears_of_block(config)}
        trains = graph or step.norms or any(linear.trains or linear.rank for linear in block.values())
        if trains and step.keeps == "block":
            found[BLOCKS] += step.tokens * config.n_embd * STREAM
        elif trains:
            found += of_block(config, step, block, graph)
        graph = trains
    found += _norm(config, step, graph)
    return found + _head(config, step, linears["lm_head"], graph)


def of_block(config: ModelConfig, step: Step, block: Mapping[str, Linear], graph: bool = True) -> Counter[str]:
    """What a block keeps, or, where a step keeps blocks' inputs only, what it keeps while it is run again.

    graph: whether the stream that it begins with has a gradient.
    """
    N, b, cheap = step.tokens, step.size, step.keeps == "cheap"
    parts = {path.rpartition(".")[2]: linear for path, linear in block.items()}
    first = [parts[name] for name in ("qkv_proj", "q_proj", "k_proj", "v_proj") if name in parts]
    gated = "gate_proj" in parts
    second = [parts[name] for name in ("gate_proj", "up_proj") if name in parts]
    found = _norm(config, step, graph) + _norm(config, step, True)
    found += _projection(step, first, cheap) + _attention(config, step, first, parts["o_proj"])
    found += _projection(step, [parts["o_proj"]], False)
    found += _projection(step, second, cheap) + _projection(step, [parts["down_proj"]], cheap)
    inner = N * config.inner_width * b
    found[MLP] += 2 * inner if gated else inner  # what the activation, and the product, need
    if gated and not cheap:
        found[MLP] += inner  # SiLU of the gate
    if step.dropout:
        found[DROPOUT] += 2 * step.mask(N * config.n_embd, b)
    return found


def _norm(config: ModelConfig, step: Step, graph: bool) -> Counter[str]:
    """A norm of the stream: its input, and what it was divided by."""
    if not graph and not step.norms:
        return Counter()
    scalars = 1 if config.norm == "rms" else 2
    return Counter({NORMS: step.tokens * (config.n_embd + scalars) * STREAM})


def _projection(step: Step, group: Sequence[Linear], remade: bool) -> Counter[str]:
    """Linears of one input. remade: whether that input is made again for the backward pass, and not kept."""
    found: Counter[str] = Counter()
    N, b, alike = step.tokens, step.size, len({(linear.rank > 0, linear.kind) for linear in group}) == 1
    if any(linear.trains or linear.rank for linear in group) and not remade:
        found[INPUTS] += N * group[0].inputs * b
    for each in [group] if alike else [[linear] for linear in group]:
        dropped = [linear for linear in each if linear.rank and linear.dropped]
        if dropped:
            found[DROPOUT] += step.mask(N * each[0].inputs, b)
        found += _weights(step, each)
        found[INPUTS] += sum(N * linear.outputs * b for linear in each if linear.output and linear.kind != "plain")
    return found


def _weights(step: Step, group: Sequence[Linear]) -> Counter[str]:
    """Copies of weights in the compute dtype, and what adapters keep beside their input."""
    b, rank = step.size, sum(linear.rank for linear in group)
    inputs, outputs = group[0].inputs, sum(linear.outputs for linear in group)
    count = inputs * outputs
    kind, again = group[0].kind, step.keeps != "none" or any(linear.quantized for linear in group)
    if kind == "added":
        low = step.tokens * rank + rank * inputs + sum(linear.rank * linear.outputs for linear in group)
        copied = not again and group[0].stored != b
        return Counter({INPUTS: low * b, WEIGHTS: copied * count * b})
    if kind == "effective":
        several = (rank * inputs + rank * outputs) * 4 if len(group) > 1 else 0
        return Counter({WEIGHTS: several + (0 if again else count * b)})
    if kind == "plain" or group[0].trains:
        adapted, joined = kind == "plain", len(group) > 1 and count <= SMALL
        copied = step.keeps != "cheap" and (adapted or joined or group[0].stored != b)
        return Counter({WEIGHTS: copied * count * b})
    joined = len(group) > 1 and count <= SMALL
    return Counter({WEIGHTS: (not again and (joined or group[0].stored != b)) * count * b})


def _attention(config: ModelConfig, step: Step, first: Sequence[Linear], last: Linear) -> Counter[str]:
    """Queries, keys and values, and on the CPU the attention weights, of blocks of queries; elsewhere the output, where
    the last linear does not keep it as its input."""
    N, b, T = step.tokens, step.size, step.positions
    Q, K = config.n_head * config.head_width, config.kv_heads * config.head_width
    normalised = 0
    if config.qk_norm:  # on the CPU the inputs of both norms, views of one tensor that has the values too, and a scale
        scales = N * (config.n_head + config.kv_heads) * 4
        normalised = (Q + 2 * K) * N * b + scales if step.cpu else (Q + K) * N * 4
    if step.cpu and T <= LONGEST_BY_BLOCKS:
        pairs = [step.rows * config.n_head * min(BLOCK, T - a) * min(a + BLOCK, T) for a in range(0, T, BLOCK)]
        weights = sum(pairs) * b if step.keeps == "none" else 0
        masks = sum(step.mask(count, b) for count in pairs) if step.dropout else 0
        return Counter({ATTENTION: normalised + (Q + 2 * K) * N * b + weights, DROPOUT: masks})
    turned = Q + K if config.positions == "rotary" else 0  # which are new tensors; the others are views of one
    if config.kv_heads != config.n_head:  # keys and values as many times as there are heads
        values = (turned or Q + 2 * K) + 2 * Q
    else:
        values = turned + (K if first[0].kind == "added" and turned else Q + 2 * K)
    sums = N * config.n_head * 4  # the logarithms of what the softmax divided by
    output = 0 if last.trains or last.rank else Q
    return Counter({ATTENTION: normalised + (values + output) * N * b + sums})


def _head(config: ModelConfig, step: Step, head: Linear, graph: bool) -> Counter[str]:
    """The logits, or the gradients that took their place where they go by chunks."""
    N, C, V, b = step.tokens, config.n_embd, config.vocab_size, step.size
    trained = V * C * 4 * head.trains + (V + C) * 4 * head.rank
    if N * V > step.whole:
        return Counter({LOGITS: N * C * b + trained})
    x = N * C * b if head.trains or head.rank else 0
    copy = V * C * b if (graph and head.stored != b) or (head.rank and not head.dropped) else 0
    dropped = step.mask(N * C, b) + N * head.rank * b if head.dropped else 0
    return Counter({LOGITS: N * V * 4 + x + copy, DROPOUT: dropped})


def at_loss(config: ModelConfig, step: Step, head: Linear) -> int:
    """What stands for a while when the loss is computed, beside what is kept: logits and their gradients, of a chunk
    those of a head that trains too."""
    logits, b = step.tokens * config.vocab_size, step.size
    if logits <= step.whole:
        return logits * 2 * 4
    logits = min(logits, step.chunk)
    if head.trains:
        return logits * 2 * 4 + head.count * (2 * 4 + b)  # the gradients of this chunk and of the one before
    return logits * (3 * 4 + 2 * b) + head.count * b * (head.stored != b)  # and the logarithms of the one before


def at_block(config: ModelConfig, step: Step, linears: Mapping[str, Linear]) -> int:
    """What stands for a while in a block's backward pass: the gradients of the stream, in fp32 and the compute dtype,
    inside the MLP and of a weight, and what is made again."""
    N, b, C, remade = step.tokens, step.size, config.n_embd, step.keeps == "cheap"
    block = {path: linears[f"blocks.{config.n_layer - 1}.{path}"] for path in linears_of_block(config)}
    wide = (2 if config.mlp == "gated_silu" else 1) * (2 if remade else 1) * N * config.inner_width * b
    again_made = {path for path, each in block.items() if each.quantized or step.keeps != "none"}
    made = [
        each.count * (4 + b + 4 * each.quantized)  # a gradient, or a weight that an adapter changed
        for path, each in block.items()
        if each.trains or (each.kind == "effective" and path in again_made)
    ]
    weight = max(made, default=0)
    again = sum(of_block(config, step, block).values()) if step.keeps == "block" else 0
    return N * C * (STREAM + b) + wide + weight + again
