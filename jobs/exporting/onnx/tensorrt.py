"""The command that makes a TensorRT engine of a graph."""

from __future__ import annotations

from jobs.exporting.onnx.graph import READ, past_names
from models.config import ModelConfig

ROWS = 16  # of a batch, at most


def trtexec_script(graph: str, config: ModelConfig, cached: bool) -> bytes:
    """A script for the folder of the graph: from one token to full contexts of `ROWS` rows, tuned for one row, which
    takes its next token in the middle of a context, or without a cache is a whole one."""
    longest = config.max_positions
    sizes = {"min": (1, 1, 0), "opt": (1, 1, longest // 2), "max": (ROWS, longest, longest - 1)}
    if not cached:
        sizes["opt"] = (1, longest, 0)
    shapes = (f"--{which}Shapes={_shapes(config, cached, *size)}" for which, size in sizes.items())
    words = ["trtexec", f"--onnx={graph}", *shapes, "--saveEngine=model.plan"]
    return ('#!/bin/sh\ncd "$(dirname "$0")" || exit 1\n' + " ".join(words) + "\n").encode()


def _shapes(config: ModelConfig, cached: bool, rows: int, new: int, before: int) -> str:
    """What trtexec's --minShapes and the others take."""
    shapes = {READ[0]: (rows, new)}
    if cached:
        total = min(before + new, config.max_positions)
        shapes |= {READ[1]: (rows, total), READ[2]: (rows, new)}
        past = (rows, config.kv_heads, before, config.head_width)
        shapes |= dict.fromkeys(past_names(config, "past_key_values"), past)
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
