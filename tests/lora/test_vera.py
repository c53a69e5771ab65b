"""VeRA: matrices that all layers share, that are neither saved nor trained, and that a seed generates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny_lora import IDX, TARGETS, adapted, logits, projections, same, state, stepper, tiny, trained, variants

from lora.adapter import SHARED, Adapter
from lora.attach import activate, adapter_names, attach, base_tensors
from lora.combine import combine, delta_size
from lora.config import LoRAConfig
from lora.merge import merged
from lora.optim import make_optimizer
from lora.peft_format import CONFIG, TENSORS, from_files, to_files
from lora.variants.registry import variant_of
from runtime.errors import UsageError, UserError
from runtime.storage.tensors import TensorFile, fingerprint, pack, unpack
from runtime.training import resume

VERA = LoRAConfig(rank=4, variant="vera", seed=7)
WIDEST = 128, 128  # of the inputs (down_proj's) and of the outputs (up_proj's)
ROOT = Path(__file__).resolve().parents[2]


def shared(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The pair of matrices that all layers of the active adapter share."""
    found = [dict(module.shared.named_buffers()) for module in variants(model).values()]
    for name in ("A", "B"):
        assert len({(each[name].data_ptr(), each[name].shape, each[name].dtype) for each in found}) == 1
    return found[0]


def test_a_fresh_adapter_changes_no_output_and_leaves_the_global_generator_alone() -> None:
    model = tiny()
    before, random = logits(model), torch.get_rng_state()
    attach(model, VERA)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(logits(model), before)
    for module in variants(model).values():
        assert not module.b.any() and module.d.eq(0.1).all() and module.d.shape == (4,)


def test_all_layers_share_one_pair_of_matrices_from_the_seed() -> None:
    model = adapted(VERA)
    for name, matrix in zip("AB", projections(VERA, *WIDEST), strict=True):
        assert torch.equal(shared(model)[name], matrix)
    attach(model, replace(VERA, seed=8), "other")
    assert not torch.equal(shared(model)["A"], projections(VERA, *WIDEST)[0])


@pytest.mark.parametrize("move", [torch.nn.Module.double, lambda m: m.to(torch.bfloat16), lambda m: m.half().float()])
def test_the_matrices_stay_shared_when_the_model_moves(move: Callable) -> None:
    model = move(adapted(VERA))
    assert {tensor.dtype for tensor in shared(model).values()} == {model.lm_head.weight.dtype}
    model(IDX, TARGETS)[1].backward()
    assert all(p.grad.any() for p in trained(model).values())


def test_the_matrices_are_not_counted_trained_or_saved() -> None:
    model, count = adapted(replace(VERA, train_embeddings=False)), 0
    for module in variants(model).values():
        count += module.rank + module.out_features
        assert set(module.state_dict()) == {"b", "d"}
    assert sum(p.numel() for p in trained(model).values()) == count
    assert (
        sum(p.numel() for group in make_optimizer(model, (0.9, 0.95), 0.1).param_groups for p in group["params"])
        == count
    )
    assert not any("shared" in key for key in model.state_dict())
    stored = safetensors.torch.load(bytes(to_files(Adapter.from_model(model))[TENSORS]))
    assert sum(tensor.numel() for tensor in stored.values()) == count
    run = stepper(model, 2)
    run.step(0)
    saved = resume.to_files(run, resume.State())
    assert set(unpack(saved[resume.WEIGHTS], "")) == set(trained(model))


def test_another_process_makes_the_same_matrices() -> None:
    code = "import torch; from lora.config import LoRAConfig; from lora.variants.vera import VeRA; "
    code += "from runtime.storage.tensors import fingerprint; torch.manual_seed(99); "
    code += f"shared = VeRA.make_shared(LoRAConfig(rank=4, variant='vera', seed=7), [{WIDEST}]); "
    code += "print(fingerprint(dict(shared.named_buffers())))"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert (
        done.stdout.strip() == Adapter.from_model(adapted(VERA)).metadata[SHARED] == fingerprint(shared(adapted(VERA)))
    )


def test_matrices_cached_in_inference_mode_serve_training() -> None:
    unused_seed = replace(VERA, seed=1234)  # so that its matrices are drawn here
    with torch.inference_mode():
        attach(tiny(), unused_seed)
    model = adapted(unused_seed)
    model(IDX, TARGETS)[1].backward()
    assert all(p.grad.any() for p in trained(model).values())


Files = dict[str, bytes]


def one_flipped_bit(files: Files) -> Files:
    tensors = unpack(files[TENSORS], "")
    tensors["base_model.vera_B"].view(torch.int32)[3, 2] ^= 1
    return files | {TENSORS: pack(tensors, metadata_in(files))}


def without_one_matrix(files: Files) -> Files:
    tensors = unpack(files[TENSORS], "")
    del tensors["base_model.vera_A"]
    return files | {TENSORS: pack(tensors, metadata_in(files))}


def other_metadata(files: Files) -> Files:
    tensors = {key: t for key, t in unpack(files[TENSORS], "").items() if "vera_A" not in key and "vera_B" not in key}
    return files | {TENSORS: pack(tensors, metadata_in(files) | {SHARED: "f" * 64})}


def another_seed(files: Files) -> Files:
    return files | {CONFIG: json.dumps(json.loads(files[CONFIG]) | {"projection_prng_key": 8}).encode()}


def metadata_in(files: Files) -> dict[str, str]:
    return TensorFile(files[TENSORS], "").metadata


@pytest.mark.parametrize("change", [one_flipped_bit, without_one_matrix, other_metadata, another_seed])
def test_a_file_trained_with_other_projections_is_refused(change: Callable) -> None:
    trained_one, model = adapted(VERA), tiny()
    adapter = Adapter.from_model(trained_one)
    files = to_files(adapter, shared=adapter.make_shared(base_tensors(trained_one)))
    from_files(files, "here").attach_to(tiny())
    before = state(model)
    with pytest.raises(
        UserError, match=r"^the adapter does not fit this model: its shared projections are \w{12}, "
    ) as error:
        from_files(change(files), "here").attach_to(model)
    assert f"seed {8 if change is another_seed else 7} makes here" in str(error.value) and "\n" not in str(error.value)
    assert same(state(model), before) and adapter_names(model) == []


def test_seeds_of_every_size_round_trip() -> None:
    for seed in (0, 2**31 - 1, 2**62, -5):
        config = replace(VERA, seed=seed, targets="minimal")
        model, fresh = adapted(config), tiny()
        from_files(to_files(Adapter.from_model(model)), "here").attach_to(fresh)
        assert torch.equal(logits(fresh), logits(model))


def test_two_adapters_with_different_seeds_add_up_and_merge() -> None:
    model = adapted(VERA, name="one")
    attach(model, replace(VERA, seed=8, rank=2), "two")
    with torch.no_grad():
        for module in variants(model).values():
            module.b += 0.1
    activate(model, {"one": 1.0, "two": 0.5})
    expected = logits(model)
    with merged(model):
        assert torch.allclose(logits(model), expected, atol=1e-5)
    assert not torch.allclose(expected, logits(adapted(VERA)), atol=1e-2)
    base = {name: tensor.detach() for name, tensor in base_tensors(tiny()).items()}
    one, two = (Adapter.from_model(model, name) for name in ("one", "two"))
    for method in ("cat", "linear"):
        fresh = tiny()
        combine([one, two], (1.0, 0.5), base, method).adapter.attach_to(fresh)
        assert torch.allclose(logits(fresh), expected, atol=1e-4)
    W = base["lm_head.weight"]
    dense = variants(adapted(VERA))["lm_head"].effective_weight(W).detach() - W
    assert delta_size(one, "lm_head", base).norm == pytest.approx(dense.norm().item(), rel=1e-4)


@pytest.mark.parametrize("wrong", [{"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q_proj": 2.0}}], ids=str)
def test_rank_and_alpha_patterns_are_refused(wrong: dict) -> None:
    with pytest.raises(UsageError, match=f"^{next(iter(wrong))}: vera has one rank for all modules") as error:
        variant_of(LoRAConfig(rank=4, variant="vera", **wrong))
    assert "\n" not in str(error.value)


def test_an_invalid_seed_is_refused() -> None:
    for wrong in (2.5, "7", None, 2**63, True):
        with pytest.raises(UsageError, match="^seed=.*: must be a whole number of at most 64 bits$"):
            replace(VERA, seed=wrong)
