"""What onnxruntime makes of a graph: logits of whole rows, and step by step with keys and values handed on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jobs.exporting.onnx.graph import READ, past_names
from models.config import ModelConfig


class OnnxRuntime:
    """A graph that onnxruntime has loaded, for the CPU. cached: whether keys and values come in and go out."""

    def __init__(self, path: Path, config: ModelConfig, cached: bool) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.config, self.cached = config, cached

    def nothing(self, rows: int) -> list[np.ndarray]:
        """Keys and values of no positions."""
        shape = (rows, self.config.kv_heads, 0, self.config.head_width)
        return [np.zeros(shape, np.float32) for _ in past_names(self.config, "present")]

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) -> (B, T, V), from the beginning of a text."""
        if not self.cached:
            return torch.from_numpy(self.session.run(["logits"], {READ[0]: tokens_BT.numpy()})[0])
        positions = torch.arange(tokens_BT.shape[1]).expand(tokens_BT.shape)
        return self._pass(tokens_BT, torch.ones_like(tokens_BT), positions, self.nothing(len(tokens_BT)), ["logits"])[0]

    def along(self, rows: Sequence[Sequence[int]], steps: int) -> Tensor:
        """The logits of the last `steps` positions of rows of any lengths, (B, steps, V): all tokens before these are
        read at once, padded on the left, and then one after the other."""
        ids = [torch.tensor(row) for row in rows]
        width = max(map(len, ids)) - steps + 1
        heads = [row[: len(row) - steps + 1] for row in ids]
        tokens = torch.stack([torch.cat((row.new_zeros(width - len(row)), row)) for row in heads])
        padding_B1 = torch.tensor([[width - len(row)] for row in heads])
        mask = (torch.arange(width) >= padding_B1).long()
        positions, past, found = (torch.arange(width) - padding_B1).clamp(min=0), self.nothing(len(rows)), []
        for step in range(steps):
            logits, *past = self._pass(tokens, mask, positions, past, None)
            found.append(logits[:, -1])
            if step + 1 < steps:
                tokens = torch.stack([row[len(row) - steps + 1 + step] for row in ids])[:, None]
                mask, positions = torch.cat((mask, mask.new_ones(len(rows), 1)), 1), positions[:, -1:] + 1
        return torch.stack(found, 1)

    def _pass(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, past: Sequence[np.ndarray], wanted: list[str] | None
    ) -> list:
        read = dict(zip(READ, (t.numpy() for t in (tokens, mask, positions)), strict=True))
        before = dict(zip(past_names(self.config, "past_key_values"), past, strict=True))
        logits, *present = self.session.run(wanted, read | before)
        return [torch.from_numpy(logits), *present]
