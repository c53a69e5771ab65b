"""The loss of each text by itself: of answers, of records, of windows of a text. In nats a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from data.instructions.encoding import Encoded
from data.instructions.packing import batch_of
from data.tokenizers import Tokenizer
from models.transformer import Transformer
from runtime.device import Machine
from runtime.processes.world import world
from runtime.training.batch import IGNORED

ROOM = 2**25  # logits of a batch: 128 MB in fp32
TOGETHER = 16  # texts in a batch at most


def encode_answer(prompt: Sequence[int], answer: str, tokenizer: Tokenizer, longest: int) -> Encoded:
    """A prompt's tokens and an answer's, which count; not the token that ends it, as an answer that was cut off has
    none. What is longer than `longest` tokens loses its beginning."""
    said = tokenizer.encode_inside(answer) if answer else []
    ids = np.array([*prompt, *said], tokenizer.dtype)
    return Encoded(ids[-longest:], (np.arange(len(ids)) >= len(prompt))[-longest:])


def encode_windows(tokens: np.ndarray, length: int, limit: int) -> list[Encoded]:
    """Windows of a text that predict `length` tokens each, at most `limit` of them, spread evenly; of a shorter text
    one window. All tokens but a window's first count."""
    length = min(length, len(tokens) - 1)
    n = (len(tokens) - 1) // length
    kept = min(n, limit)
    starts = [i * n // kept * length for i in range(kept)]
    return [Encoded(tokens[start : start + length + 1], np.ones(length + 1, bool)) for start in starts]


@torch.no_grad()
def loss_of_each(
    model: Transformer, texts: Sequence[Encoded], machine: Machine, tell: Callable[[int, int], None]
) -> list[float | None]:
    """The mean loss of the tokens of each text that count; None where none does. Several processes share out the
    batches, which are those of one. tell(done, total) is called as the work goes on."""
    model.eval()
    found: list[float | None] = [None] * len(texts)
    order = sorted((i for i in range(len(texts)) if count(texts[i])), key=lambda i: len(texts[i]))
    batches = []
    while order:
        rows = max(1, min(TOGETHER, ROOM // (len(texts[order[-1]]) * model.config.vocab_size)))
        batches.append(order[-rows:])  # the longest first, so that memory runs short at once or never
        order = order[:-rows]
    made = world().shared_out(batches, lambda chosen, _: _losses(model, [texts[i] for i in chosen], machine), tell)
    for chosen, losses in zip(batches, made, strict=True):
        for i, loss in zip(chosen, losses, strict=True):
            found[i] = loss
    return found


def _losses(model: Transformer, texts: Sequence[Encoded], machine: Machine) -> list[float]:
    batch = batch_of([(i,) for i in range(len(texts))], texts, False, False).to(machine.device)
    with machine.autocast():
        if len(texts) == 1:  # which may be long: the model's own loss never holds all logits of a large vocabulary
            return [model(batch.tokens, batch.targets)[1].item()]
        logits_BTV = model(batch.tokens)[0]
    losses_BT = F.cross_entropy(logits_BTV.float().transpose(1, 2), batch.targets, reduction="none")
    return (losses_BT.sum(1) / (batch.targets != IGNORED).sum(1)).tolist()


def count(text: Encoded) -> int:
    """How many of a text's tokens count: those said, but for its first, which nothing predicts."""
    return int(text.said[1:].sum())
