"""Beam search finds what transformers' finds: the same tokens, by the same score."""

from __future__ import annotations

import pytest
import torch
from tiny_models import folder_of, make

from jobs.runs.base import Base
from models.generation.beams import beam_search
from models.pretrained.source import find_source

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A tiny Llama as transformers has it, and as we do."""
    folder = folder_of("llama", tmp_path_factory.mktemp("beams"))
    return make("llama"), Base.of(find_source(folder.parent, str(folder))).model.eval()


def theirs(model, prompt: list[int], beams: int, count: int, stops: list[int]) -> tuple[list[int], float]:
    """transformers' text without its stop token, and its score."""
    found = model.generate(
        torch.tensor([prompt]), num_beams=beams, do_sample=False, max_new_tokens=count, eos_token_id=stops or None,
        pad_token_id=0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    tokens = found.sequences[0, len(prompt) :].tolist()
    ends = [tokens.index(stop) for stop in stops if stop in tokens]
    return tokens[: min(ends)] if ends else tokens, float(found.sequences_scores[0])


@pytest.mark.parametrize("beams", [2, 4, 7])
@pytest.mark.parametrize("stops", [[], [2], [5, 11, 40], list(range(2, 30))], ids=["none", "one", "three", "many"])
def test_beam_search_is_transformers(both, beams: int, stops: list[int]) -> None:
    model, ours = both
    for seed in range(4):
        prompt = torch.randint(3, 96, (4 + 5 * seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        tokens, score = theirs(model, prompt, beams, 20, stops)
        found = beam_search(ours, prompt, beams, 20, stops)
        assert found.tokens == tokens
        assert found.log_likelihood == pytest.approx(score, rel=1e-5)
