"""What a run learns from: a text or records, and either as batches for a model."""

from __future__ import annotations

from pathlib import Path

from data.chat import GUIDE, TEMPLATES, Template, own_template
from data.corpora import Corpus, load_corpus
from data.dataset import Dataset
from data.instructions.folio_pairs import load_folio_pairs
from data.instructions.records import parse_columns
from data.instructions.splits import Records, load_records
from data.instructions.tuning import InstructionData, Sizes
from data.text import TextData
from data.tokenizers import Tokenizer
from runtime.errors import UsageError
from runtime.settings.config import Settings, has_records
from runtime.storage.folders import plain_errors

TEST_CHARACTERS = (300_000, 30_000)  # of training and held-out text that a TEST_MODE run sees
TEST_RECORDS = (200, 20)


def load_source(settings: Settings) -> Corpus | Records:
    """The text or the records that DATASET names, cut short in TEST_MODE.

    Raises UsageError for an unknown name, UserError for what cannot be read.
    """
    data_dir = Path(settings.data_dir)
    if not has_records(settings.dataset):
        corpus = load_corpus(settings.dataset, data_dir)
        return corpus.head(*TEST_CHARACTERS) if settings.test_mode else corpus
    records = read_source_records(settings.dataset, settings.columns, settings.val_size, data_dir)
    return records.head(*TEST_RECORDS) if settings.test_mode else records


def read_source_records(dataset: str, columns: str, val_size: float, data_dir: Path) -> Records:
    """The records that DATASET names. Raises UsageError for COLUMNS that are none."""
    if dataset == "folio-pairs":
        return load_folio_pairs(data_dir)
    try:
        return load_records(dataset, parse_columns(columns), val_size)
    except ValueError as error:
        raise UsageError(f"COLUMNS={columns}: {error}") from None


def template_for(settings: Settings, tokenizer: Tokenizer) -> Template:
    """The template that records are written with: TEMPLATE's, else the base's own, else `GUIDE`."""
    if not settings.template:
        return own_template(tokenizer) or Template.of(GUIDE, tokenizer)
    if settings.template in TEMPLATES:
        return Template.of(TEMPLATES[settings.template], tokenizer)
    with plain_errors(Path(settings.template), "read"):
        return Template.of(Path(settings.template).read_text("utf-8"), tokenizer)


def as_data(source: Corpus | Records, tokenizer: Tokenizer, s: Settings, template: Template | None = None) -> Dataset:
    """The text or records as batches. s: BLOCK_SIZE is the run's own. template: what records are written with, or None
    for what the settings say."""
    step_size, data_dir, eval_size = s.batch_size * s.gradient_accumulation_steps, Path(s.data_dir), s.eval_batch_size
    sizes = (s.block_size, eval_size or s.batch_size, step_size, s.seed)
    if isinstance(source, Corpus):
        return TextData.load(source, tokenizer, data_dir, *sizes)
    how = Sizes(*sizes, s.packing, s.train_on_prompt, s.long_records == "skip")
    return InstructionData.load(source, template or template_for(s, tokenizer), tokenizer, data_dir, how)
