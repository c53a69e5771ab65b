"""A model's own forward pass as an ONNX graph, with keys and values that come in and go out, or without.

Inputs and outputs have the names that optimum gives them. Shapes: B batch, T new positions, P past ones, S = P + T,
H heads, K heads of keys and values, D head width, V vocabulary.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.layers.inference import SMALL
from models.config import ModelConfig
from models.transformer import Transformer

IN_ONE_FILE = 2**30  # bytes of weights up to which they are inside the file, which can have 2 GiB
READ = ("input_ids", "attention_mask", "position_ids")
B, T, P, S = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


class PastLayer:
    """Keys and values of one layer, (B, K, P, D) each; those of a pass are put after them."""

    def __init__(self, past: Past, k_BKPD: Tensor, v_BKPD: Tensor) -> None:
        self.past, self.k, self.v = past, k_BKPD, v_BKPD

    def store(self, k_BKTD: Tensor, v_BKTD: Tensor) -> bool:
        """Put new keys and values after the others; False, as attention is over all of them."""
        self.k, self.v = torch.cat((self.k, k_BKTD), 2), torch.cat((self.v, v_BKTD), 2)
        return False

    def attend(self, q_BHTD: Tensor) -> Tensor:
        """(B, H, T, D) -> (B, H, T, D)."""
        shared = q_BHTD.shape[1] // self.k.shape[1]
        k, v = (t if shared == 1 else t.repeat_interleave(shared, 1) for t in (self.k, self.v))
        return F.scaled_dot_product_attention(q_BHTD, k, v, self.past.seen_B1TS)


class Past:
    """In the place of `models.generation.cache.KVCache`: what was read before is an input, and stays as it is.

    mask: int64 (B, S), 0 where a row is padding. positions: int64 (B, T). past: keys and values of layer after layer.
    width: how many positions there may be.
    """

    def __init__(self, mask_BS: Tensor, positions_BT: Tensor, past: tuple[Tensor, ...], width: int) -> None:
        self.positions_BT, self.width = positions_BT, width
        self.layers = [PastLayer(self, k, v) for k, v in zip(past[::2], past[1::2], strict=True)]
        before, new = past[0].shape[2], positions_BT.shape[1]
        rows_T1 = before + torch.arange(new)[:, None]
        self.seen_B1TS = ((torch.arange(before + new) <= rows_T1) & mask_BS.bool()[:, None])[:, None]

    def positions(self, _: int) -> Tensor:
        """Those that were given."""
        return self.positions_BT

    def last(self, x_BTC: Tensor) -> Tensor:
        """All positions: whoever runs the graph takes those that it wants."""
        return x_BTC


class WithPast(nn.Module):
    """The model with its cache as inputs and outputs, so that one graph reads a prompt and what follows."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> tuple:
        """int64 (B, T), (B, S), (B, T), and (B, K, P, D) twice a layer -> logits (B, T, V), and (B, K, S, D)."""
        cache = Past(attention_mask, position_ids, past, self.model.config.max_positions)
        logits_BTV, _ = self.model(input_ids, cache=cache)
        return logits_BTV, *(t for layer in cache.layers for t in (layer.k, layer.v))


class WithoutPast(nn.Module):
    """The model without its cache. The model itself returns a loss too."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 (B, T) -> logits (B, T, V)."""
        return self.model(input_ids)[0]


def past_names(config: ModelConfig, when: str) -> list[str]:
    """The names of keys and values, layer after layer. when: `past_key_values`, which come in, or `present`."""
    return [f"{when}.{i}.{kind}" for i in range(config.n_layer) for kind in ("key", "value")]


def write_graph(model: Transformer, path: Path, cached: bool) -> None:
    """Export the model in fp32, batch and lengths free; large weights go into a file beside. Raises OSError."""
    import onnxscript.optimizer

    config = model.config
    if model.rotary:  # its table is a constant of the graph, so all of it must be there
        model.rotary.at(torch.zeros(1, dtype=torch.long), config.max_positions)
    # No two sizes are equal, and none is 1, which torch would take for a constant.
    batch, new, before = 2, 3, 4
    tokens = torch.zeros(batch, new, dtype=torch.long)
    inputs, shapes, names = (tokens,), ({0: B, 1: T},), {"input_names": READ[:1], "output_names": ["logits"]}
    if cached:
        one = torch.zeros(batch, config.kv_heads, before, config.head_width)
        past = [one.clone() for _ in past_names(config, "present")]
        inputs += torch.ones(batch, before + new, dtype=torch.long), tokens.clone(), *past
        shapes += {0: B, 1: S}, {0: B, 1: T}, tuple({0: B, 2: P} for _ in past)
        names["input_names"] = [*READ, *past_names(config, "past_key_values")]
        names["output_names"] = ["logits", *past_names(config, "present")]
    graph = (WithPast if cached else WithoutPast)(model).eval()
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(graph, inputs, dynamic_shapes=shapes, verbose=False, **names)
        # Small weights are multiplied as one (`fused_projection`): joined here, once, instead of in every pass.
        onnxscript.optimizer.fold_constants(program.model, input_size_limit=SMALL, output_size_limit=SMALL)
    program.save(path, external_data=4 * sum(p.numel() for p in model.parameters()) > IN_ONE_FILE)
    sync(path)


def sync(path: Path) -> None:
    """Make what another library wrote durable: a graph, and the weights beside it."""
    for written in path.parent.glob(f"{path.name}*"):
        with open(written, "rb") as file:
            os.fsync(file.fileno())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.onnx says of itself: packages that this does not need, and what will be deprecated."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
