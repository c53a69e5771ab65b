"""Where every megabyte of a training step goes, drawn as docs/pictures/memory.png.

python -m benchmarks.memory_parts                    10.7M parameters, 4,096 tokens: all weights, and LoRA (another of
                                                     the benchmarks' models: --size, --tokens)
python -m benchmarks.memory_parts --base FOLDER      and a pretrained base, 1,024 tokens: LoRA in bf16 and nf4

What is kept for the backward pass is measured, tensor by tensor, after a forward pass; the peak in a fresh process.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.contest import SIZES
from benchmarks.live_bytes import LiveBytes
from benchmarks.memory import Case, model_of, peak
from jobs.comparing.timing import repeatable
from models.files import to_files
from models.transformer import Block, Transformer
from runtime.console import say
from runtime.device import pick_machine
from runtime.pictures import new_figure, save_picture
from runtime.processes.command import run_command
from runtime.storage import folders
from runtime.storage.quantized import Quantized

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "memory.png"
WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer's state"
STREAM, NORMED = "the stream, fp32: inputs of norms and blocks", "outputs of norms: inputs of linears"
ATTENTION, MLP, LOGITS = "attention: q, k, v, its weights, its output", "MLP: before and after the activation", "logits"
COPIES, MASKS = "weights again, in the compute dtype", "dropout: masks"
REST = "what stands for a while (in block, a block run again),\ntorch's own, and holes in the heap"
COLOURS = {
    WEIGHTS: "#333333", GRADIENTS: "#777777", OPTIMIZER: "#b0b0b0", STREAM: "#2f4b8f", NORMED: "#6f93d8",
    ATTENTION: "#d1703c", MLP: "#e8b04a", COPIES: "#7a4a9e", MASKS: "#3f9a7a", LOGITS: "#b23a5b", REST: "#eeeeee",
}  # fmt: skip


def cases(size: str, tokens: int, base: str) -> list[Case]:
    """What is drawn."""
    found = [Case(size, tokens, "full"), *(Case(size, tokens, "lora", keeps) for keeps in ("none", "cheap", "block"))]
    if base:
        pretrained = [("none", "cheap"), ("nf4", "cheap"), ("none", "block"), ("nf4", "block")]
        found += [Case("", 1024, "lora", keeps, form, base) for form, keeps in pretrained]
    return found


class Places:
    """Which part of a model computes now. Only blocks, norms, attention and MLPs are hooked: a hook on a linear would
    change the way it is computed."""

    def __init__(self, model: Transformer) -> None:
        self.stack, self.weights = ["outside"], {tuple(sorted(p.shape)) for p in model.parameters() if p.dim() == 2}
        widths = [p.shape for p in model.parameters() if p.dim() == 2]
        self.weights |= {tuple(sorted((n * a, b))) for a, b in widths for n in (2, 3)}
        for path, module in model.named_modules():
            name = path.rpartition(".")[2]
            if isinstance(module, Block) or name in ("norm_1", "norm_2", "attention", "mlp"):
                module.register_forward_pre_hook(lambda *_, name=name: self.stack.append(name))
                module.register_forward_hook(lambda *_: self.stack.pop() and None, always_call=True)

    def label(self, tensor: Tensor) -> str:
        """What a tensor that is made now is counted as."""
        place = self.stack[-1]
        if tensor.dtype == torch.bool:
            return MASKS
        if tensor.dim() == 2 and tuple(sorted(tensor.shape)) in self.weights:
            return COPIES
        if place in ("attention", "mlp"):
            return ATTENTION if place == "attention" else MLP
        if place == "outside" and len(self.stack) == 1 and tensor.dim() == 2:
            return LOGITS
        return STREAM if tensor.dtype == torch.float32 else NORMED


def parts_of(case: Case) -> dict[str, float]:
    """Megabytes of a step by what they are."""
    machine = pick_machine("cpu", "auto")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "base")
        if not case.base:
            folders.commit_folder(folder, to_files(peers.ours(SIZES[case.size])))
        model = model_of(case, str(folder))
    context = 256 if case.base else SIZES[case.size][-1]
    tokens = torch.randint(model.config.vocab_size, (case.tokens // context, context + 1))
    stepper = repeatable(model, tokens, machine)
    stepper.step(0)  # after which the optimizer has its state
    places, batch = Places(model), stepper.batch(0)
    known = [batch.tokens, batch.targets, *held(model)]
    with LiveBytes(known, places.label) as live, machine.autocast():
        loss = model(batch.tokens, batch.targets)[1]
        found = live.by_label()
    del loss
    states = (t for state in stepper.optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
    found[WEIGHTS], found[OPTIMIZER] = sum(t.nbytes for t in known[2:]), sum(t.nbytes for t in states)
    found[GRADIENTS] = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return megabytes(found, peak(case))


def megabytes(found: Counter[str], resident: int) -> dict[str, float]:
    """The parts in MB, in the order in which they are drawn, and what of the peak is none of them."""
    found[REST] = max(0, resident - found.total())
    return {name: found[name] / 1e6 for name in COLOURS}


def held(model: nn.Module) -> list[Tensor]:
    """All tensors that a model holds, once each; of a matrix in 4 bits, its parts."""
    found = [
        t for p in model.parameters() for t in (p.data.parts.values() if isinstance(p.data, Quantized) else (p.data,))
    ]
    return list({t.data_ptr(): t for t in found}.values())


def name_of(case: Case) -> str:
    """A case below its bar."""
    kind = "all weights" if case.kind == "full" else f"LoRA{'' if not case.base else f', {case.form}'}"
    kind = kind.replace(", none", ", bf16")
    return f"{kind}\n{case.keeps}"


def draw(rows: list[tuple[Case, dict[str, float]]]) -> Figure:
    """A stacked bar for each case, in a panel for each model."""
    models = list(dict.fromkeys((case.size, case.base) for case, _ in rows))
    shown = [name for name in COLOURS if any(parts[name] >= 0.5 for _, parts in rows)]
    counts = [sum((case.size, case.base) == model for case, _ in rows) for model in models]
    figure = new_figure("Where the megabytes of a training step go (CPU, bf16)", (3 + 1.35 * sum(counts), 6.4))
    panels = figure.subplots(1, len(models), width_ratios=counts, squeeze=False)[0]
    for axes, (size, base) in zip(panels, models, strict=True):
        mine = [row for row in rows if (row[0].size, row[0].base) == (size, base)]
        bottom = [0.0] * len(mine)
        for name in shown:
            values = [parts[name] for _, parts in mine]
            edge = {"edgecolor": "#999999", "hatch": "///", "linewidth": 0} if name == REST else {}
            axes.bar([name_of(case) for case, _ in mine], values, 0.72, bottom, color=COLOURS[name], label=name, **edge)
            for i, value in enumerate(values):
                if value > 0.03 * max(sum(parts.values()) for _, parts in mine):
                    dark = name in (WEIGHTS, STREAM, COPIES, ATTENTION, LOGITS, GRADIENTS, MASKS)
                    colour_of_text = "white" if dark else "black"
                    axes.text(
                        i,
                        bottom[i] + value / 2,
                        f"{value:,.0f}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        c=colour_of_text,
                    )
            bottom = [a + b for a, b in zip(bottom, values, strict=True)]
        for i, total in enumerate(bottom):
            axes.text(i, total, f"{total:,.0f}", ha="center", va="bottom", fontsize=9, fontweight="bold")
        axes.set_title(f"{Path(base).name or f'{size} parameters'}, {mine[0][0].tokens:,} tokens", fontsize=10)
        axes.set_ylabel("MB, up to the peak of the process")
        axes.margins(y=0.08)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", fontsize=8, frameon=False)
    return figure


def main() -> None:
    """Run the command."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--base", default="", help="a Hugging Face folder")
    flags.add_argument("--size", choices=SIZES, default="10.7M")
    flags.add_argument("--tokens", type=int, default=4096)
    flags.add_argument("--out", type=Path, default=PICTURE, help="the picture")
    options, rows = flags.parse_args(), []
    for case in cases(options.size, options.tokens, options.base):
        rows.append((case, parts_of(case)))
        told = ", ".join(
            f"{name.replace(chr(10), ' ')} {value:,.0f}" for name, value in rows[-1][1].items() if value >= 0.5
        )
        print(f"{Path(case.base).name or case.size}, {case.tokens} tokens, {case}: {told} MB", flush=True)
    if save_picture(options.out, draw, rows):
        say(f"Drawn: {options.out}")


if __name__ == "__main__":
    run_command(main)
