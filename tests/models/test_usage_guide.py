"""What the usage guide tells people to write works as it is written there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.bigram_lm_v2_lora import BigramLanguageModelLoRA

vocab_size, block_size = 65, 16
IDX = torch.arange(32).reshape(2, 16)


def guides_model(use_lora: bool = True) -> BigramLanguageModelLoRA:
    return BigramLanguageModelLoRA(
        vocab_size=vocab_size,
        n_embd=256,
        block_size=block_size,
        device="cpu",
        dropout=0.1,
        n_head=4,
        n_layer=2,
        use_lora=use_lora,
        lora_rank=8,
        lora_alpha=16.0,
    )


@pytest.fixture(scope="module")
def trained_model() -> BigramLanguageModelLoRA:
    torch.manual_seed(0)
    model = guides_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        _, loss = model(IDX, IDX.roll(-1, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_the_model_trains_a_small_part_of_itself(trained_model: BigramLanguageModelLoRA) -> None:
    info = trained_model.get_parameter_info()
    assert {"total", "trainable", "frozen", "lora", "embedding", "lora_percentage"} <= info.keys()
    assert info["lora"] + info["embedding"] + info["frozen"] == info["total"]
    assert 0 < info["lora_percentage"] < 10
    assert f"{info['total']:,} {info['lora_percentage']:.2f}%"


def test_only_what_has_lora_in_its_name_trains(trained_model: BigramLanguageModelLoRA) -> None:
    lora_params = {n: p for n, p in trained_model.named_parameters() if "lora" in n}
    assert lora_params.keys() == {n for n, p in trained_model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("source", ["named_parameters", "state_dict"])
def test_lora_weights_alone_carry_the_adapter_to_a_fresh_base(
    source: str, trained_model: BigramLanguageModelLoRA, tmp_path: Path
) -> None:
    pairs = trained_model.named_parameters() if source == "named_parameters" else trained_model.state_dict().items()
    torch.save({n: p for n, p in pairs if "lora" in n}, tmp_path / "lora_weights.pt")
    base_state = {n: t for n, t in trained_model.state_dict().items() if "lora" not in n}

    base = guides_model(use_lora=False)
    assert base.load_state_dict(base_state).missing_keys == []  # a base has these keys, neither more nor fewer
    fresh = guides_model()
    fresh.load_state_dict(base.state_dict(), strict=False)
    assert not torch.allclose(fresh.eval()(IDX)[0], trained_model(IDX)[0], atol=1e-3)
    result = fresh.load_state_dict(torch.load(tmp_path / "lora_weights.pt", weights_only=True), strict=False)
    assert result.unexpected_keys == []
    assert not any("lora" in key for key in result.missing_keys)
    assert torch.equal(fresh(IDX)[0], trained_model(IDX)[0])


def test_text_is_generated_from_token_ids(trained_model: BigramLanguageModelLoRA) -> None:
    context = torch.zeros((1, 1), dtype=torch.long)
    out = trained_model.generate(context, max_new_tokens=40)
    assert out.shape == (1, 41)
    assert out.min() >= 0
    assert out.max() < vocab_size
