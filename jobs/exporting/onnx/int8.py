"""A graph with its matrices in 8 bits, and what they multiply too, whose scale onnxruntime finds while it computes."""

from __future__ import annotations

import ast
import logging
from pathlib import Path

import torch
from torch import Tensor

from jobs.exporting.onnx.graph import IN_ONE_FILE, sync
from lora.layers.linear import LoRALinear
from models.transformer import Transformer
from runtime.console import say
from runtime.report import size

# A matrix stays in fp32 where what it multiplies has a value so many times the root mean square, as 256 steps over that
# range add a twentieth of it as noise. On the Folio, SmolLM2-135M loses 0.44 nats a token with all matrices in 8 bits,
# and 0.004 so. Dettmers et al. 2022, "LLM.int8()", arXiv 2208.07339, keep the features with such values in 16 bits.
OUTLIER = 20
SCOPES = "pkg.torch.onnx.name_scopes"  # where torch.onnx notes which modules a node is of


@torch.no_grad()
def with_outliers(model: Transformer, tokens: Tensor) -> list[str]:
    """The linears whose inputs are spread too widely for 8 bits when the model reads these tokens."""
    found = {}

    def look(path: str, x: Tensor) -> None:
        found[path] = (x.abs().max() / x.square().mean().sqrt()).item()

    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, path=path: look(path, inputs[0]))
        for path, layer in layers.items()
    ]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return [path for path, ratio in found.items() if ratio > OUTLIER]


def quantize(path: Path, kept: list[str]) -> str:
    """Put a graph in 8 bits in the place of a graph, and tell both sizes. kept: the linears that stay as they are.

    Raises OSError.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    say("Quantizing with onnxruntime ...")
    before, draft, large = _bytes(path), path.with_name("quantized.onnx"), _bytes(path) > IN_ONE_FILE
    logging.disable(logging.WARNING)  # it recommends a preparation that torch.onnx has done
    try:
        quantize_dynamic(
            path, draft, ["MatMul"], per_channel=True, weight_type=QuantType.QInt8, nodes_to_exclude=_nodes(path, kept),
            use_external_data_format=large,
        )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
    if large:
        _move(draft, path)
    else:
        draft.replace(path)
    sync(path)
    told = f"In int8: {size(_bytes(path))} instead of {size(before)}"
    why = f"in fp32 stay {', '.join(kept[:2])}{f' and {len(kept) - 2} more' if len(kept) > 2 else ''}"
    return f"{told}; {why}, whose inputs have values above {OUTLIER} times the root mean square" if kept else told


def _nodes(path: Path, kept: list[str]) -> list[str]:
    """The names of the nodes that are of these linears, or of what computes several of them as one."""
    import onnx

    places = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        noted = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
        paths = [scope.removeprefix("model.") for scope in ast.literal_eval(noted) if scope.startswith("model.")]
        if node.op_type == "MatMul" and paths:
            places[node.name] = paths[-1]
    own = set(places.values())
    wanted = {linear if linear in own else linear.rpartition(".")[0] for linear in kept}
    return [node for node, place in places.items() if place in wanted]


def _move(source: Path, target: Path) -> None:
    """Give a graph with weights beside it the name of another, and its weights that of the other's."""
    import onnx

    graph = onnx.load(source)
    for old in [*target.parent.glob(f"{target.name}*"), *source.parent.glob(f"{source.name}*")]:
        old.unlink()
    onnx.save(graph, target, save_as_external_data=True, location=f"{target.name}.data")


def _bytes(path: Path) -> int:
    """Of a graph with the weights beside it."""
    return sum(each.stat().st_size for each in path.parent.glob(f"{path.name}*"))
