"""A batch whose rows go through adapters of their own, in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lora.attach import adaptable_layers, check_attached, using
from lora.layers.inference import Mix
from lora.merge import cached_weights


@contextmanager
def mixing(model: nn.Module, names: Sequence[str]) -> Iterator[Mix]:
    """Inside the `with` block, each row of a batch goes through adapters of its own: before a pass, give `Mix.take` the
    strengths of its rows. For computing without gradients; which adapters are active does not count.

    A row gets what it gets alone with these adapters, but for rounding. Raises UsageError for a name that is not
    attached.
    """
    check_attached(model, *names)
    mix, layers = Mix(names, next(model.parameters()).device), adaptable_layers(model).values()
    try:
        with using(model), cached_weights(model):
            for layer in layers:
                layer.mix = mix
            yield mix
    finally:
        for layer in layers:
            layer.mix = None
