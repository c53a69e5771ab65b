"""The base that a run starts from: which one it is, where it is found again, whether the settings fit it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data.pretrained_tokenizer import pretrained_tokenizer, sidecar
from data.tokenizers import Tokenizer, load_tokenizer
from lora.adapter import Adapter
from lora.attach import base_tensors
from models import files as model_files
from models.config import ModelConfig
from models.pretrained.families import Family
from models.pretrained.source import Pretrained, find_source, open_pretrained
from models.transformer import Transformer
from runtime.console import say
from runtime.errors import UsageError, UserError
from runtime.settings.config import SHAPE, Settings
from runtime.settings.sources import Resolved
from runtime.storage.folders import Files
from runtime.storage.runs import Run, all_runs, open_run
from runtime.storage.tensors import fingerprint

TOKENIZER = "tokenizer.json"


def tokenizer_in(files: Files, where: str) -> Tokenizer:
    """The tokenizer among a model's files, ours or a pretrained one. Raises UserError where there is none."""
    if model_files.family_in(files, where):
        return pretrained_tokenizer(files, where)
    if TOKENIZER not in files:
        raise UserError(f"{where}: {TOKENIZER} is missing")
    return load_tokenizer(bytes(files[TOKENIZER]))


def load_trained(run: Run, form: str = "none") -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer of a base or a fully fine-tuned run, in the dtype in which it is stored; the matrices
    inside its blocks in 4 or 8 bits where `form` is nf4 or int8.

    Raises UserError where files are corrupted.
    """
    files, where = run.read(), str(run.artifact)
    return model_files.from_files(files, where, 0.0, None, form), tokenizer_in(files, where)


@dataclass(frozen=True)
class Base:
    """An opened base: its run, the model as it was read, on the CPU and without adapters, tokenizer and fingerprint.

    family: the pretrained family whose format it is in, or None. kept: its files but for the weights, which what is
    made from it carries along; empty for a format of ours. The fingerprint is that of its files, also where the model
    holds matrices in 4 or 8 bits.
    """

    run: Run
    model: Transformer
    tokenizer: Tokenizer
    sha256: str
    family: Family | None
    kept: Files

    @classmethod
    def open(cls, root: Path, name: str) -> Base:
        """The base of that name. Raises UsageError where there is none, UserError where it is corrupted."""
        return cls.of(find_source(root, name))

    @classmethod
    def of(cls, run: Run, dropout: float = 0.0, form: str = "none") -> Base:
        """A run as a base, its weights in the dtype in which they are stored; the matrices inside its blocks in 4 or 8
        bits where `form` is nf4 or int8.

        Raises UsageError where it is an adapter, UserError where it is corrupted.
        """
        if run.kind == "lora":
            named = run.metadata["base"]["run"]
            raise UsageError(f"{run.name} is a LoRA run; name the base it was trained on: {named}")
        files, where = run.read(), str(run.artifact)
        family = model_files.family_in(files, where)
        model, tokenizer = model_files.from_files(files, where, dropout, None, form), tokenizer_in(files, where)
        kept = {name: files[name] for name in model_files.KEPT if name in files} | sidecar(files) if family else {}
        model.lora_aliases = family.aliases() if family else {}

        def compute() -> str:
            stored = model_files.form_of(model) == "none"
            return fingerprint(base_tensors(model)) if stored else model_files.stored_fingerprint(files, where)

        sha256 = run.fingerprint(files, compute) if isinstance(run, Pretrained) else compute()
        return cls(run, model, tokenizer, sha256, family, kept)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its weights by name."""
        return {name: tensor.detach() for name, tensor in base_tensors(self.model).items()}

    def problems(self, adapter: Adapter) -> list[str]:
        """Every way in which an adapter does not fit this base, its tokenizer included."""
        told, own = adapter.metadata.get("tokenizer_sha256", self.tokenizer.sha256), self.tokenizer.sha256
        wrong = [] if told == own else [f"its tokenizer is {told[:12]}, and that of {self.run.name} is {own[:12]}"]
        return wrong + adapter.problems(self.model, self.sha256)


def reference(base: Base, root: Path) -> dict[str, str]:
    """What the `run.json` of a run in `root` says of its base: enough to find it again, also where it is elsewhere."""
    folder = base.run.folder.resolve()
    said = {"run": base.run.name, "sha256": base.sha256}
    if hub := base.run.metadata.get("hub"):
        return said | {"hub": hub}
    return said | ({} if folder.parent == root.resolve() else {"path": str(folder)})


def name_of_base(said: Mapping[str, str]) -> str:
    """A base as BASE takes it. said: of `reference`."""
    return said.get("hub") or said.get("path") or said["run"]


def _unchanged(base: Base, run: Run) -> Base:
    """The base from the hub. Raises UserError where the hub has other weights by now."""
    if (trained_on := run.metadata["base"].get("sha256", base.sha256)) != base.sha256:
        raise UserError(
            f"{run.name}: it was trained on {base.run.metadata['hub']} with weights {trained_on[:12]}, "
            f"and those on the hub are {base.sha256[:12]} now"
        )
    return base


def base_of(root: Path, run: Run) -> Base:
    """The base that an adapter was trained on, in the form in which it was: by its name, by its path, else the run with
    its fingerprint.

    Where it is not under its name, stderr tells where it is. Raises UserError where it is nowhere.
    """
    said, opened, error = run.metadata["base"], None, None
    form = run.metadata["settings"].get("quantize", "none")
    if "hub" in said:
        return _unchanged(Base.of(find_source(root, said["hub"]), form=form), run)
    places = [root / said["run"], run.folder.parent / said["run"], *([Path(said["path"])] if "path" in said else [])]
    named = len(places)
    for folder in {run.folder.parent: None, root: None}:
        places += [other.folder for other in all_runs(folder, warn=False) if other.kind != "lora" and other.finished]
    for i, folder in enumerate(places):
        try:
            there = None if folder in places[:i] else open_run(folder) or open_pretrained(folder)
            base = Base.of(there, form=form) if there else None
        except UserError as problem:
            error = error or problem
            continue
        if base and said.get("sha256", base.sha256) == base.sha256:
            if i >= named:
                say(f"{said['run']}, the base of {run.name}, is now {base.run.folder}, which has its weights")
            return base
        opened = opened or (base if i < named else None)  # under its name, with other weights
    if opened and not error:
        raise UserError(
            f"{run.name}: it was trained on {said['run']} with weights {said['sha256'][:12]}, not "
            f"{opened.sha256[:12]}, and no other run in {root} has them"
        )
    raise error or UserError(
        f"the base of {run.name} is gone: there is no {said['run']} in {root}, and no other run there has its weights"
    )


def find_base(settings: Settings, given: Collection[str] = ()) -> Run | None:
    """The run that BASE names, else the newest finished base on the default text, else the newest, else None.

    given: the settings of shape that were given, which it should have. A choice among several is told on stderr.
    TEST_MODE runs look for a TEST_MODE base, others never take one. Raises UsageError where BASE may not serve.
    """
    root = Path(settings.checkpoints_dir)
    if settings.base:
        run = find_source(root, settings.base)
        check_base(run, settings)
        return run
    bases = [run for run in all_runs(root) if run.kind == "base" and run.finished and not run.aside]
    bases = [run for run in bases if run.metadata["settings"]["test_mode"] == settings.test_mode]
    # A run's windows may be shorter than its base takes, so BLOCK_SIZE rules out only bases that take less.
    wanted = {name: getattr(settings, name) for name in given if name != "block_size"}
    fitting = [run for run in bases if wanted.items() <= run.metadata["settings"].items()]
    if "block_size" in given:
        fitting = [run for run in fitting if run.metadata["settings"]["block_size"] >= settings.block_size]
    fitting = fitting or bases
    text = Settings().dataset
    chosen = ([run for run in fitting if run.metadata["settings"]["dataset"] == text] or fitting or [None])[-1]
    if len(bases) > 1:
        trained_on = chosen.metadata["settings"]["dataset"]
        others = ", ".join(run.name for run in bases[::-1] if run is not chosen)
        say(f"Base: {chosen.name}, the newest one here trained on {trained_on}; for another, --base with: {others}")
    return chosen


def base_settings(given: Resolved) -> Resolved:
    """The settings for training a base before a LoRA run: its shape and the machine as given, the rest as usual."""
    carried = (*SHAPE, "seed", "device", "dtype", "checkpoints_dir", "data_dir", "test_mode", "force")
    carried += ("step_parts", "reduce", "shard", "collective_timeout", "track")
    values = {name: getattr(given.settings, name) for name in carried if given.explicit(name)}
    return Resolved(Settings.from_dict(values), {name.upper(): given.sources[name.upper()] for name in values})


def check_base(run: Run, settings: Settings) -> None:
    """Raises UsageError where the run that BASE names may not serve as a base."""
    if run.kind == "lora":
        raise UsageError(
            f"BASE={settings.base} is a LoRA run; name the base it was trained on: {run.metadata['base']['run']}"
        )
    if not run.finished:
        raise UsageError(f"BASE={settings.base} has not finished training; start it again to go on with it")
    if run.metadata["settings"]["test_mode"] and not settings.test_mode:
        raise UsageError(f"BASE={settings.base} is a TEST_MODE run, which serves as a base in TEST_MODE only")


def architecture_of(config: ModelConfig) -> str:
    """What ARCHITECTURE calls such a model, or the nearest that it has."""
    return "llama" if config.norm == "rms" else "gpt-rotary" if config.positions == "rotary" else "gpt"


def check_shape(given: Resolved, base: Base) -> None:
    """Refuse settings of shape that contradict the base. Raises UsageError naming each."""
    tokenizer = base.tokenizer
    config = base.model.config
    has = config.as_dict() | {"tokenizer": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
    has["architecture"] = architecture_of(config)
    fixed = [name for name in SHAPE if name != "block_size"]
    wrong = [name for name in fixed if given.explicit(name) and getattr(given.settings, name) != has[name]]
    if wrong:
        named = ", ".join(f"{name.upper()}={getattr(given.settings, name)} (it has {has[name]})" for name in wrong)
        out = "it" if len(wrong) == 1 else "them"
        raise UsageError(
            f"the base {base.run.name} has another shape: {named}; leave {out} out, or choose another BASE"
        )


def block_size_for(given: Resolved, base: Run, longest: int) -> int:
    """The tokens in a run's windows: BLOCK_SIZE where it is given, else as many as the base can take, `longest`.

    Raises UsageError where that is more than the base can take.
    """
    asked = given.settings.block_size
    if not given.explicit("block_size"):
        return min(longest, asked) if isinstance(base, Pretrained) else longest
    if asked > longest:
        raise UsageError(f"BLOCK_SIZE={asked}: the base {base.name} takes at most {longest} tokens; lower it to that")
    return asked
