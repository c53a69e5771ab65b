"""One run's parts: the model with what it starts from, the text as tokens, and the optimizer."""

from __future__ import annotations

import math
import platform
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.corpora import Corpus
from data.dataset import Dataset
from data.instructions.tuning import InstructionData
from data.pretrained_tokenizer import TEMPLATE, sidecar
from data.tokenizers import Tokenizer, build_tokenizer
from jobs.runs.base import TOKENIZER, Base, block_size_for, check_shape, name_of_base, reference
from jobs.runs.source import as_data, load_source
from lora import peft_format as adapter_files
from lora.adapter import Adapter
from lora.attach import adapter_parameters, attach, detach
from lora.config import LoRAConfig
from lora.optim import after_steps, extra_losses, make_optimizer
from lora.variants.registry import VARIANTS
from models import files as model_files
from models.config import ModelConfig
from models.files import form_of
from models.pretrained.families import family_with
from models.transformer import Transformer, presets_of_run
from runtime.console import say
from runtime.device import Machine, check_compiler
from runtime.errors import UsageError, UserError
from runtime.extras import bitsandbytes
from runtime.processes.world import world
from runtime.settings.config import EARLIER, Settings
from runtime.settings.fields import settings_of
from runtime.settings.sources import Resolved
from runtime.storage.folders import Files
from runtime.storage.runs import Run, identity_of
from runtime.training.muon import MuonSettings
from runtime.training.steps import Schedule, Stepper, evaluate

IN_CONFIG = ("rank", "alpha", "dropout", "targets", "variant", "bias", "train_embeddings", "target_rank")  # of LORA_*


@dataclass
class Job:
    """Everything a run works with. base: what it starts from, or None; the job's model is the one that was opened.
    settings: BLOCK_SIZE is the run's own."""

    settings: Settings
    machine: Machine
    base: Base | None
    data: Dataset
    tokenizer: Tokenizer
    model: Transformer

    @property
    def kind(self) -> str:
        """`base`, `full` or `lora`."""
        return "lora" if self.settings.use_lora else "full" if self.base else "base"

    @property
    def in_pieces(self) -> bool:
        """Whether each process has only a piece of what trains."""
        return self.settings.shard and not self.settings.use_lora

    @property
    def plain_name(self) -> str:
        """What the run is called unless that name is taken by other settings."""
        kind, rank = self.kind, ""
        if kind == "lora":
            kind, rank = self.settings.lora_variant, f"-r{self.settings.lora_rank}"
        return f"{'test-' if self.settings.test_mode else ''}{kind}-{self.data.name}{rank}"

    def stepper(self) -> Stepper:
        """Fresh optimisation steps over this job's data."""
        s = self.settings
        dtype = torch.bfloat16 if self.machine.dtype == torch.bfloat16 else torch.float32
        kind = MuonSettings(s.muon_lr_ratio, dtype) if s.optimizer == "muon" else s.optimizer
        return Stepper(
            self.model,
            make_optimizer(self.model, (s.beta1, s.beta2), s.weight_decay, s.lora_plus_ratio, kind),
            Schedule(s.learning_rate, s.min_lr, s.warmup_iters, s.max_iters, s.lr_decay),
            self.data.batch,
            self.machine,
            seed=s.seed,
            parts=s.parts_of_step,
            reduce="sharded" if self.in_pieces else s.reduce,
            grad_clip=s.grad_clip,
            compile=s.compile,
            extra_losses=extra_losses(self.model),
            after_steps=after_steps(self.model, s.max_iters),
        )

    def evaluate(self, limit: int | None = None) -> float:
        """Mean loss over the held-out data, or over at most `limit` batches of it."""
        return evaluate(self.model, self.data.validation(limit), self.machine)

    def metadata(self) -> dict:
        """What `run.json` says: enough to recognise the run, and to know how it was made."""
        root = Path(self.settings.checkpoints_dir)
        base = reference(self.base, root) if self.base else None
        dataset = {"name": self.data.name, "sha256": self.data.sha256}
        settings = self.settings.as_dict()
        about = run_metadata(self.kind, settings, self.model.config, base, self.tokenizer, dataset=dataset)
        about["machine"] = f"{platform.machine()}, {self.machine}, {torch.get_num_threads()} threads"
        about["parameters"] = self.model.get_parameter_info()
        if world().size > 1:
            about["processes"] = world().size
        if self.settings.block_size < self.model.config.max_positions:
            about["window"] = self.settings.block_size
        if isinstance(self.data, InstructionData):
            about["template"] = self.data.template.source
        return about | {"identity": identity(about)}

    def artifact_files(self, **notes: str) -> Files:
        """What the run is for, as it stands now: the adapter, or the model with its tokenizer.

        notes: what an adapter's card tells beside what is known here, such as `steps` and `validation_loss`.
        """
        written = {TEMPLATE: self.data.template.source.encode()} if isinstance(self.data, InstructionData) else {}
        if self.kind != "lora":
            return to_model_files(self.model, self.tokenizer, self.base) | written
        metadata = {"dataset": self.data.name, "dataset_sha256": self.data.sha256}
        versions = f"python {platform.python_version()}, torch {torch.__version__}"
        name = name_of_base(reference(self.base, Path(self.settings.checkpoints_dir)))
        known = {"command": command_of(self.settings, name), "versions": versions}
        return to_adapter_files(Adapter.from_model(self.model, **metadata), self.base, notes | known) | written

    def load_artifact(self, files: Files, where: str) -> None:
        """Load a saved artifact into the model, which does not train any more."""
        if self.kind == "lora":
            detach(self.model, "default")
            adapter = adapter_files.from_files(files, where, family_with)
            adapter.attach_to(self.model, base_sha256=self.base.sha256)
        else:
            model_files.load_weights(self.model, files, where)
        self.model.requires_grad_(False)


def to_adapter_files(adapter: Adapter, base: Base, notes: Mapping[str, str], shared: nn.Module | None = None) -> Files:
    """An adapter of a base as files, with its fingerprint; beside it what a pretrained base makes tokens with."""
    about = {"base": base.run.name, "base_sha256": base.sha256, "tokenizer_sha256": base.tokenizer.sha256}
    if (form := form_of(base.model)) != "none":
        about["base_form"] = form
    if base.family:
        about["base_path"] = base.run.metadata.get("hub") or str(base.run.artifact.resolve())
    adapter = replace(adapter, metadata=adapter.metadata | about)
    return adapter_files.to_files(adapter, notes, shared, base.family) | sidecar(base.kept)


def to_model_files(
    model: Transformer, tokenizer: Tokenizer, base: Base | None, tensors: Mapping[str, Tensor] | None = None
) -> Files:
    """A model with its tokenizer, in the format of the base that it was made from. tensors: what is written instead of
    the model's own."""
    return model_files.to_files(model, base.kept if base else None, tensors) | {TOKENIZER: tokenizer.dumps()}


def run_metadata(
    kind: str, settings: dict, config: ModelConfig, base: dict | None, tokenizer: Tokenizer, **origin: Any
) -> dict:
    """What `run.json` says of any run. base: its name and fingerprint;
    origin: the text it was trained on, or what it was made of."""
    about = {"kind": kind, "settings": settings, "config": config.as_dict(), "base": base} | origin
    about["tokenizer_sha256"] = tokenizer.sha256
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return about | {"identity": identity_of(about), "versions": versions}


def identity(about: dict) -> str:
    """A short hash of what decides a trained run's numbers: fingerprints, compute dtype, and the settings it reads.

    It comes from what `run.json` records, so that runs of earlier versions are recognised. A run that was made, not
    trained, or whose settings are no longer known, keeps the identity that it was given.
    """
    try:
        settings, base = Settings.from_dict(EARLIER | about["settings"]), about["base"]
        spelled = {"base", "dataset", "dtype", *unread_names(settings)}
        read = {name: value for name, value in settings.identity().items() if name not in spelled}
        if settings.use_lora:  # a preset is the modules that it stands for, in any order
            presets, targets = presets_of_run(about), settings.lora_targets
            read["lora_targets"] = sorted(presets.get(targets) or {name.strip() for name in targets.split(",")})
        data = [about["dataset"]["sha256"], about["tokenizer_sha256"], base and base["sha256"]]
        if "window" in about:  # on windows that are shorter than the base's; without a base BLOCK_SIZE is read anyway
            read["window"] = about["window"]
        dtype = about["machine"].split(", ")[-2]
    except (KeyError, TypeError, AttributeError, IndexError, UserError):
        return about["identity"]
    return identity_of({"kind": about["kind"], "settings": read, "dtype": dtype, "data": data})


def prepare(given: Resolved, machine: Machine, base: Run | None) -> Job:
    """Load the text, and the base or a fresh model. Nothing is written but caches.

    Raises UserError or UsageError for a text, a tokenizer or a shape that does not work out.
    """
    settings = given.settings
    if settings.batch_size is None:
        raise UsageError("BATCH_SIZE=auto is known to training.py alone; give it a number here")
    check_quantize(settings, machine)
    check_shard(settings, machine)
    if settings.compile:
        check_compiler(machine.device)
        say("Compiling, which takes the first step a minute or so")
    source = load_source(settings)
    torch.manual_seed(settings.seed)
    if base:
        opened = Base.of(base, settings.dropout, settings.quantize)
        model, tokenizer = opened.model, opened.tokenizer
        check_shape(given, opened)
        if not opened.family:
            # A run's A matrices are drawn after what a fresh base draws, so that a seed gives what it always gave.
            Transformer(model.config)
        if not settings.use_lora:
            check_trains_whole(opened)
            model.float()
        settings = replace(settings, block_size=block_size_for(given, base, model.config.max_positions))
    else:
        opened = None
        if not isinstance(source, Corpus):
            raise UsageError(
                f"DATASET={settings.dataset} has records, to which a base is adapted: set BASE or USE_LORA"
            )
        known = source.text if settings.tokenizer == "char" else source.train  # held-out text may have rare characters
        tokenizer = build_tokenizer(settings.tokenizer, known, settings.vocab_size)
        model = Transformer(config_for(settings, tokenizer.vocab_size), settings.dropout)
    if settings.use_lora:
        attach(model, lora_config(settings))
    model.checkpoint_activations = settings.checkpoint_activations
    data = as_data(source, tokenizer, settings)
    if settings.epochs is not None:
        settings = with_steps(given, settings, data)
    to_device(model, settings, machine)
    return Job(settings, machine, opened, data, tokenizer, model)


def to_device(model: Transformer, settings: Settings, machine: Machine) -> None:
    """Move a model to the machine's device, in pieces where SHARD is set; an adapter is whole on each process."""
    if not settings.shard:
        model.to(machine.device)
        return
    from runtime.processes.shards import shard  # half a second, which other runs do not need

    world().in_step = True
    shard(model, model.blocks, adapter_parameters(model), machine.device)


def check_quantize(settings: Settings, machine: Machine) -> None:
    """Raises UsageError where QUANTIZE cannot be, UserError where the package for it is missing."""
    if settings.quantize == "none":
        return
    asked = f"QUANTIZE={settings.quantize}"
    if not settings.use_lora:
        raise UsageError(f"{asked} needs USE_LORA=True: weights in so few bits are frozen, and only adapters can train")
    if machine.device.type == "mps":
        raise UsageError(
            f"{asked} works on CUDA and the CPU only, as bitsandbytes does: set DEVICE=cpu or leave it out"
        )
    bitsandbytes()


def check_shard(settings: Settings, machine: Machine) -> None:
    """Raises UsageError where SHARD cannot be."""
    if not settings.shard:
        return
    if world().size == 1:
        raise UsageError("SHARD=True needs several processes: start them with torchrun, or leave it out")
    clashes = {
        f"QUANTIZE={settings.quantize}": settings.quantize != "none",
        f"OPTIMIZER={settings.optimizer}": settings.optimizer in ("adamw8bit", "paged_adamw"),
        "COMPILE=True": settings.compile,
        "REDUCE=exact": settings.reduce == "exact" and not settings.use_lora,
        "DTYPE=fp16": machine.scaler().is_enabled() and not settings.use_lora,
    }
    if found := [clash for clash, holds in clashes.items() if holds]:
        whole = "" if settings.use_lora else " of a model that trains whole"
        raise UsageError(f"SHARD=True{whole} does not work with {' and '.join(found)}: leave out one or the other")


def check_trains_whole(base: Base) -> None:
    """Raises UsageError where the base's weights are in 4 or 8 bits, which no update can be written into."""
    if (form := form_of(base.model)) != "none":
        raise UsageError(f"the base {base.run.name} is stored in {form}, which cannot be trained: set USE_LORA=True")


def with_steps(given: Resolved, settings: Settings, data: Dataset) -> Settings:
    """The settings with MAX_ITERS as EPOCHS says, and a warm-up that fits; MAX_ITERS alone counts where EPOCHS is only
    a default. Raises UsageError where both are given."""
    if given.explicit("max_iters"):
        if not given.explicit("epochs"):
            return replace(settings, epochs=None)
        raise UsageError(f"EPOCHS={settings.epochs:g} and MAX_ITERS={settings.max_iters} are both given; leave one out")
    steps = math.ceil(settings.epochs * data.steps_in_epoch)
    say(f"EPOCHS={settings.epochs:g}: {steps:,} steps")
    warmup = settings.warmup_iters if given.explicit("warmup_iters") else min(settings.warmup_iters, steps // 5)
    return replace(settings, max_iters=steps, warmup_iters=warmup, epochs=None)


def config_for(settings: Settings, vocab_size: int) -> ModelConfig:
    """The shape of a fresh base. A gated MLP has three matrices, which are as much narrower as makes them as large as
    the two of GPT's."""
    sizes = {name: getattr(settings, name) for name in ("n_embd", "n_layer", "n_head", "bias")}
    if settings.architecture == "llama":
        sizes |= {"norm": "rms", "mlp": "gated_silu", "n_inner": -(-8 * settings.n_embd // 24) * 8}
    positions = "learned" if settings.architecture == "gpt" else "rotary"
    return ModelConfig(vocab_size, max_positions=settings.block_size, positions=positions, **sizes)


def lora_config(settings: Settings) -> LoRAConfig:
    """The LoRA settings as an adapter's config."""
    return LoRAConfig(**{name: getattr(settings, f"lora_{name}") for name in IN_CONFIG}, seed=settings.seed)


def unread_names(settings: Settings) -> list[str]:
    """The LoRA settings that this variant of LoRA does not read."""
    return [f"lora_{name}" for name in VARIANTS[settings.lora_variant].ignored_fields] if settings.use_lora else []


def unread(given: Resolved) -> list[str]:
    """A line for each setting that was given and that this variant of LoRA does not read."""
    s = given.settings
    told = [f"{name.upper()}={getattr(s, name)}" for name in unread_names(s) if given.explicit(name)]
    return [f"{what} means nothing to LORA_VARIANT={s.lora_variant}, and is not used" for what in told]


def command_of(settings: Settings, base: str) -> str:
    """The command that trains with these settings, given no .env and no variables. base: as BASE takes it, or empty."""
    asked = {"use_lora": settings.use_lora, "test_mode": settings.test_mode, "base": base}
    plain, words = Settings.from_dict(asked), ["python", "training.py"]
    for row in settings_of(Settings):
        value = asked.get(row.name, getattr(settings, row.name))
        if not row.identity or (value == getattr(plain, row.name) and not (row.name in asked and value)):
            continue
        if row.kind is bool:
            words.append(row.flag if value else f"--no-{row.flag[2:]}")
        else:
            words += [row.flag, "none" if value is None else str(value)]
    return shlex.join(words)
