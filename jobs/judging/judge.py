"""Both sides answer the same prompts, and every rule says what it finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from data.instructions.records import Record
from jobs.generating.answering import Answer, answers, prompt_tokens
from jobs.judging.losses import count, encode_answer, loss_of_each
from jobs.judging.material import Material
from jobs.judging.rules import LOSS, LOWER, TRAINING_LOSS, WANTED_LOSS, Judged, Limits, Rule, answer_rules
from jobs.judging.scorecard import WANTED, Row, answer_rows
from jobs.judging.scores.copying import overlaps
from jobs.judging.scores.words import words
from jobs.judging.sides import Opened
from models.generation.choosing import Sampling
from runtime.device import Machine
from runtime.progress import Patience


@dataclass(frozen=True)
class How:
    """How answers are made. longest: tokens of one at most."""

    sampling: Sampling
    longest: int
    seed: int
    machine: Machine


@dataclass(frozen=True)
class Findings:
    """The answers of each column, what the rules say of them, the names of the rules that apply to none, and what each
    model loses on texts."""

    judged: dict[str, list[Judged]]
    of_answers: list[Row]
    left_out: list[str]
    of_models: list[Row]

    @property
    def rows(self) -> list[Row]:
        """The whole scorecard."""
        return [*self.of_answers, *self.of_models]


def judge(opened: Opened, material: Material, how: How, limits: Limits) -> Findings:
    """Let each side answer, and score that."""
    said = {}
    for name, side in opened.sides.items():
        with side.active():
            said[name] = answers(
                side.model, opened.tokenizer, opened.template, material.asked.records, how.sampling, how.longest,
                how.machine, how.seed, Patience(f"answers of the {name}", "token"),
            )  # fmt: skip
    judged = with_losses(opened, material, with_overlaps(material, to_judge(material.asked.records, said)), how)
    rows = answer_rows(answer_rules(limits), judged)
    of_answers = [row for row in rows if row.applies]
    left_out = [row.rule.name for row in rows if not row.applies]
    return Findings(judged, of_answers, left_out, loss_rows(opened, material, how.machine))


def asked_text(record: Record) -> str:
    """All that a model is given of a record, without the template."""
    if not record.messages:
        return record.prompt
    given = record.messages[:-1]
    return "\n\n".join(filter(None, (text.strip() for m in given for text in (m["content"], m.get("input", "")))))


def outputs_of(record: Record) -> list[str]:
    """All that is learned of a record."""
    return [m["content"] for m in record.messages if m["role"] == "assistant"] or [record.completion]


def to_judge(records: Sequence[Record], said: dict[str, list[Answer]]) -> dict[str, list[Judged]]:
    """The wanted answers and those of each side, by column."""
    found = {WANTED: [Judged(asked_text(r), r.answer, r.answer) for r in records]}
    for name, texts in said.items():
        pairs = zip(records, texts, strict=True)
        found[name] = [Judged(asked_text(r), r.answer, answer.text, answer.ended) for r, answer in pairs]
    return found


def with_overlaps(material: Material, judged: dict[str, list[Judged]]) -> dict[str, list[Judged]]:
    """The same with how much each answer has of a training output, where these are known."""
    if not material.learned:
        return judged
    outputs = list(dict.fromkeys(text for record in material.learned.records for text in outputs_of(record)))
    known = {tuple(words(output)) for output in outputs}
    found = {}
    for name, each in judged.items():
        shares = overlaps([j.text for j in each], outputs)
        split = [tuple(words(j.text)) for j in each]
        found[name] = [
            replace(j, overlap=share, verbatim=bool(said) and said in known)
            for j, share, said in zip(each, shares, split, strict=True)
        ]
    return found


def with_losses(
    opened: Opened, material: Material, judged: dict[str, list[Judged]], how: How
) -> dict[str, list[Judged]]:
    """The same with each answer's loss under the base, where that is known."""
    if not (side := opened.under):
        return judged
    prompts = [prompt_tokens(r, opened.template, opened.tokenizer, side.model) for r in material.asked.records]
    found = {}
    for name, each in judged.items():
        pairs = zip(prompts, each, strict=True)
        texts = [encode_answer(prompt, j.text, opened.tokenizer, opened.tokens + 1) for prompt, j in pairs]
        with side.active():
            losses = loss_of_each(side.model, texts, how.machine, Patience(f"perplexity of the {name}", "text"))
        found[name] = [replace(j, loss=loss) for j, loss in zip(each, losses, strict=True)]
    return found


def loss_rows(opened: Opened, material: Material, machine: Machine) -> list[Row]:
    """What each side loses on the wanted answers, on training records and on the base's own text."""
    asked, learned = material.asked, material.learned
    texts = {Rule("Loss", WANTED_LOSS, "in nats a token, given the prompts", LOWER, LOSS): asked.encoded}
    if learned:
        texts[Rule("Loss", TRAINING_LOSS, f"the same of {len(learned.encoded)} training records; the further below "
                   "that of wanted answers, the more was learned by heart", kind=LOSS)] = learned.encoded  # fmt: skip
    if material.base_text:
        what, windows = material.base_text
        texts[Rule("Forgetting", "loss on the base's text", f"in nats a token of {what}, without a prompt; n counts "
                   "windows", LOWER, LOSS)] = windows  # fmt: skip
    rows = []
    for rule, each in texts.items():
        weights, scores = [float(count(text)) for text in each], {}
        for name, side in opened.sides.items():
            with side.active():
                scores[name] = loss_of_each(side.model, each, machine, Patience(f"{rule.name} of the {name}", "text"))
        rows.append(Row(rule, scores, dict.fromkeys(scores, weights)))
    return rows
