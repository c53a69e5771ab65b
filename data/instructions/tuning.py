"""Records as batches: each a function of seed and step, and each epoch all records once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from data.chat import Template
from data.instructions.encoding import Encoded, encode_all
from data.instructions.packing import Row, batch_of, pack
from data.instructions.records import Record, told
from data.instructions.splits import Records
from data.tokenizers import Tokenizer
from runtime.console import say
from runtime.errors import UserError
from runtime.storage.content import sha256
from runtime.training.batch import Batch

GROUPED = 32  # steps whose rows are sorted by length together, so that little of a batch is padding


@dataclass(frozen=True)
class Sizes:
    """How records become batches. block_size: positions in a row at most. batch_size: rows in a batch of evaluation.
    step_size: rows in a step. seed: from 0 to 2**63. packed: rows of several records. all_count: prompts are learned
    too. skip_long: leave records that are too long out, where they would be cut."""

    block_size: int
    batch_size: int
    step_size: int
    seed: int
    packed: bool = False
    all_count: bool = False
    skip_long: bool = False


@dataclass(frozen=True, eq=False)
class InstructionData:
    """Records as batches: a `data.dataset.Dataset`. train, held_out: what `records` are as tokens, where they fit."""

    records: Records
    template: Template
    train: Sequence[Encoded] = field(repr=False)
    held_out: Sequence[Encoded] = field(repr=False)
    sizes: Sizes

    @classmethod
    def load(
        cls, records: Records, template: Template, tokenizer: Tokenizer, data_dir: Path, sizes: Sizes
    ) -> InstructionData:
        """The records as tokens. Raises UserError where a record cannot be written, or none of a split fits."""
        fitting = {}
        for split in ("train", "validation"):
            found = getattr(records, split)
            encoded = encode_all(found, template, tokenizer, data_dir, f"{split} {records.sha256}")
            fitting[split] = fit(found, encoded, sizes)
            if not fitting[split]:
                raise UserError(
                    f"no record of the {split} split of {records.name} has an answer within "
                    f"BLOCK_SIZE={sizes.block_size} tokens; raise it (as far as the base goes), or shorten the records"
                )
        kept = {split: [record for record, _ in pairs] for split, pairs in fitting.items()}
        tokens = ([each for _, each in fitting[split]] for split in ("train", "validation"))
        return cls(replace(records, **kept), template, *tokens, sizes)

    @property
    def name(self) -> str:
        """The records' name."""
        return self.records.name

    @functools.cached_property
    def sha256(self) -> str:
        """A digest of the records and of the template that writes them."""
        return sha256(repr((self.records.sha256, self.template)).encode())

    @functools.cached_property
    def rows(self) -> list[Row]:
        """The rows of an epoch."""
        if not self.sizes.packed:
            return [(i,) for i in range(len(self.train))]
        return pack([len(each) - 1 for each in self.train], self.sizes.block_size)

    @property
    def steps_in_epoch(self) -> int:
        """The last may have fewer rows."""
        return -(-len(self.rows) // self.sizes.step_size)

    @property
    def tokens_in_step(self) -> float:
        """The mean number of positions of a step, without padding."""
        return sum(len(each) - 1 for each in self.train) / self.steps_in_epoch

    def batch(self, step: int) -> Batch:
        """The rows of a step, padded to its longest; all rows in an order of its own in each epoch."""
        epoch, place = divmod(step, self.steps_in_epoch)
        return self._batch([self.rows[i] for i in self.order(epoch)[place]], self.train)

    @functools.lru_cache(2)  # noqa: B019 - the data lives as long as the process
    def order(self, epoch: int) -> list[np.ndarray]:
        """Which rows each step of an epoch takes: those of similar length together, where a row is one record."""
        random = np.random.Generator(np.random.Philox(key=self.sizes.seed, counter=epoch << 64))
        rows, size = random.permutation(len(self.rows)), self.sizes.step_size
        if self.sizes.packed:
            return [rows[i : i + size] for i in range(0, len(rows), size)]
        lengths, steps = np.array([len(each) for each in self.train]), []
        for start in range(0, len(rows), GROUPED * size):
            group = rows[start : start + GROUPED * size]
            group = group[np.argsort(lengths[group], kind="stable")]
            found = [group[i : i + size] for i in range(0, len(group), size)]
            steps += [found[i] for i in random.permutation(len(found))]
        return steps

    def validation(self, limit: int | None) -> list[Batch]:
        """The held-out records in batches of similar length, at most `limit`, spread evenly over them."""
        size, n = self.sizes.batch_size, len(self.held_out)
        kept = n if limit is None else min(n, limit * size)
        chosen = sorted((i * n // kept for i in range(kept)), key=lambda i: len(self.held_out[i]))
        return [self._batch([(i,) for i in chosen[j : j + size]], self.held_out) for j in range(0, kept, size)]

    def _batch(self, rows: Sequence[Row], encoded: Sequence[Encoded]) -> Batch:
        packed = self.sizes.packed and encoded is self.train
        return batch_of(rows, encoded, self.sizes.all_count, packed)


def fit(records: Sequence[Record], encoded: Sequence[Encoded], sizes: Sizes) -> list[tuple[Record, Encoded]]:
    """The records that fit, and the rest cut at their end, or left out: where SKIP_LONG asks for it, and where nothing
    that is learned would be left. How many these are is said."""
    longest, found, cut, lost, rewritten = sizes.block_size + 1, [], 0, [], 0
    for record, each in zip(records, encoded, strict=True):
        rewritten += each.answers < sum(message["role"] == "assistant" for message in record.messages)
        short = each.cut(longest)
        learned = len(short) > 1 and (sizes.all_count or short.said[1:].any())
        if len(each) > longest and (sizes.skip_long or not learned):
            lost.append(record)
        elif learned:
            found.append((record, short))
            cut += len(each) > longest
    if rewritten:
        say(f"Of {rewritten:,} of {told(records)} only the last answer is learned, as the template rewrites older ones")
    if cut:
        say(f"{cut:,} of {told(records)} have more than BLOCK_SIZE={sizes.block_size} tokens, and are cut at the end")
    if lost:
        why = "" if sizes.skip_long else ", with no answer within them"
        say(
            f"{told(lost)} with more than BLOCK_SIZE={sizes.block_size} tokens left out{why}, the first {lost[0].where}"
        )
    return found
