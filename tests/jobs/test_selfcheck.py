"""A LoRA run checks itself before anything is published: each way to fail is really made to happen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import jobs.runs.job
from jobs.runs import loop
from jobs.runs.job import Job
from jobs.training import train as training
from lora.adapter import Adapter
from lora.peft_format import CONFIG, TENSORS, load_adapter
from models.stored import WEIGHTS
from runtime.errors import UserError
from runtime.settings.config import Settings
from runtime.settings.sources import Resolved
from runtime.storage import folders
from runtime.storage.runs import Run
from runtime.storage.tensors import TensorFile, pack, unpack
from runtime.training.steps import NonFiniteError, Stepper
from tests.tiny import TINY as TINY_BASE

TINY = TINY_BASE | {"bias": True}
FAST = {"test_mode": True, "device": "cpu", "dtype": "fp32", "batch_size": 4, "eval_iters": 2, "save_interval": 1}


def train(root: Path, **changes) -> Run:
    values = FAST | {"checkpoints_dir": str(root / "runs"), "dataset": str(root / "text.txt")} | changes
    return training.train(Resolved(Settings.from_dict(values), {}))


def adapt(root: Path, **changes) -> Run:
    options = {"use_lora": True, "base": "base", "run_name": "lora", "max_iters": 3, "eval_interval": 1}
    return train(root, **options | {"lora_rank": 2, "lora_bias": "all"} | changes)


@pytest.fixture(scope="module")
def based(tmp_path_factory) -> Path:
    """A folder with a text and bases that were trained on it: `base` with learned positions, `bigram` with one."""
    root = tmp_path_factory.mktemp("selfcheck")
    (root / "text.txt").write_text("To be, or not to be, that is the question.\n" * 50)
    train(root, run_name="base", architecture="gpt", max_iters=5, **TINY)
    train(root, run_name="bigram", max_iters=5, **TINY | {"block_size": 1})
    return root


@pytest.fixture
def root(based: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(based, tmp_path / "copy")


def refused(root: Path, **changes) -> str:
    """The one line that a LoRA run ends with, which must not have published anything."""
    with pytest.raises(UserError) as error:
        adapt(root, **changes)
    assert error.value.status == 1
    assert not (root / "runs/lora/adapter").exists()
    assert not (root / "runs/lora/result.json").exists()
    assert str(error.value).startswith("the self-check of lora failed, and nothing is published: ")
    assert "\n" not in str(error.value)
    return str(error.value)


def after_training(monkeypatch: pytest.MonkeyPatch, change: Callable[[Job, Run], None]) -> None:
    """Let something happen between the last step and the check."""
    honest = loop.Training.all_steps

    def all_steps(self: loop.Training):
        state = honest(self)
        change(self.job, self.run)
        return state

    monkeypatch.setattr(loop.Training, "all_steps", all_steps)


def rewritten(folder: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> None:
    """A committed folder with other files in it, whose manifest is in order."""
    files = folders.read_folder(folder)
    shutil.rmtree(folder)
    folders.commit_folder(folder, change(files))


def leave_out(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """An optimizer that forgets one tensor."""
    honest = jobs.runs.job.make_optimizer

    def make(model, *args):
        optimizer, forgotten = honest(model, *args), model.get_parameter(name)
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p is not forgotten]
        return optimizer

    monkeypatch.setattr(jobs.runs.job, "make_optimizer", make)


GOOD = [{}, {"max_iters": 1}, {"max_iters": 1, "weight_decay": 0.1, "lora_dropout": 0.5}, {"base": "bigram"}]
GOOD += [{"lora_variant": "rslora", "lora_train_embeddings": False, "lora_targets": "minimal", "lora_bias": "none"}]
GOOD += [
    {"lora_variant": "vera"},
    {"lora_variant": "vera", "max_iters": 1},
    {"lora_variant": "vera", "seed": 2**31 - 1},
]
GOOD += [{"lora_variant": "adalora"}, {"lora_variant": "adalora", "max_iters": 1}, {"lora_variant": "dora"}]


@pytest.mark.parametrize("changes", GOOD, ids=str)
def test_an_honest_run_passes(root: Path, changes: dict) -> None:
    run = adapt(root, **changes)
    assert run.finished
    card = (run.artifact / "README.md").read_text("utf-8")
    assert f"| steps | {run.result['best_step']} |" in card
    assert f"| validation loss | {run.result['best']:.4f} |" in card


def test_an_adalora_run_whose_best_step_has_other_ranks_than_its_last_passes(root: Path, monkeypatch, capsys) -> None:
    losses = iter([3.0])
    monkeypatch.setattr(Job, "evaluate", lambda self, limit=None: next(losses, 3.5))
    last: list[Adapter] = []
    after_training(monkeypatch, lambda job, run: last.append(Adapter.from_model(job.model)))
    run = adapt(root, lora_variant="adalora", lora_rank=6, max_iters=6, lora_target_rank=2)
    ranks = [sum(len(group.get("E", ())) for group in a.tensors.values()) for a in (load_adapter(run.artifact), *last)]
    assert run.result["best_step"] == 1
    assert "Ranks: 30 in 7 modules, 4.29 on average" in capsys.readouterr().out
    assert ranks == [30, 2 * 7]  # of 6 * 7: 14 + 28 * (1 - 0.4 / 2.4)^3 after one step


FORGOTTEN = [("blocks.0.attention.q_proj", "A"), ("blocks.0.mlp.down_proj", "B"), ("token_embedding", "weight")]
FORGOTTEN += [("position_embedding", "weight"), ("norm", "bias")]


@pytest.mark.parametrize(("path", "name"), FORGOTTEN)
def test_a_tensor_that_did_not_move_is_named(root: Path, monkeypatch, path: str, name: str) -> None:
    leave_out(monkeypatch, f"{path}.lora.default.{name}")
    also = f"{path}.A; " if name == "B" else ""  # which has no gradient as long as B is zero
    assert refused(root).endswith(f"(too low?) has not moved {also}{path}.{name}")


def test_after_one_step_only_what_has_a_gradient_while_b_is_zero_must_have_moved(root: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        leave_out(patch, "lm_head.lora.default.A")
        assert adapt(root, max_iters=1).finished
    shutil.rmtree(root / "runs/lora")
    leave_out(monkeypatch, "lm_head.lora.default.B")
    assert refused(root, max_iters=1).endswith("(too low?) has not moved lm_head.B")


def test_the_start_is_known_after_a_resume_too(root: Path, monkeypatch) -> None:
    leave_out(monkeypatch, "lm_head.lora.default.A")
    honest = Stepper.step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012

        def step(self: Stepper, number: int) -> None:
            if number == 2:
                raise KeyboardInterrupt
            honest(self, number)

        patch.setattr(Stepper, "step", step)
        adapt(root, max_iters=4)
    assert refused(root, max_iters=4).endswith("(too low?) has not moved lm_head.A")


def test_a_base_that_changed_is_told(root: Path, monkeypatch) -> None:
    honest = Stepper.step

    def step(self: Stepper, number: int) -> None:
        honest(self, number)
        with torch.no_grad():
            self.model.blocks[0].mlp.up_proj.weight[0, 0] += 1e-6

    monkeypatch.setattr(Stepper, "step", step)
    assert refused(root).endswith("the base's weights changed, which must never be")


def test_what_is_not_finite_is_told(root: Path, monkeypatch) -> None:
    def spoil(job: Job, run: Run) -> None:
        with torch.no_grad():
            job.model.lm_head.lora["default"].B[0, 0] = torch.nan

    after_training(monkeypatch, spoil)
    assert refused(root).endswith("lm_head.lora.default.B has values that are not finite")


@pytest.mark.parametrize("which", ["adapter", "base"])
def test_a_byte_that_changed_on_disk_is_told(root: Path, monkeypatch, which: str) -> None:
    def flip(job: Job, run: Run) -> None:
        path = run.saved("best")[-1][1] / TENSORS if which == "adapter" else job.base.run.artifact / WEIGHTS
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    after_training(monkeypatch, flip)
    file = TENSORS if which == "adapter" else WEIGHTS
    assert f"{file} is corrupted: its checksum is not the one that was saved" in refused(root)


def test_another_base_on_disk_is_told(root: Path, monkeypatch) -> None:
    def other(files: dict[str, bytes]) -> dict[str, bytes]:
        tensors = unpack(files[WEIGHTS], "")
        return files | {WEIGHTS: pack(tensors | {"lm_head.bias": tensors["lm_head.bias"] + 1})}

    after_training(monkeypatch, lambda job, run: rewritten(job.base.run.artifact, other))
    assert refused(root).endswith("base/model is no longer the one that this run began with")


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable:
    """An adapter folder's files with one tensor changed, or left out."""

    def rewrite(files: dict[str, bytes]) -> dict[str, bytes]:
        tensors = unpack(files[TENSORS], "")
        new = tensors | {f"base_model.model.{name}": change(tensors[f"base_model.model.{name}"])}
        return files | {
            TENSORS: pack({k: t for k, t in new.items() if t is not None}, TensorFile(files[TENSORS], "").metadata)
        }

    return rewrite


def with_alpha(alpha: float) -> Callable:
    return lambda files: files | {CONFIG: json.dumps(json.loads(files[CONFIG]) | {"lora_alpha": alpha}).encode()}


LM_HEAD = "lm_head.lora_B.weight"
SAVED = [
    (with_alpha(1000.0), "read back from disk, the adapter has loss "),
    (changed(LM_HEAD, lambda t: t * 1.5), "lm_head.B on disk is not what was trained"),
    (changed(LM_HEAD, lambda t: None), "lm_head.B is missing on disk"),
    (changed(LM_HEAD, lambda t: t[:5].clone()), "lm_head.B on disk is not what was trained"),
]


@pytest.mark.parametrize(("change", "told"), SAVED, ids=["scale", "values", "missing", "misshapen"])
def test_a_saved_adapter_that_is_not_what_was_trained_is_told(root: Path, monkeypatch, change, told: str) -> None:
    after_training(monkeypatch, lambda job, run: rewritten(run.saved("best")[-1][1], change))
    assert told in refused(root)


def test_a_model_that_is_not_its_base_without_the_adapter_is_told(root: Path, monkeypatch) -> None:
    def hook(job: Job, run: Run) -> None:
        job.model.norm.register_forward_hook(lambda module, args, y: 1.1 * y)

    after_training(monkeypatch, hook)
    assert "without its adapter the model has loss " in refused(root)


def test_a_run_whose_validation_loss_is_not_finite_ends_there_and_publishes_nothing(root: Path, monkeypatch) -> None:
    monkeypatch.setattr(Job, "evaluate", lambda self, limit=None: float("nan"))
    with pytest.raises(NonFiniteError, match="the validation loss is nan after step"):
        adapt(root)
    assert not (root / "runs/lora/adapter").exists()


def test_a_refused_run_goes_on_to_the_check_again_when_it_is_started_again(root: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        after_training(patch, lambda job, run: shutil.rmtree(run.saved("best")[-1][1]))
        assert refused(root).endswith("the best weights that it saved are gone")
    assert refused(root).endswith("the best weights that it saved are gone")
    assert adapt(root, fresh=True).finished
