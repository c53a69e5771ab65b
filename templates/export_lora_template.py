"""Merge an adapter and export the model to ONNX: python templates/export_lora_template.py --run lora-folio-r8

It needs `pip install -r requirements-onnx.txt`.
"""

import argparse
import importlib.util
import logging
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that Python finds the repository's own modules
from jobs.generating.load import load
from lora.merge import merge
from runtime.errors import UserError


class Logits(nn.Module):
    """The model as a graph needs it: tensors in, one tensor out. The model itself also returns a loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V)."""
        return self.model(tokens_BT)[0]


def difference(path: Path, model: nn.Module, vocab_size: int, longest: int) -> float:
    """The largest difference of the file's logits from the model's, relative to the largest logit."""
    import onnxruntime  # here and not above, as a file can be made without it

    session, worst = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), 0.0
    # None of these is the shape of the example that was traced: a file whose shapes were fixed by it would fail here.
    for shape in ((1, 1), (1, longest), (3, 5), (5, longest // 2 + 1)):
        tokens = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = model(tokens)
        found = torch.from_numpy(session.run(None, {"tokens": tokens.numpy()})[0])
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints-dir", default="checkpoints")
    parser.add_argument("--run", default="template-lora", help="default: template-lora")
    parser.add_argument("--out", default="", help="default: the run's name and .onnx, beside the run's folder")
    args = parser.parse_args(argv)
    if (path := Path(args.out or f"{args.checkpoints_dir}/{args.run}.onnx")).exists():
        raise UserError(f"{path} is there already: choose another --out")
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise UserError(f"{' and '.join(missing)} must be installed first: pip install -r requirements-onnx.txt")
    model, _ = load(args.run, args.checkpoints_dir)
    longest, vocab_size = model.config.max_positions, model.config.vocab_size

    # A graph is fixed arithmetic and cannot switch adapters, so what the adapter adds goes into the weights first.
    # Other programs then need not know that there ever was one: the graph is that of a plain base.
    merge(model)
    # On CPUs this model computes attention in a Python loop over blocks of queries. Tracing would unroll that loop for
    # the example's length and fix it, without a word; `causal_attention` sees that it is exported, and does not loop.
    # The example has sizes of 2 or more, as torch takes a size of 1 for a constant. `Dim` names what may vary.
    example = torch.zeros(2, min(8, longest - 1), dtype=torch.long)
    sizes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=1, max=longest)}
    graph, names = Logits(model).eval(), {"input_names": ["tokens"], "output_names": ["logits"]}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it lists packages that this model does not need
    draft = path.with_name(f"{path.name}.unchecked")  # a name that says so: only what was checked gets the other one
    torch.onnx.export(graph, (example,), draft, dynamic_shapes=(sizes,), external_data=False, verbose=False, **names)
    if importlib.util.find_spec("onnxruntime") is None:
        raise UserError(f"{draft} was made, but not checked: that needs onnxruntime, of requirements-onnx.txt")
    if not (worst := difference(draft, graph, vocab_size, longest)) <= 1e-4:  # rounding is a hundred times smaller
        raise UserError(f"the logits of {draft} are off by {worst:.1e} of the largest: do not use it")
    draft.rename(path)
    print(f"{path}: merged; its logits are the model's within {worst:.0e} of the largest, in four other shapes")

    # TensorRT compiles the file for one kind of GPU. Its parameters:
    #   --minShapes, --maxShapes   the range of batch x length that the engine accepts; outside it, it refuses to run
    #   --optShapes                the shape that it is tuned for: take the one that you will have most often
    #   --fp16                     may compute in 16 bits, about twice as fast; compare the losses afterwards. Newer
    #                              versions prefer --stronglyTyped and a file whose weights are in 16 bits already
    #   --memPoolSize              working memory in MiB while it tries kernels; too little leaves out fast ones
    #   --timingCacheFile          keeps what was measured, so that the next build takes seconds
    #   --saveEngine               the engine. It fits this TensorRT version and this kind of GPU, so keep the .onnx too
    shapes = f"--minShapes=tokens:1x1 --optShapes=tokens:1x{longest} --maxShapes=tokens:16x{longest}"
    more = f"--fp16 --memPoolSize=workspace:2048 --timingCacheFile=timing.cache --saveEngine={path.stem}.plan"
    print(f"TensorRT (this command was not run here):\n  trtexec --onnx={path} {shapes} {more}")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
