"""A run as a folder with an ONNX graph, which onnxruntime has loaded and computed with."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from jobs.exporting.held_out import HeldOut
from jobs.exporting.hugging_face.folder import describing_files, whole_files
from jobs.exporting.hugging_face.tokens import tokenizer_files
from jobs.exporting.onnx.graph import write_graph
from jobs.exporting.onnx.int8 import quantize, with_outliers
from jobs.exporting.onnx.runtime import OnnxRuntime
from jobs.exporting.onnx.tensorrt import trtexec_script
from jobs.exporting.opening import Opened, logits
from jobs.exporting.options import MORE_LOSS
from jobs.exporting.verifying import Difference, draft_of
from models.generation import sampling
from models.stored import INDEX
from models.transformer import Transformer
from runtime.console import say
from runtime.errors import UserError
from runtime.extras import needs_package
from runtime.report import size
from runtime.storage.folders import Files, write_file

GRAPH, SCRIPT = "model.onnx", "trtexec.sh"
LIMIT = 1e-4  # of the largest logit
SHORTEST = 4  # tokens that a model must take
LONGEST = 256  # tokens of a row that graph and run are compared on, where the context is longer
STEPS = 16  # tokens that are chosen one after the other


def check_packages() -> None:
    """Raises UserError where what makes or verifies a graph is not installed."""
    with needs_package("onnx", "onnx"):
        import onnx  # noqa: F401 - only whether it is there
    with needs_package("onnxscript", "onnx"):
        import onnxscript  # noqa: F401
    with needs_package("onnxruntime", "onnx"):
        import onnxruntime  # noqa: F401


def export_folder(
    opened: Opened, held_out: HeldOut, out: Path, cached: bool = True, int8: bool = False, allowed: float = MORE_LOSS,
    place: str = "folder",
) -> list[str]:  # fmt: skip
    """Write the folder, and tell what was found. cached: with keys and values that come in and go out. int8: with
    matrices in 8 bits. allowed: how much higher the loss may be. place: where its card says that it lies.

    Raises UserError where onnxruntime computes something else, or there is no room, and UsageError where `out` exists.
    """
    if opened.model.config.max_positions < SHORTEST:
        raise UserError(f"{opened.run.name} takes fewer than {SHORTEST} tokens, and torch.onnx needs some to trace")
    opened.make_dense()
    files, told = _files_beside(opened, place)
    if not int8:  # TensorRT does not read what onnxruntime quantises while it computes
        files[SCRIPT] = trtexec_script(GRAPH, opened.model.config, cached)
    _check_room(opened.model, out)
    with draft_of(out) as draft:
        draft.mkdir()
        for name, content in files.items():
            write_file(draft / name, content)
        say(f"torch.onnx traces {_parameters(opened.model):,} parameters, which takes from seconds to minutes ...")
        write_graph(opened.model, draft / GRAPH, cached)
        told = [*_compared(OnnxRuntime(draft / GRAPH, opened.model.config, cached), opened), *told]
        if int8:
            told.append(quantize(draft / GRAPH, with_outliers(opened.model, held_out.parts[0][0])))
        asked = OnnxRuntime(draft / GRAPH, opened.model.config, cached)
        if cached:
            told.append(_walked(asked, opened.model, None if int8 else LIMIT))
        told.append(held_out.compare("onnxruntime", asked.logits, allowed))
    return told


def _parameters(model: Transformer) -> int:
    return sum(p.numel() for p in model.parameters())


def _files_beside(opened: Opened, place: str) -> tuple[Files, list[str]]:
    """Config, tokenizer, template and card, and what is missing of these."""
    use = ["import onnxruntime", "", f"session = onnxruntime.InferenceSession({f'{place}/{GRAPH}'!r})"]
    told, described = [], describing_files(opened, "onnx", use)
    try:
        files, _ = whole_files(opened)
    except UserError as error:
        files = tokenizer_files(opened.base.tokenizer, opened.model.config.max_positions)
        told.append(f"Without config.json: {error}")
    kept = {name: content for name, content in files.items() if not name.endswith((".safetensors", INDEX))}
    return kept | described, told


def _check_room(model: Transformer, out: Path) -> None:
    """Raises UserError where the disk has less room than the graph takes, twice where it is quantized."""
    need, free = 5 * _parameters(model), shutil.disk_usage(out.absolute().parent).free
    if free < need:
        raise UserError(f"{out}: the graph takes {size(need)} while it is made, and {size(free)} are free")


def _compared(asked: OnnxRuntime, opened: Opened) -> list[str]:
    """Logits for random tokens in shapes none of which is that of the example which torch.onnx has traced."""
    longest = min(opened.model.config.max_positions, LONGEST)
    shapes, found = [(1, 1), (1, longest), (3, max(1, longest // 7)), (5, longest // 2 + 1)], []
    for shape in shapes:
        tokens = torch.randint(asked.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        found.append(_difference(asked.logits(tokens), logits(opened.model, tokens)))
    found.append(_difference(asked.logits(opened.probe), opened.expected))
    named = ", ".join(f"{rows} x {length}" for rows, length in [*shapes, tuple(opened.probe.shape)])
    return [f"Verified on random tokens, {named}: {max(found, key=lambda difference: difference.found)}"]


def _difference(found: Tensor, expected: Tensor) -> Difference:
    return Difference.between("onnxruntime", found, expected, LIMIT)


def _walked(asked: OnnxRuntime, model: Transformer, limit: float | None) -> str:
    """Rows of several lengths that go on with the tokens that the run chooses greedily, one after the other."""
    steps = min(STEPS, model.config.max_positions // 2)
    longest = min(STEPS, model.config.max_positions - steps)
    tokens = torch.randint(asked.config.vocab_size, (3, longest), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [row[:length] for row, length in zip(tokens, (longest, -(-longest // 2), 1), strict=True)]
    rows = sampling.generate(model, prompts, steps, sampling.Sampling(greedy=True), 0)
    found = asked.along([row[:-1] for row in rows], steps)
    expected = torch.cat([logits(model, torch.tensor([row[:-1]]))[:, -steps:] for row in rows])
    same = int((found.argmax(-1) == torch.tensor([row[-steps:] for row in rows])).sum())
    told = f"With its cache, after prompts of {', '.join(str(len(prompt)) for prompt in prompts)} tokens: "
    told += f"onnxruntime chooses {same} of {found.shape[0] * steps} tokens as the run does"
    return f"{told}; {_difference(found, expected)}" if limit else told
