"""The one table of settings, and the only reader of the environment.

python -m runtime.config    writes .env.example and the README's settings section anew

`Settings` is what training.py and compare.py run on; a command with flags of its own inherits `Machine`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import run_command
from runtime.fields import ContradictionError, Table, setting, settings_of
from runtime.listing import rewrite
from runtime.sources import Resolved, read_settings

RUN, DATA, MODEL, LORA, TRAINING = "Run", "Data", "Model", "LoRA", "Training"
SAVING = "Evaluation and saving"
# A run's name is a folder's: no separators, nothing hidden, none of the names that Windows keeps for devices.
NAME = r"(?!(?i:con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$))[A-Za-z0-9_]([A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?"
FOLDER = r"(?=.*\S)[^\x00-\x1f\x7f\ud800-\udfff]+"
MODULES = r"[A-Za-z_][\w.]*( *, *[A-Za-z_][\w.]*)*"
NAMED = "a name that any system takes for a folder (letters, digits, '_', '-', and '.' inside; at most 100)"
SHAPE = ("tokenizer", "vocab_size", "n_layer", "n_head", "n_embd", "block_size", "bias")
WARMUP_SHARE = 5  # the default warm-up never takes more than a fifth of a run that was asked to be short
HIGHEST_RANK = 4096


@dataclass(frozen=True, kw_only=True)
class Machine(Table):
    """What every command needs to know: where to compute, where the runs are, which seed."""

    seed: int = setting(1337, "Seed of everything random", group=RUN, low=0, high=2**31 - 1)
    device: str = setting(
        "auto",
        "Where to compute: cpu, mps, cuda, cuda:N, or auto, which takes a GPU if there is one",
        group=RUN,
        pattern=r"auto|cpu|mps|cuda(:[0-9]{1,2})?",
        allowed="auto, cpu, mps, cuda or cuda:N",
        identity=False,
    )
    dtype: str = setting(
        "auto",
        "Number format of the matrix products; auto takes bf16 where that is fast",
        group=RUN,
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    checkpoints_dir: str = setting(
        "checkpoints", "Folder of the runs", group=RUN, pattern=FOLDER, path=True, allowed="a folder", identity=False
    )
    data_dir: str = setting(
        "data/cache",
        "Folder that texts are fetched into",
        group=RUN,
        pattern=FOLDER,
        path=True,
        allowed="a folder",
        identity=False,
    )


@dataclass(frozen=True, kw_only=True)
class Settings(Machine):
    """Everything that decides what a training run does."""

    use_lora: bool = setting(False, "Adapt a trained base with LoRA instead of training every weight", group=RUN)
    compile: bool = setting(
        False,
        "Compile the step with torch.compile first, which takes a minute; try whether it pays on your machine",
        group=RUN,
    )
    test_mode: bool = setting(False, "A tiny run that shows in seconds that everything works", group=RUN)
    base: str = setting(
        "",
        "The run to start from, by its name or folder; empty takes the newest finished base with USE_LORA, "
        "and without it trains from scratch",
        group=RUN,
        pattern=rf"|{NAME}|(?=.*[/\\]){FOLDER}",
        path=True,
        allowed=f"empty, {NAMED}, or a path with a / in it",
    )
    run_name: str = setting(
        "",
        "Name of the run's folder; empty names it after what it is",
        group=RUN,
        pattern=rf"|{NAME}",
        allowed=f"empty or {NAMED}",
        identity=False,
    )
    fresh: bool = setting(
        False, "Move an existing run of the same name aside and train again", group=RUN, identity=False
    )

    dataset: str = setting(
        "shakespeare",
        "The text to learn: shakespeare, folio, milton, tinyshakespeare, or the path of a .txt file",
        adapt="folio",
        group=DATA,
        pattern=FOLDER,
        path=True,
        allowed="the name of a corpus or a path",
    )
    tokenizer: str = setting(
        "char", "What a token is: a character, or a piece of a word", group=DATA, choices=("char", "bpe", "gpt2")
    )
    vocab_size: int = setting(1024, "Number of different tokens, with TOKENIZER=bpe", group=DATA, low=257, high=65535)

    n_layer: int = setting(4, "Transformer blocks", test=2, group=MODEL, low=1, high=1000)
    n_head: int = setting(4, "Attention heads in each block", group=MODEL, low=1, high=1000)
    n_embd: int = setting(128, "Width of the model, a multiple of N_HEAD", test=64, group=MODEL, low=1, high=65536)
    block_size: int = setting(128, "Longest context, in tokens", test=64, group=MODEL, low=1, high=65536)
    bias: bool = setting(False, "Give linear layers and layer norms a bias", group=MODEL)
    dropout: float = setting(
        0.0, "Share of activations dropped in training", group=MODEL, low=0, high=1, high_open=True
    )

    lora_rank: int = setting(
        8,
        "Rank of the adapters: higher learns more and costs more",
        vera=64,
        adalora=12,
        group=LORA,
        low=1,
        high=HIGHEST_RANK,
    )
    lora_alpha: float = setting(
        16.0,
        "Strength of the adapters, which are scaled by LORA_ALPHA / LORA_RANK; vera has none",
        group=LORA,
        low=0,
        low_open=True,
    )
    lora_dropout: float = setting(
        0.0, "Share of the adapters' inputs dropped in training", group=LORA, low=0, high=1, high_open=True
    )
    lora_targets: str = setting(
        "all",
        "Linear layers that get an adapter: minimal, standard, all, or module names with commas between them",
        group=LORA,
        pattern=MODULES,
        allowed="minimal, standard, all, or module names with commas between them",
    )
    lora_variant: str = setting(
        "lora",
        "Kind of adapter; rslora scales by the root of the rank, dora trains the length of each row apart, vera "
        "trains two vectors a layer, adalora moves ranks to where they matter",
        group=LORA,
        choices=("lora", "rslora", "dora", "vera", "adalora"),
    )
    lora_target_rank: int | None = setting(
        None,
        "Mean rank of the modules that adalora ends with; none is two thirds of LORA_RANK",
        group=LORA,
        low=1,
        high=HIGHEST_RANK,
    )
    lora_bias: str = setting(
        "none", "Which biases are trained beside the adapters", group=LORA, choices=("none", "all", "lora_only")
    )
    lora_plus_ratio: float = setting(
        4.0,
        "How many times faster than all else learns what starts at zero, as B does (LoRA+); 1 is plain LoRA",
        group=LORA,
        low=0,
        low_open=True,
        high=1000,
    )
    lora_train_embeddings: bool = setting(True, "Train the embeddings beside the adapters", group=LORA)

    batch_size: int = setting(16, "Sequences in a batch", group=TRAINING, low=1, high=10**6)
    gradient_accumulation_steps: int = setting(
        1, "Batches that make up one training step", group=TRAINING, low=1, high=10**6
    )
    max_iters: int = setting(
        2400, "Training steps", adapt=500, test=60, test_lora=40, group=TRAINING, low=1, high=10**9
    )
    learning_rate: float = setting(
        5e-3,
        "Highest learning rate",
        adapt=2e-3,
        lora=4e-3,
        rslora=2e-3,
        vera=16e-3,
        adalora=8e-3,
        test=8e-3,
        group=TRAINING,
        low=0,
        low_open=True,
    )
    min_lr: float = setting(0.0, "Learning rate at the end of the cosine", group=TRAINING, low=0)
    warmup_iters: int = setting(
        100,
        "Steps over which the learning rate rises, by default at most a fifth of MAX_ITERS",
        adapt=20,
        test=5,
        group=TRAINING,
        low=0,
        high=10**9,
    )
    weight_decay: float = setting(0.1, "AdamW's pull of the weights towards zero", lora=0.0, group=TRAINING, low=0)
    beta1: float = setting(0.9, "AdamW's memory of the gradient", group=TRAINING, low=0, high=1, high_open=True)
    beta2: float = setting(
        0.99, "AdamW's memory of the squared gradient", group=TRAINING, low=0, high=1, high_open=True
    )
    grad_clip: float = setting(1.0, "Longest gradient that is not shortened; 0 is off", group=TRAINING, low=0)

    eval_interval: int = setting(400, "Steps between evaluations", adapt=100, test=20, group=SAVING, low=1, high=10**9)
    eval_iters: int = setting(40, "Batches of held-out text in an evaluation", group=SAVING, low=1, high=10**9)
    patience: int = setting(
        0, "Stop after this many evaluations without improvement; 0 is off", group=SAVING, low=0, high=10**9
    )
    save_interval: int = setting(
        400, "Steps between checkpoints", adapt=100, test=20, group=SAVING, low=1, high=10**9, identity=False
    )
    keep_checkpoints: int = setting(2, "How many checkpoints are kept", group=SAVING, low=1, high=10**6, identity=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        # A run that adapts takes its shape from the base, so there N_HEAD alone may repeat what the base has.
        if not self.adapting and self.n_embd % self.n_head:
            raise ContradictionError(self, "n_embd", "must be divisible by", "n_head")
        if self.warmup_iters > self.max_iters:
            raise ContradictionError(self, "warmup_iters", "must not be more than", "max_iters")
        if self.min_lr > self.learning_rate:
            raise ContradictionError(self, "min_lr", "must not be more than", "learning_rate")
        if self.use_lora and self.lora_target_rank and self.lora_target_rank > self.lora_rank:
            raise ContradictionError(self, "lora_target_rank", "must not be more than", "lora_rank")

    @property
    def adapting(self) -> bool:
        """Whether the run starts from a base."""
        return self.use_lora or bool(self.base)

    @classmethod
    def modes(cls, values: Mapping[str, Any]) -> Collection[str]:
        """Which other defaults hold: see `setting` and `MODES`."""
        lora, test = values["use_lora"], values["test_mode"]
        active = {"adapt": lora or values["base"], "lora": lora, "test": test, "test_lora": test and lora}
        return [*(mode for mode, holds in active.items() if holds), *([values["lora_variant"]] if lora else [])]

    @classmethod
    def fitted(cls, values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Shorten a default warm-up where MAX_ITERS is small, so that only a warm-up that was asked for can clash."""
        if "warmup_iters" in given or not isinstance(values["max_iters"], int):
            return values
        return values | {"warmup_iters": min(values["warmup_iters"], max(0, values["max_iters"]) // WARMUP_SHARE)}

    def identity(self) -> dict[str, Any]:
        """The values that decide what the run computes, without those that it does not read.

        So LORA_RANK in .env does not make another base of the same base, and a shape that only repeats the base's
        does not make another adapter of the same adapter.
        """
        unread = set(SHAPE) if self.adapting else set()
        if not self.use_lora:
            unread |= {row.name for row in settings_of(Settings) if row.rule.group == LORA}
        if self.tokenizer != "bpe":
            unread.add("vocab_size")
        if not self.compile:
            unread.add("compile")
        return {name: value for name, value in super().identity().items() if name not in unread}


def from_command_line(cls: type[Table], description: str, command: str = "") -> Resolved:
    """Read a command's table from its flags, the environment and ./.env; `command` is its first word, if it has one."""
    prog, words = Path(sys.argv[0]).name, sys.argv[1:]
    if command:
        prog, words = f"{prog} {command}", words[1:]
    return read_settings(cls, words, os.environ, Path(".env"), prog=prog, description=description, also=(Settings,))


if __name__ == "__main__":
    run_command(lambda: rewrite(Path(__file__).resolve().parent.parent, Settings))
