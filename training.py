"""Train a small GPT on all its weights, or adapt a trained one with LoRA.

python training.py                          train a base on Shakespeare
USE_LORA=True python training.py            adapt it to the First Folio's spelling (or: python training.py --use-lora)
BASE=base-shakespeare python training.py    fine-tune all its weights on the Folio instead
TEST_MODE=True python training.py           any of these as a quick run
"""

from __future__ import annotations

import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from data.corpora import Corpus, load_corpus, words
from data.text import TextBatches, tokens_of, validation_windows
from data.tokenizers import Tokenizer, build_tokenizer, load_tokenizer
from lora import files as adapter_files
from lora.adapter import Adapter
from lora.attach import activate, attach, base_tensors, detach
from lora.optim import make_optimizer
from lora.variants import LoRAConfig
from models import files as model_files
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA, ModelShape
from models.sampling import Sampling, generate
from runtime import report, resume
from runtime.checkpoint import Run, RunLock, all_runs, claim, find_run, fingerprint, identity_of, say
from runtime.config import SHAPE, Settings, from_command_line
from runtime.device import Machine, pick_machine
from runtime.errors import UsageError, UserError, run_command
from runtime.metrics import MetricsLog, Progress
from runtime.sources import Resolved, describe
from runtime.steps import Schedule, Stepper, evaluate

TOKENIZER = "tokenizer.json"
TEST_CHARACTERS = (300_000, 30_000)  # of training and held-out text that a TEST_MODE run sees
SAMPLE_CHARACTERS = 1_000


@dataclass
class Job:
    """Everything a run works with. base: the run it starts from, or None."""

    settings: Settings
    machine: Machine
    base: Run | None
    base_sha256: str | None
    corpus: Corpus
    tokenizer: Tokenizer
    model: BigramLanguageModelLoRA
    train: np.ndarray
    validation: np.ndarray

    @property
    def kind(self) -> str:
        """`base`, `full` or `lora`."""
        return "lora" if self.settings.use_lora else "full" if self.base else "base"

    @property
    def plain_name(self) -> str:
        """What the run is called unless that name is taken by other settings."""
        rank = f"-r{self.settings.lora_rank}" if self.kind == "lora" else ""
        return f"{'test-' if self.settings.test_mode else ''}{self.kind}-{self.corpus.name}{rank}"


def find_base(given: Resolved) -> Run:
    """The run that BASE names, else the newest finished base, else one that is trained now."""
    settings, root = given.settings, Path(given.settings.checkpoints_dir)
    if settings.base:
        return check_base(find_run(root, settings.base), settings)
    bases = [run for run in all_runs(root) if run.kind == "base" and run.finished]
    bases = [run for run in bases if run.about["settings"]["test_mode"] == settings.test_mode]
    if bases:
        return bases[-1]
    say(f"There is no trained base in {root} yet, and LoRA adapts one: training it first.")
    carried = (*SHAPE, "seed", "device", "dtype", "checkpoints_dir", "data_dir", "test_mode")
    values = {name: getattr(settings, name) for name in carried if given.explicit(name)}
    base = Settings.from_dict(values)
    run = train(Resolved(base, {name.upper(): given.sources[name.upper()] for name in values}))
    print()
    return run


def check_base(run: Run, settings: Settings) -> Run:
    """The run, if it may serve as a base. Raises UsageError where it may not."""
    if run.kind == "lora":
        raise UsageError(
            f"BASE={settings.base} is a LoRA run; name the base it was trained on: {run.about['base']['run']}"
        )
    if not run.finished:
        raise UsageError(f"BASE={settings.base} has not finished training; start it again to go on with it")
    if run.about["settings"]["test_mode"] and not settings.test_mode:
        raise UsageError(f"BASE={settings.base} is a TEST_MODE run, which serves as a base in TEST_MODE only")
    return run


def check_shape(given: Resolved, shape: ModelShape, tokenizer: Tokenizer, base: Run) -> None:
    """Refuse settings of shape that contradict the base. Raises UsageError naming each."""
    has = asdict(shape) | {"tokenizer": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
    wrong = [name for name in SHAPE if given.explicit(name) and getattr(given.settings, name) != has[name]]
    if wrong:
        said = ", ".join(f"{name.upper()}={getattr(given.settings, name)} (it has {has[name]})" for name in wrong)
        raise UsageError(f"the base {base.name} has another shape: {said}; leave these out, or choose another BASE")


def prepare(given: Resolved, machine: Machine) -> Job:
    """Load the base, if any, and the text, and build the model; nothing is written yet."""
    settings, data_dir = given.settings, Path(given.settings.data_dir)
    base = find_base(given) if settings.adapting else None
    corpus = load_corpus(settings.dataset, data_dir)
    if settings.test_mode:
        corpus = corpus.head(*TEST_CHARACTERS)
    torch.manual_seed(settings.seed)
    if base:
        files = base.read()
        tokenizer = load_tokenizer(files[TOKENIZER])
        check_shape(given, model_files.shape_from(files, base.name), tokenizer, base)
        model = model_files.from_files(files, str(base.product), settings.dropout)
    else:
        tokenizer = build_tokenizer(settings.tokenizer, corpus.train, settings.vocab_size)
        sizes = {name: getattr(settings, name) for name in SHAPE if name not in ("tokenizer", "vocab_size")}
        model = BigramLanguageModelLoRA.from_shape(ModelShape(tokenizer.vocab_size, **sizes), settings.dropout)
    base_sha256 = fingerprint(base_tensors(model)) if base else None
    if settings.use_lora:
        attach(model, lora_config(settings))
    tokens = (tokens_of(text, tokenizer, data_dir) for text in (corpus.train, corpus.validation))
    return Job(settings, machine, base, base_sha256, corpus, tokenizer, model.to(machine.device), *tokens)


def lora_config(settings: Settings) -> LoRAConfig:
    """The LoRA settings as the adapter's config."""
    names = ("rank", "alpha", "dropout", "targets", "variant", "bias", "train_embeddings")
    return LoRAConfig(**{name: getattr(settings, f"lora_{name}") for name in names})


def make_stepper(job: Job) -> Stepper:
    """The optimisation steps of this job."""
    s, accumulation = job.settings, job.settings.gradient_accumulation_steps
    batches = TextBatches(job.train, job.model.shape.block_size, s.batch_size * accumulation, s.seed)
    return Stepper(
        job.model,
        make_optimizer(job.model, (s.beta1, s.beta2), s.weight_decay),
        Schedule(s.learning_rate, s.min_lr, s.warmup_iters, s.max_iters),
        batches.batch,
        job.machine,
        seed=s.seed,
        accumulation=accumulation,
        grad_clip=s.grad_clip,
    )


def describe_run(job: Job) -> dict:
    """What `run.json` says: enough to know the run again, and to tell how it came about."""
    about = {
        "kind": job.kind,
        "settings": job.settings.identity(),
        "shape": asdict(job.model.shape),
        "base": {"run": job.base.name, "sha256": job.base_sha256} if job.base else None,
        "dataset": {"name": job.corpus.name, "sha256": job.corpus.sha256},
        "tokenizer_sha256": job.tokenizer.sha256,
    }
    return about | {
        "identity": identity_of(about),
        "settings": job.settings.as_dict(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": f"{platform.machine()}, {job.machine}, {torch.get_num_threads()} threads",
    }


def product_files(job: Job) -> dict[str, bytes]:
    """What the run is for, as it stands now: the adapter, or the model with its tokenizer."""
    if job.kind != "lora":
        return model_files.to_files(job.model) | {TOKENIZER: job.tokenizer.dumps()}
    facts = {"base": job.base.name, "base_sha256": job.base_sha256, "dataset": job.corpus.name}
    facts |= {"dataset_sha256": job.corpus.sha256, "tokenizer_sha256": job.tokenizer.sha256}
    return adapter_files.to_files(Adapter.of(job.model, **facts))


def load_product(job: Job, files: dict[str, bytes], where: str) -> None:
    """Put saved best weights back into the job's model."""
    if job.kind == "lora":
        detach(job.model, "default")
        adapter_files.from_files(files, where).put_on(job.model)
    else:
        model_files.load_weights(job.model, files, where)


def optimise(job: Job, run: Run) -> resume.State:
    """All steps that are left, with evaluations, best weights and resumable steps saved on the way."""
    s, stepper, state = job.settings, make_stepper(job), resume.State()
    if saved := run.newest("step"):
        state = resume.restore(stepper, saved[1], f"{run.folder}/step-{saved[0]:06d}")
        say(f"Going on with {run.name} after step {state.step} of {s.max_iters}")
    log = MetricsLog(run.folder / "metrics.jsonl", state.step)
    windows = validation_windows(job.validation, job.model.shape.block_size, s.batch_size, s.eval_iters)
    progress = Progress(run.name, s.max_iters, state.step)
    every = 1 if job.machine.device.type == "cpu" else 10  # reading the loss makes an accelerator wait
    tokens = s.batch_size * s.gradient_accumulation_steps * job.model.shape.block_size
    start_step, start_seconds, clock = state.step, state.seconds, time.perf_counter()
    while state.step < s.max_iters and not (s.patience and state.stale >= s.patience):
        stepper.step(state.step)
        state.step += 1
        last, evaluating = state.step == s.max_iters, state.step % s.eval_interval == 0
        if state.step % every == 0 or last or evaluating or state.step % s.save_interval == 0:
            loss = stepper.read_loss()
            state.seconds = start_seconds + time.perf_counter() - clock
            rate = tokens * (state.step - start_step) / (state.seconds - start_seconds)
            log.add(state.step, loss=loss, lr=stepper.schedule(state.step - 1), seconds=round(state.seconds, 3))
            progress.update(state.step, loss=f"{loss:.3f}", **{"tokens/s": f"{rate:,.0f}"})
        paused = time.perf_counter()
        if evaluating or last:
            value = evaluate(job.model, windows, job.machine)
            log.add(state.step, val_loss=value)
            progress.update(state.step, val=f"{value:.3f}")
            keep_if_best(job, run, state, value)
        stopping = s.patience and state.stale >= s.patience
        if state.step % s.save_interval == 0 or last or stopping:
            log.flush()
            run.save("step", state.step, resume.to_files(stepper, state), s.keep_checkpoints)
        clock += time.perf_counter() - paused
    progress.close()
    return state


def keep_if_best(job: Job, run: Run, state: resume.State, value: float) -> None:
    """Save what the run is for whenever its validation loss is the lowest so far."""
    if value < state.best:
        state.best, state.best_step, state.stale = value, state.step, 0
        run.save("best", state.step, product_files(job), keep=1)
    else:
        state.stale += 1


def finish(job: Job, run: Run, state: resume.State) -> None:
    """Score and sample the best weights, publish them, and tell what the run came to."""
    load_product(job, run.read(), str(run.folder))
    job.model.to(job.machine.device).requires_grad_(False)
    if job.base_sha256 and job.kind == "lora" and fingerprint(base_tensors(job.model)) != job.base_sha256:
        raise UserError("the base's weights changed during a LoRA run, which must not happen; nothing was published")
    windows = validation_windows(job.validation, job.model.shape.block_size, job.settings.batch_size, None)
    result = asdict(state) | {"val_loss": evaluate(job.model, windows, job.machine)}
    steps_tokens = job.settings.batch_size * job.settings.gradient_accumulation_steps * job.model.shape.block_size
    result |= {"tokens_per_second": state.step * steps_tokens / state.seconds, "peak_memory": job.machine.peak_memory()}
    samples = {"": sample(job)}
    if job.kind == "lora":
        activate(job.model)
        result["base_val_loss"] = evaluate(job.model, windows, job.machine)
        samples = {"with the adapter": samples[""], "without it": sample(job)}
        activate(job.model, "default")
    run.publish(result)
    tell_result(job, run, result)
    tell_samples(job, samples)
    print(f"➡️  Next: {next_command(job, run)}")


def sample(job: Job) -> str:
    """About 1,000 characters after a newline, the same for the same seed and weights."""
    per_token = len(job.corpus.validation) / len(job.validation)
    start = job.tokenizer.encode("\n").tolist()
    with job.machine.autocast():
        rows = generate(
            job.model, [start], int(SAMPLE_CHARACTERS / per_token), Sampling(temperature=0.8), job.settings.seed
        )
    return job.tokenizer.decode(rows[0][len(start) :])


def tell_result(job: Job, run: Run, result: dict) -> None:
    """Time, speed, memory, losses, files."""
    print(f"✅ {run.name} has finished: {result['step']:,} steps in {result['seconds']:.0f} s of training")
    print(f"   Speed: {result['tokens_per_second']:,.0f} tokens/s on {job.machine}")
    print(f"   Peak memory: {report.size(result['peak_memory'])}")
    print(f"   Best validation loss: {result['best']:.4f} at step {result['best_step']:,}")
    base = f" (the base without the adapter: {result['base_val_loss']:.4f})" if "base_val_loss" in result else ""
    print(f"   Loss over the whole held-out text: {result['val_loss']:.4f}{base}")
    files = sum(path.stat().st_size for path in run.product.iterdir())
    print(f"   Files: {run.product} ({report.size(files)}), {run.folder / 'metrics.jsonl'}")


def tell_samples(job: Job, samples: dict[str, str]) -> None:
    """Samples of text, and how many of their words are the corpus's, or for a LoRA run the corpus's alone."""
    known, foreign = set(words(job.corpus.text)), set()
    if job.base:
        try:
            foreign = set(words(load_corpus(job.base.about["settings"]["dataset"], Path(job.settings.data_dir)).text))
        except UserError as error:
            say(f"The base's own text cannot be had any more ({error}); counting words without it")
    for title, text in samples.items():
        found = [word for word in words(text) if word in known - foreign]
        which = f"that only {job.corpus.name} has" if foreign else f"of {job.corpus.name}"
        print(f"📝 Sample{', ' * bool(title)}{title}:\n{report.indented(text)}")
        count = max(1, len(words(text)))
        some = ": " + ", ".join(list(dict.fromkeys(found))[:8]) if foreign and found else ""
        print(f"   {len(found)} of {count} words ({100 * len(found) / count:.0f} %) are words {which}{some}")


def next_command(job: Job, run: Run) -> str:
    """What to try after this run."""
    if job.kind == "base":
        return f"python training.py --use-lora{' --test-mode' if job.settings.test_mode else ''}"
    return f"python generate.py --run {run.name}"


def train(given: Resolved) -> Run:
    """One run, from its settings to its published files; an identical finished run is left alone."""
    settings = given.settings
    machine = pick_machine(settings.device, settings.dtype)
    for line in (*machine.notes, *describe(given)):
        say(line)
    job = prepare(given, machine)
    about = describe_run(job)
    run = claim(Path(settings.checkpoints_dir), job.plain_name, settings.run_name, about, settings.fresh)
    if run.finished:
        flags = shlex.join([*(word for word in sys.argv[1:] if word != "--fresh"), "--fresh"])
        print(f"{run.name} is finished already, with these settings: {run.product}")
        print(f"➡️  To train it afresh, with the same environment: python training.py {flags}")
        return run
    print(report.banner(settings))
    if job.base:
        print(f"   Base: {job.base.name}; text: {job.corpus.name}")
    print(report.statistics(job.model.get_parameter_info(), settings.use_lora), flush=True)
    with RunLock(run):
        finish(job, run, optimise(job, run))
    return run


def main() -> None:
    """Run the command."""
    train(from_command_line(Settings, __doc__))


if __name__ == "__main__":
    run_command(main)
