"""The one table of settings, and the only reader of the environment.

python -m runtime.settings.config    writes .env.example and the table of docs/settings.md anew

`Settings` is what training.py and compare.py run on; a command with flags of its own inherits `CommonSettings`, or
`ProcessSettings` where it can work as several processes.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dotenv import dotenv_values

from runtime.processes.command import run_command
from runtime.settings.fields import ContradictionError, Table, setting, settings_of
from runtime.settings.listing import rewrite
from runtime.settings.sources import Resolved, read_settings

RUN, DATA, MODEL, LORA, TRAINING = "Run", "Data", "Model", "LoRA", "Training"
SAVING = "Evaluation and saving"
# A run's name is a folder's: no separators, nothing hidden, none of the names that Windows keeps for devices.
NAME = r"(?!(?i:con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$))[A-Za-z0-9_]([A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?"
FOLDER = r"(?=.*\S)[^\x00-\x1f\x7f\ud800-\udfff]+"
MODULES = r"[A-Za-z_][\w.-]*( *, *[A-Za-z_][\w.-]*)*"
HUB_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
HUB_SPLIT = r"\w[\w.-]*(/\w[\w.-]*)*"  # of a data set there, after a colon
TRACKERS = r"(tensorboard|wandb)"
HUB_LEGACY = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")  # names without an owner
NAMED = "a name that any system takes for a folder (letters, digits, '_', '-', and '.' inside; at most 100)"
SHAPE = ("architecture", "tokenizer", "vocab_size", "n_layer", "n_head", "n_embd", "block_size", "bias")
RECORDS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")  # how the names of files of records end
RECORD_SETS = ("folio-pairs",)
READ_WITH_RECORDS = ("columns", "val_size", "template", "train_on_prompt", "packing", "long_records")
WARMUP_SHARE = 5  # the default warm-up never takes more than a fifth of a run that was asked to be short
HIGHEST_RANK = 4096

A_FOLDER = {"pattern": FOLDER, "allowed": "a folder", "path": True}
A_PROBABILITY = {"low": 0, "high": 1, "high_open": True}
A_RANK = {"low": 1, "high": HIGHEST_RANK, "group": LORA}
STEPS = {"low": 1, "high": 10**9}
A_SIZE = {"low": 1, "high": 65536, "group": MODEL}
ABOVE_0 = {"low": 0, "low_open": True}
NO_RESULT = {"identity": False}  # changes nothing in what a run computes

# Other defaults; where several of these hold, the last one decides.
PRESETS = {
    "from a base": {
        "dataset": "folio",
        "optimizer": "adamw",
        "lr_decay": "cosine",
        "max_iters": 500,
        "learning_rate": 1e-3,
        "warmup_iters": 20,
        "eval_interval": 100,
        "save_interval": 100,
    },
    "LoRA": {"learning_rate": 4e-3, "weight_decay": 0.0},
    "TEST_MODE": {
        "n_layer": 2,
        "n_embd": 64,
        "block_size": 64,
        "max_iters": 60,
        "learning_rate": 8e-3,
        "warmup_iters": 5,
        "eval_interval": 20,
        "save_interval": 20,
    },
    "TEST_MODE with LoRA": {"max_iters": 40},
    "rslora": {"learning_rate": 2e-3},
    "vera": {"lora_rank": 64, "learning_rate": 16e-3},
    "adalora": {"lora_rank": 12, "learning_rate": 8e-3},
    "a pretrained base": {
        "block_size": 1024,
        "batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-5,
        "weight_decay": 0.01,
        "max_iters": 200,
        "eval_interval": 50,
        "eval_iters": 8,
        "save_interval": 50,
        "lora_rank": 16,
        "lora_alpha": 32.0,
        "lora_dropout": 0.05,
        "lora_targets": "all-linear",
        "lora_plus_ratio": 1.0,
        "lora_train_embeddings": False,
        "checkpoint_activations": "cheap",
    },
    "LoRA on a pretrained base": {"learning_rate": 5e-4},
    "SHARD": {"reduce": "fast"},
    "records": {"patience": 3},
    "records on a pretrained base": {"batch_size": 8, "epochs": 3.0},
    "TEST_MODE on a pretrained base": {
        "block_size": 64,
        "max_iters": 10,
        "eval_interval": 5,
        "save_interval": 5,
        "eval_iters": 2,
        "epochs": None,
    },
}

# What runs were trained with whose run.json is older than the setting.
EARLIER = {"architecture": "gpt", "optimizer": "adamw", "lr_decay": "cosine", "step_parts": None, "reduce": "exact"}


@dataclass(frozen=True, kw_only=True)
class CommonSettings(Table):
    """What every command needs to know: where to compute, where the runs are, which seed."""

    seed: int = setting(1337, "Seed of all random numbers", group=RUN, low=0, high=2**31 - 1)
    device: str = setting(
        "auto",
        "Where to compute: cpu, mps, cuda, cuda:N, or auto, which takes a GPU if there is one",
        group=RUN,
        pattern=r"auto|cpu|mps|cuda(:[0-9]{1,2})?",
        allowed="auto, cpu, mps, cuda or cuda:N",
        **NO_RESULT,
    )
    dtype: str = setting(
        "auto",
        "Compute dtype of matmuls; auto takes bf16 where that is fast, and fp32 elsewhere",
        group=RUN,
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    checkpoints_dir: str = setting("checkpoints", "Folder of all runs", group=RUN, **A_FOLDER, **NO_RESULT)
    data_dir: str = setting("data/cache", "Folder of downloaded texts", group=RUN, **A_FOLDER, **NO_RESULT)


@dataclass(frozen=True, kw_only=True)
class ProcessSettings(CommonSettings):
    """What a command needs to know besides that can work as several processes."""

    collective_timeout: float = setting(
        600.0,
        "Seconds that one of several processes waits for the others before it gives up",
        group=RUN,
        high=10**6,
        **ABOVE_0,
        **NO_RESULT,
    )


@dataclass(frozen=True, kw_only=True)
class Settings(ProcessSettings):
    """Everything that decides what a training run does."""

    presets: ClassVar = PRESETS
    often: ClassVar = (
        "use_lora", "test_mode", "base", "run_name", "seed", "device", "dataset", "tokenizer", "n_layer", "n_head",
        "n_embd", "block_size", "lora_rank", "lora_alpha", "lora_targets", "lora_variant", "quantize", "batch_size",
        "max_iters", "learning_rate",
    )  # fmt: skip

    use_lora: bool = setting(False, "Adapt a trained base with LoRA instead of training all weights", group=RUN)
    compile: bool = setting(
        False,
        "Compile the training step with torch.compile, which takes a minute; measure whether it pays on your machine",
        group=RUN,
    )
    test_mode: bool = setting(False, "Train a tiny model for a few seconds, to see that everything works", group=RUN)
    base: str = setting(
        "",
        "What to start from: a run, by name or folder, a Hugging Face folder, or the name of a model on their hub; if "
        "empty, with USE_LORA the newest finished base on shakespeare, else the newest, and from scratch without",
        group=RUN,
        pattern=rf"|{NAME}|(?=.*[/\\]){FOLDER}",
        path=True,
        allowed=f"empty, {NAMED}, or a path with a / in it",
    )
    run_name: str = setting(
        "",
        "Name of the run's folder; if empty, made from the settings, with a suffix such as -cec7b9 where another run "
        "has that name",
        group=RUN,
        pattern=rf"|{NAME}",
        allowed=f"empty or {NAMED}",
        **NO_RESULT,
    )
    fresh: bool = setting(False, "Move an existing run of the same name aside and train again", group=RUN, **NO_RESULT)
    dry_run: bool = setting(
        False,
        "Tell how much memory the run would take, and what each part of it, and train nothing; of BASE only its "
        "config.json is needed",
        group=RUN,
        env=False,
        **NO_RESULT,
    )
    force: bool = setting(False, "Begin a run although it will take more memory than is free", group=RUN, **NO_RESULT)

    dataset: str = setting(
        "shakespeare",
        "What to train on: shakespeare, folio, milton, tinyshakespeare or the path of a .txt file; or records of "
        "instructions or chats: folio-pairs, .jsonl, .json, .csv or .parquet files (with commas), their folder, or a "
        "data set's name on the Hugging Face hub, with :SPLIT after it to train on that split alone",
        group=DATA,
        **A_FOLDER | {"allowed": "the name of a corpus or a path"},
    )
    columns: str = setting(
        "", "Columns of records that have other names, as instruction=question,output=answer", group=DATA
    )
    val_size: float = setting(
        0.1,
        "Share of records held out for validation where no file has them",
        group=DATA,
        high=1,
        high_open=True,
        **ABOVE_0,
    )
    template: str = setting(
        "",
        "How records are written: guide (### Instruction, ### Input, ### Response), line (what is asked, a line break, "
        "the answer), or a file with a jinja2 template; if empty, the base's own chat template, or else guide",
        group=DATA,
        pattern=rf"|{FOLDER}",
        allowed="empty, guide, line or a path",
    )
    train_on_prompt: bool = setting(False, "Learn the prompts of records too, not the answers alone", group=DATA)
    packing: bool = setting(
        False, "Fill each row with several records, which do not see each other; faster for short ones", group=DATA
    )
    long_records: str = setting(
        "cut", "What becomes of records with more than BLOCK_SIZE tokens", group=DATA, choices=("cut", "skip")
    )
    tokenizer: str = setting(
        "char",
        "Tokenizer: characters, byte-pair encoding trained on the text, or GPT-2's byte-pair encoding",
        group=DATA,
        choices=("char", "bpe", "gpt2"),
    )
    vocab_size: int = setting(1024, "Vocabulary size of TOKENIZER=bpe", group=DATA, low=257, high=65535)

    architecture: str = setting(
        "gpt-rotary",
        "What a base is made of: gpt-rotary has layer norms, rotary positions and a GELU, gpt the same with learned "
        "positions, as GPT-2 has them, llama RMS norms, rotary positions and a gated MLP",
        group=MODEL,
        choices=("gpt-rotary", "gpt", "llama"),
    )
    n_layer: int = setting(4, "Number of transformer blocks", group=MODEL, low=1, high=1000)
    n_head: int = setting(4, "Attention heads in each block", group=MODEL, low=1, high=1000)
    n_embd: int = setting(128, "Embedding width, a multiple of N_HEAD", **A_SIZE)
    block_size: int = setting(128, "Context length in tokens", **A_SIZE)
    bias: bool = setting(False, "Biases in linear layers and layer norms", group=MODEL)
    dropout: float = setting(0.0, "Dropout probability in training", group=MODEL, **A_PROBABILITY)

    lora_rank: int = setting(8, "Rank of the adapters; a higher rank learns more and costs more", **A_RANK)
    lora_alpha: float = setting(
        16.0,
        "LoRA alpha: the adapters' output is scaled by LORA_ALPHA / LORA_RANK; not used by vera",
        group=LORA,
        **ABOVE_0,
    )
    lora_dropout: float = setting(0.0, "Dropout probability of the adapters' inputs", group=LORA, **A_PROBABILITY)
    lora_targets: str = setting(
        "all",
        "Linear layers that get an adapter: minimal, standard, all-linear, all (with the head), or names separated "
        "by commas",
        group=LORA,
        pattern=MODULES,
        allowed="minimal, standard, all-linear, all, or module names separated by commas",
    )
    quantize: str = setting(
        "none",
        "Keep the matrices of the base's blocks in 4 bits (nf4) or 8 (int8) while adapters train on them: less memory, "
        "a little rounding",
        group=LORA,
        choices=("none", "nf4", "int8"),
    )
    lora_variant: str = setting(
        "lora",
        "Kind of adapter: rslora scales by alpha / sqrt(rank), dora also trains the norm of each weight row, vera "
        "trains two vectors per layer, adalora moves rank to the layers that need it",
        group=LORA,
        choices=("lora", "rslora", "dora", "vera", "adalora"),
    )
    lora_target_rank: int | None = setting(
        None, "Mean rank per layer that adalora ends with; none is two thirds of LORA_RANK", **A_RANK
    )
    lora_bias: str = setting(
        "none", "Which biases are trained with the adapters", group=LORA, choices=("none", "all", "lora_only")
    )
    lora_plus_ratio: float = setting(
        4.0,
        "LoRA+: how many times higher the learning rate of B is than the rest; 1 is plain LoRA",
        group=LORA,
        high=1000,
        **ABOVE_0,
    )
    lora_train_embeddings: bool = setting(True, "Train the embeddings with the adapters", group=LORA)

    batch_size: int | None = setting(
        16,
        "Sequences per batch; auto takes the largest power of two up to 1024 with which the run fits into 85 % of the "
        "memory that is free, and is written into the run as that number",
        group=TRAINING,
        low=1,
        high=10**6,
        nothing="auto",
    )
    gradient_accumulation_steps: int = setting(1, "Batches per training step", group=TRAINING, low=1, high=10**6)
    step_parts: int | None = setting(
        None,
        "Into how many parts a step is cut, each with dropout of its own, which the processes share equally; none is "
        "GRADIENT_ACCUMULATION_STEPS",
        group=TRAINING,
        low=1,
        high=10**6,
    )
    reduce: str = setting(
        "exact",
        "How the gradients of a step's parts are added up: in one order (exact), so that the number of processes "
        "changes no bit, or as is the fastest (fast)",
        group=TRAINING,
        choices=("exact", "fast"),
    )
    shard: bool = setting(
        False,
        "Cut the model's frozen weights, or all of it where it trains whole, with gradients and optimizer state, into "
        "pieces, one for each process: for models that do not fit on one device",
        group=TRAINING,
        **NO_RESULT,
    )
    checkpoint_activations: str = setting(
        "none",
        "What a step makes again for its backward pass, which saves memory and changes no number: nothing (none), what "
        "is nearly free to make (cheap), or all but the inputs of blocks (block)",
        group=TRAINING,
        choices=("none", "cheap", "block"),
        **NO_RESULT,
    )
    max_iters: int = setting(1700, "Training steps", group=TRAINING, **STEPS)
    epochs: float | None = setting(
        None,
        "How many times to go through the text, in place of MAX_ITERS: so many steps as have that many tokens",
        group=TRAINING,
        high=10**6,
        **ABOVE_0,
        **NO_RESULT,
    )
    optimizer: str = setting(
        "muon",
        "Optimizer: AdamW for everything, or Muon for the matrices inside the blocks and AdamW for the rest; adamw8bit "
        "keeps AdamW's moments in 8 bits (of tensors of fewer than 4,096 values in 32), paged_adamw where a CUDA GPU "
        "may move them to its host; these two need requirements-memory.txt",
        group=TRAINING,
        choices=("adamw", "muon", "adamw8bit", "paged_adamw"),
    )
    learning_rate: float = setting(5e-3, "Peak learning rate", group=TRAINING, **ABOVE_0)
    muon_lr_ratio: float = setting(
        4.0, "How many times AdamW's learning rate Muon's is", group=TRAINING, high=1000, **ABOVE_0
    )
    lr_decay: str = setting(
        "linear",
        "How the learning rate falls to MIN_LR after the warm-up; LR_SCHEDULE means the same",
        group=TRAINING,
        choices=("cosine", "linear", "constant"),
        also="lr_schedule",
    )
    min_lr: float = setting(0.0, "Learning rate at the end", group=TRAINING, low=0)
    warmup_iters: int = setting(
        30,
        "Steps of linear learning-rate warm-up; the default is at most a fifth of MAX_ITERS",
        group=TRAINING,
        low=0,
        high=10**9,
    )
    weight_decay: float = setting(0.1, "Weight decay of matrices", group=TRAINING, low=0)
    beta1: float = setting(0.9, "AdamW beta1", group=TRAINING, **A_PROBABILITY)
    beta2: float = setting(0.99, "AdamW beta2", group=TRAINING, **A_PROBABILITY)
    grad_clip: float = setting(1.0, "Gradient-clipping norm; 0 turns clipping off", group=TRAINING, low=0)

    eval_interval: int = setting(400, "Steps between evaluations", group=SAVING, **STEPS)
    eval_iters: int = setting(40, "Validation batches per evaluation", group=SAVING, **STEPS)
    eval_batch_size: int | None = setting(
        None, "Sequences per validation batch; none is BATCH_SIZE", group=SAVING, low=1, high=10**6
    )
    patience: int = setting(
        0, "Stop after this many evaluations without improvement; 0 never stops early", group=SAVING, low=0, high=10**9
    )
    log_interval: int = setting(
        0,
        "Steps between printed lines with loss, learning rate and tokens per second, for each of which an accelerator "
        "is waited for; 0 is a bar on a terminal, and elsewhere a line every ten seconds",
        group=SAVING,
        low=0,
        high=10**9,
        **NO_RESULT,
    )
    save_interval: int = setting(400, "Steps between checkpoints", group=SAVING, **STEPS, **NO_RESULT)
    keep_checkpoints: int = setting(
        2, "How many of the newest checkpoints are kept", group=SAVING, low=1, high=10**6, **NO_RESULT
    )
    track: str = setting(
        "",
        "Where curves and texts go beside metrics.jsonl: tensorboard, wandb, or both with a comma between; needs "
        "requirements-tracking.txt, and wandb a WANDB_API_KEY, without which it tracks offline",
        group=SAVING,
        pattern=rf"|{TRACKERS}( *, *{TRACKERS})*",
        allowed="empty, tensorboard, wandb, or both separated by commas",
        **NO_RESULT,
    )
    push_to_hub: str = setting(
        "",
        "Push the run to this repository on the Hugging Face hub when it has finished, as export.py --push does; needs "
        "an HF_TOKEN that may write",
        group=SAVING,
        pattern=rf"|{HUB_NAME}",
        allowed="empty or user/name",
        **NO_RESULT,
    )
    push_strategy: str = setting(
        "end",
        "When to push: at the end alone, or also whenever a LoRA run has saved its best adapter so far, while training "
        "goes on",
        group=SAVING,
        choices=("end", "every_save"),
        **NO_RESULT,
    )
    push_private: bool = setting(
        True, "Whether a repository that PUSH_TO_HUB makes is private", group=SAVING, **NO_RESULT
    )

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
    def rows_in_step(self) -> int | None:
        """How many sequences a step learns from, on all processes together; None where BATCH_SIZE is auto."""
        return self.batch_size and self.batch_size * self.gradient_accumulation_steps

    @property
    def parts_of_step(self) -> int:
        """Into how many parts a step is cut."""
        return self.step_parts or self.gradient_accumulation_steps

    @property
    def trackers(self) -> list[str]:
        """The names in TRACK, once each."""
        return list(dict.fromkeys(name.strip() for name in self.track.split(",") if name))

    @property
    def adapting(self) -> bool:
        """Whether the run starts from a base."""
        return self.use_lora or bool(self.base)

    @classmethod
    def active(cls, values: Mapping[str, Any]) -> set[str]:
        """Which presets hold."""
        lora, test = values["use_lora"], values["test_mode"]
        holds = {"from a base": lora or values["base"], "LoRA": lora, "TEST_MODE": test}
        holds |= {"TEST_MODE with LoRA": test and lora, values["lora_variant"]: lora}
        places = values["checkpoints_dir"], values["base"]
        pretrained = all(isinstance(place, str) for place in places) and bool(values["base"]) and is_pretrained(*places)
        holds |= {"a pretrained base": pretrained, "LoRA on a pretrained base": pretrained and lora}
        holds |= {"SHARD": values["shard"] and not lora}
        records = isinstance(values["dataset"], str) and has_records(values["dataset"])
        holds |= {"records": records, "records on a pretrained base": records and pretrained}
        holds |= {"TEST_MODE on a pretrained base": pretrained and test}
        return {label for label, active in holds.items() if active}

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
            unread |= {row.name for row in settings_of(Settings) if row.group == LORA}
        if self.tokenizer != "bpe":
            unread.add("vocab_size")
        if not self.compile:
            unread.add("compile")
        if self.optimizer != "muon":
            unread.add("muon_lr_ratio")
        if not has_records(self.dataset):
            unread |= set(READ_WITH_RECORDS)
        if self.eval_batch_size in (None, self.batch_size):
            unread.add("eval_batch_size")
        read = super().identity() | {"step_parts": self.parts_of_step}
        return {name: value for name, value in read.items() if name not in unread}


def has_records(dataset: str) -> bool:
    """Whether DATASET names records of instructions or chats, rather than a text: files, a folder of such, or a name on
    the Hugging Face hub."""
    if dataset in RECORD_SETS or is_hub_records(dataset):
        return True
    parts = [Path(part.strip()).expanduser() for part in dataset.split(",")]
    return all(part.suffix.lower() in RECORDS or _is_folder(part) for part in parts)


def is_hub_records(dataset: str) -> bool:
    """Whether DATASET can only be a name on the hub: owner/name or owner/name:split, where there is no such file."""
    name = dataset.partition(":")[0]
    named = re.fullmatch(f"{HUB_NAME}(:{HUB_SPLIT})?", dataset) and Path(name).suffix.lower() not in (".txt", *RECORDS)
    return bool(named) and not any(Path(path).exists() for path in (name, dataset))


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - for a name the system cannot have, pathlib raises


def is_hub_name(name: str) -> bool:
    """Whether a model on the Hugging Face hub may be called so."""
    return name in HUB_LEGACY or re.fullmatch(HUB_NAME, name) is not None


def hub_token() -> str | None:
    """HF_TOKEN from the environment or ./.env, for gated models and to push: a setting of the hub's, told nowhere."""
    return (os.environ.get("HF_TOKEN") or dotenv_values(".env").get("HF_TOKEN") or "").strip() or None


def serve_api_key() -> str:
    """SERVE_API_KEY from the environment or ./.env: what clients of serve.py must send; it is told nowhere."""
    return os.environ.get("SERVE_API_KEY") or dotenv_values(".env").get("SERVE_API_KEY") or ""


def wandb_api_key() -> str:
    """WANDB_API_KEY from the environment or ./.env: what W&B knows its user by; it is told nowhere."""
    return os.environ.get("WANDB_API_KEY") or dotenv_values(".env").get("WANDB_API_KEY") or ""


def has_display() -> bool:
    """Whether a window that is opened here can be seen, as far as the environment says."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def is_pretrained(root: str, base: str) -> bool:
    """Whether BASE names a model that was trained elsewhere, or a run that came of one, rather than a run of ours."""
    places = Path(root) / base, Path(base)
    runs = [folder for folder in places if (folder / "run.json").is_file()]
    if not runs:
        there = any((folder / "config.json").is_file() for folder in places)
        return there or (is_hub_name(base) and not Path(base).exists())
    path = runs[0] / "model" / "config.json"
    return path.is_file() and b'"model_type"' in path.read_bytes()


def from_command_line(cls: type[Table], description: str, command: str = "") -> Resolved:
    """Read a command's table from its flags, the environment and ./.env; `command` is its first word, if it has one."""
    prog, words = Path(sys.argv[0]).name, sys.argv[1:]
    if command:
        prog, words = f"{prog} {command}", words[1:]
    return read_settings(cls, words, os.environ, Path(".env"), prog=prog, description=description, also=(Settings,))


if __name__ == "__main__":
    run_command(lambda: rewrite(Path(__file__).resolve().parents[2], Settings))
