"""The README's picture: one base, three adapters of it, one prompt, and what each makes of it; then strength.

python -m benchmarks.three_texts --adapters lora-folio-r8 lora-milton-r8 --out texts.png

`make three-texts` trains the runs where they are missing. The curves are the held-out losses of the first adapter's
text and of the base's, as `adapters.py strength` measures them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.adapting import forgetting
from jobs.adapting.adapted import Adapted, open_adapters
from jobs.generating.choice import choose
from lora.attach import activate
from models.generation.choosing import Sampling
from models.generation.sampling import generate
from runtime.device import pick_machine
from runtime.errors import UserError
from runtime.pictures import new_figure, save_picture
from runtime.processes.command import run_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STRENGTHS = [0.0, 0.25, 0.5, 0.75, 1.0]
HOW = Sampling(temperature=0.7, top_k=40)
WIDTH, LINES = 33, 13  # of a text in the picture, in characters


def texts(root: Path, base: str, names: list[str], prompt: str, tokens: int, seed: int) -> dict[str, str]:
    """What the base makes of a prompt, and what it makes through each adapter."""
    found = {}
    for name in (base, *names):
        choice = choose(root, base, {} if name == base else {name: 1.0}, ())
        model, tokenizer = choice.base.model, choice.base.tokenizer
        activate(model, choice.on_model(None))
        (ids,) = generate(model, [tokenizer.encode(prompt)], tokens, HOW, seed)
        found[name] = tokenizer.decode(ids)
    return found


def shown(text: str) -> str:
    """The text in lines that fit."""
    lines = []
    for line in text.splitlines():
        while len(line) > WIDTH:
            cut = line.rfind(" ", 0, WIDTH + 1)
            cut = cut if cut > 0 else WIDTH
            lines, line = [*lines, line[:cut]], "  " + line[cut:].lstrip()
        lines.append(line)
    return "\n".join(lines[:LINES])


def _panel(axes: Axes, title: str, text: str, color: str) -> None:
    axes.set_axis_off()
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=color, pad=8)
    axes.text(0, 0.94, shown(text), va="top", family="monospace", fontsize=8.5, transform=axes.transAxes)
    axes.plot([0, 0.96], [1.0, 1.0], color=color, lw=2, transform=axes.transAxes, clip_on=False)


def draw(made: dict[str, str], sizes: dict[str, str], losses: dict[str, list[float]], prompt: str) -> Figure:
    """The texts side by side, and the curves below."""
    figure = new_figure(f"One base, {len(sizes)} adapters, one prompt: {prompt}", (11, 6))
    rows = figure.add_gridspec(2, 1, height_ratios=(1.05, 1))
    panels = rows[0].subgridspec(1, len(made)).subplots()
    for i, (axes, (name, text)) in enumerate(zip(panels, made.items(), strict=True)):
        _panel(axes, f"{name}{f', {sizes[name]}' if name in sizes else ''}", text, f"C{i}" if i else "0.3")
    axes = figure.add_subplot(rows[1])
    for i, (label, values) in enumerate(losses.items()):
        axes.plot(STRENGTHS, values, "-o", ms=4, color="C1" if i == 0 else "0.3", label=label)
    axes.set_xlabel(f"strength of {next(iter(sizes))}: 0 is the base, 1 the adapter as it was trained")
    axes.set_ylabel("held-out loss")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def size_of(adapted: Adapted) -> str:
    """The size of an adapter's file."""
    return f"{sum(path.stat().st_size for path in adapted.run.artifact.iterdir()) / 1e6:.1f} MB"


def main() -> None:
    """Run the command."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--base", default="base-shakespeare")
    flags.add_argument("--adapters", nargs="+", required=True)
    flags.add_argument("--prompt", default="To be")
    flags.add_argument("--seed", type=int, default=1)
    flags.add_argument("--tokens", type=int, default=300)
    flags.add_argument("--checkpoints-dir", type=Path, default="checkpoints")
    flags.add_argument("--data-dir", type=Path, default="data/cache")
    flags.add_argument("--out", type=Path, required=True)
    options = flags.parse_args()
    adapted = open_adapters(options.checkpoints_dir, tuple(options.adapters))
    machine = pick_machine("cpu", "fp32")
    roles = forgetting.texts_to_measure(adapted[0], "")
    losses = forgetting.measure(adapted[0], list(roles), STRENGTHS, 20, options.data_dir, machine)
    named = {f"on {Path(text).name}, {roles[text]} text": losses[text] for text in roles}
    made = texts(options.checkpoints_dir, options.base, options.adapters, options.prompt, options.tokens, options.seed)
    sizes = {name: size_of(item) for name, item in zip(options.adapters, adapted, strict=True)}
    if not save_picture(options.out, draw, made, sizes, named, options.prompt):
        raise UserError("no picture was made")
    print(f"{options.out}: {options.out.stat().st_size / 1e3:.0f} kB", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
