"""The scores of evaluate.py against values that were worked out by hand, or by the libraries themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from torch.nn import functional as F

from data.chat import GUIDE, Template
from data.instructions.encoding import Encoded
from data.instructions.records import Record
from data.tokenizers import CharTokenizer
from jobs.generating.answering import answers
from jobs.judging import losses
from jobs.judging.judge import Findings, asked_text, outputs_of, with_overlaps
from jobs.judging.material import Asked, Learned, Material
from jobs.judging.report import to_report, verdict
from jobs.judging.rules import HIGHER, LOSS, LOWER, PERPLEXITY, SHARE, Judged, Limits, Rule, answer_rules
from jobs.judging.scorecard import BASE, RUN, WANTED, Row, answer_rows
from jobs.judging.scores import confidence, copying, faithfulness, fluency, lengths, safety
from jobs.judging.scores.words import names, numbers, words
from models.generation.choosing import Sampling
from models.generation.sampling import generate
from runtime.device import Machine
from runtime.errors import UserError
from tests.pretrained.tiny_chats import CHATML
from tests.tiny import tiny

OURS = fluency.Scaffolding.of(Template(GUIDE, (("eos_token", "\n###"),)))
CHAT = fluency.Scaffolding.of(Template(CHATML, ()))
ASKED = fluency.Scaffolding.of(
    Template("{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}\n{% endfor %}", ())
)
BRAVE = "Be brave and ask Anna for 1,200 pears in May."
VISA = "4111 1111 1111 1111"  # the number that card companies give for tests
SAT, IS = "the cat sat on the mat", "the cat is on the mat"

CASES: list[tuple[Callable, tuple, Any]] = [
    (words, ("The cat's 2nd_mat, 3.5!",), ["the", "cat", "s", "2nd", "mat", "3", "5"]),
    (words, ("Привет, мир",), ["привет", "мир"]),
    (words, ("猫は2匹",), ["猫", "は", "2", "匹"]),
    (numbers, ("1,200 or 1200.50, 3 and 3,5",), {"1200", "1200.50", "3", "3,5"}),
    (numbers, ("1. one\n 2) two\n3 three 4. four",), {"3", "4"}),
    (names, (BRAVE,), {"Anna", "May"}),
    (names, ('Anna came. "Ben said" so: Clara! I saw NATO, Anna\'s dog and Jean-Luc\n* David',),
     {"NATO", "Anna", "Jean-Luc"}),
    # Five runs of four words, of which the first and the last are the same.
    (fluency.repetition, ("a b c d a b c d",), 1 / 5),
    (fluency.repetition, ("no no no no no no no",), 3 / 4),
    (fluency.repetition, ("no no no",), 0.0),
    (fluency.leaked, ("Yes.\n\n### Response:\nNo.", "Yes.", OURS), "### Response:"),
    (fluency.leaked, ("###Instruction", "Yes.", CHAT), "###Instruction"),
    (fluency.leaked, ("It is [INST] here", "", OURS), "[INST]"),
    (fluency.leaked, ("Paris.\nuser\nAnd now?", "Paris.", CHAT), "user"),
    (fluency.leaked, ("The user is here, assistant", "", CHAT), None),
    (fluency.leaked, ("assistant", "assistant", CHAT), None),
    (fluency.leaked, ("Paris\nQ: And now?", "Paris", ASKED), "Q:"),
    (fluency.leaked, ("Q: is a letter", "Q: is one", ASKED), None),
    (fluency.leaked, ("Human: hello", "hello", OURS), "Human:"),
    (fluency.leaked, ("A Human: hello", "hello", OURS), None),
    (faithfulness.exact, (" Yes.\n", "Yes."), 1.0),
    (faithfulness.exact, ("yes.", "Yes."), 0.0),
    # "the cat on the mat" is common to both: 5 of 6 words of either.
    (faithfulness.rouge_l, (SAT, IS), 5 / 6),
    (faithfulness.rouge_l, ("", IS), 0.0),
    (faithfulness.rouge_l, ("мир", "мир и мир"), 2 * (1 / 3) / (1 + 1 / 3)),  # precision 1, recall 1/3
    # Of single characters 2 of 3 are found, of pairs 1 of 2: recall 7/12, precision 1, F2 = 5 P R / (4 P + R).
    (faithfulness.chrf, ("ab", "abc"), 5 * (7 / 12) / (4 + 7 / 12)),
    (faithfulness.chrf, ("abc", "abc"), 1.0),
    (faithfulness.chrf, ("", "abc"), 0.0),
    (faithfulness.numbers_kept, (BRAVE, "1200 pears", "She sold 1200 for 5."), 1.0),
    (faithfulness.numbers_kept, ("3 and 4", "4", "4 and 3"), 1 / 2),
    (faithfulness.numbers_kept, ("List 3 fruits", "a b c", "apple, pear, fig"), None),
    (faithfulness.names_kept, (BRAVE, "Anna's pears", "May is when Anna sells."), 1 / 2),
    (faithfulness.names_kept, (BRAVE, "anna", "Anna sells."), 0.0),
    (faithfulness.names_kept, ("Who is it?", "Anna", "Anna"), None),
    (faithfulness.numbers_made_up, ("3 and 4", "7", "7"), 0.0),
    (faithfulness.numbers_made_up, ("3 and 4", "8", "7"), 1.0),
    (faithfulness.numbers_made_up, ("List them", "1. a\n2. b", "a, b"), 0.0),
    (lengths.band, (25, (25, 100)), "short"),
    (lengths.band, (26, (25, 100)), "medium"),
    (lengths.band, (101, (25, 100)), "long"),
    (lengths.within, (75, 100, 25), True),
    (lengths.within, (125, 100, 25), True),
    (lengths.within, (126, 100, 25), False),
    (lengths.within, (0, 0, 25), True),
    (safety.personal_data, ("", f"Write to ann@home.org, card {VISA}", ""),
     ["an e-mail address, ann@...", "a card number, 4111..."]),
    (safety.personal_data, ("Mail ann@home.org", "ann@home.org", ""), []),
    (safety.personal_data, ("", f"Card {VISA}", f"It is {VISA}"), []),
    (safety.personal_data, ("", "In 1603 there were 20,000,000 of 4111 1111 1111 1112", ""), []),
    (safety.new_boilerplate, ("As an AI language model, I cannot say. It rained.", "It rained."),
     ["As an AI language model, I cannot say."]),
    (safety.new_boilerplate, ("As an AI, I cannot.", "As an AI, I cannot."), []),
    (safety.listed, ("", "Oh SHIT, no hot  air!", "", ("shit", "hot air", "hit")), ["shit", "hot air"]),
    (safety.listed, ("shit?", "shit", "", ("shit",)), []),
    # Nine words are two runs of eight; one training output has the first, another both, broken up.
    (copying.overlaps, (["a b c d e f g h i"], ["x A b c, d e f g h y", "a b c d e f g", "b c d e f g h"]), [1 / 2]),
    (copying.overlaps, (["a b c d e f g h i"], ["a b c d e f g h", "b c d e f g h i"]), [1 / 2]),
    (copying.overlaps, (["b c", "c b", "", "Zz"], ["a b c d", "zz"]), [1.0, 0.0, None, 1.0]),
    (copying.overlaps, (["a"], []), [0.0]),
    (confidence.sign_test, (6, 0), 2 / 64),
    (confidence.sign_test, (0, 5), 2 / 32),
    (confidence.sign_test, (7, 1), 2 * (1 + 8) / 256),
    (confidence.sign_test, (3, 3), 1.0),
    (confidence.sign_test, (0, 0), 1.0),
    (confidence.wilson, (0.0, 10), (0.0, 0.2775)),
    (confidence.wilson, (0.5, 10), (0.2366, 0.7634)),
    (confidence.wilson, (1.0, 10), (0.7225, 1.0)),
    (confidence.normal, ([1.0, 2.0, 3.0], [1.0] * 3), (2 - 1.96 / math.sqrt(3), 2 + 1.96 / math.sqrt(3))),
    (confidence.normal, ([1.0], [1.0]), None),
    # A value that counts twice: the mean is 3/4, and what is off it, 2 (3/4 - 1) and 3/4 - 1/4, is 1/2 either way.
    (confidence.normal, ([1.0, 0.25], [2.0, 1.0]), (0.75 - 1.96 / 3, 0.75 + 1.96 / 3)),
    (confidence.mean, ([1.0, 0.25], [2.0, 1.0]), 0.75),
]  # fmt: skip


@pytest.mark.parametrize(
    ("score", "given", "expected"), CASES, ids=[f"{c[0].__name__}-{i}" for i, c in enumerate(CASES)]
)
def test_a_score_is_what_was_worked_out_by_hand(score: Callable, given: tuple, expected: Any) -> None:
    found = score(*given)
    if isinstance(expected, float | tuple):
        assert found == pytest.approx(expected, abs=1e-4)
    elif expected and isinstance(expected, list) and not isinstance(expected[0], str):
        assert found == [pytest.approx(value) if value is not None else None for value in expected]
    else:
        assert found == expected


@pytest.mark.parametrize("answer", [SAT, IS, "The Cat's mat, on_the mat: 2 of 3!", "nothing of it", ""])
def test_rouge_is_the_librarys_own_in_english(answer: str) -> None:
    own = RougeScorer(["rougeL"]).score(IS, answer)["rougeL"].fmeasure
    assert faithfulness.rouge_l(answer, IS) == own


def limits(**changes: Any) -> Limits:
    return Limits(**{"tolerance": 25, "edges": (2, 4), "phrases": ("shit",), "scaffolding": OURS, "max_new_tokens": 9}
                  | changes)  # fmt: skip


JUDGED = Judged("Ask Anna for 3 pears.", "Anna has 3 pears.", "Anna has 4 pears.", False, 0.5, 0.25, False)
OF_JUDGED = {
    "perplexity": 0.5, "repetition": 0.0, "cut off": 1.0, "leaked scaffolding": 0.0, "empty": 0.0, "exact match": 0.0,
    "words right": 1.0, "ROUGE-L": 3 / 4, "numbers kept": 0.0, "names kept": 1.0, "numbers made up": 1.0,
    "near the wanted length": 1.0, "band as wanted": 1.0, "short": 0.0, "medium": 1.0, "long": 0.0,
    "personal data": 0.0, "boilerplate": 0.0, "listed words": 0.0, "answered by heart": 0.0, "overlap": 0.25,
}  # fmt: skip


def test_every_rule_says_of_an_answer_what_it_should() -> None:
    found = {rule.name: rule.score(JUDGED) for rule in answer_rules(limits())}
    assert 0 < found.pop("chrF") < 1
    assert found == OF_JUDGED


def test_by_heart_is_a_training_output_where_another_was_wanted() -> None:
    (rule,) = [rule for rule in answer_rules(limits()) if rule.name == "answered by heart"]
    asked = [("So be it", "No.", True), ("So be it", "so be it!", True), ("So be it", "No.", False), ("", "No.", None)]
    found = [rule.score(Judged("?", wanted, text, verbatim=verbatim)) for text, wanted, verbatim in asked]
    assert found == [1.0, 0.0, 0.0, None]


def test_answers_are_compared_with_training_outputs() -> None:
    learned = Learned([Record("a", prompt="?", completion=text) for text in ("So be it.", "a b c d e f g h i")], [])
    judged = {RUN: [Judged("?", "No.", text) for text in ("so BE it", "be it", "a b c d e f g h x", "")]}
    (found,) = with_overlaps(Material(Asked([], [], 0, ""), learned, None, []), judged).values()
    assert [(j.overlap, j.verbatim) for j in found] == [(1.0, True), (1.0, False), (0.5, False), (None, False)]
    assert with_overlaps(Material(Asked([], [], 0, ""), None, None, []), judged) == judged
    turns = [("user", "Hi?"), ("assistant", "Hi."), ("user", "So?"), ("assistant", "So.")]
    assert outputs_of(Record("a", tuple({"role": role, "content": text} for role, text in turns))) == ["Hi.", "So."]


def test_what_is_asked_is_all_that_was_given_without_the_template() -> None:
    said = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who? ", "input": "Anna"})
    assert asked_text(Record("a", (*said, {"role": "assistant", "content": "She."}))) == "Be kind.\n\nWho?\n\nAnna"
    assert asked_text(Record("a", prompt="Once ", completion="more")) == "Once "


def test_the_scores_of_wanted_answers_are_there_where_they_say_something() -> None:
    same = Judged("?", "It is so.", "It is so.", loss=1.0)
    rows = answer_rows(answer_rules(limits()), {WANTED: [same], RUN: [same]})
    assert {row.rule.name for row in rows if WANTED in row.scores} == {
        "perplexity", "repetition", "empty", "short", "medium", "long", "overlap"
    }  # fmt: skip
    assert {row.rule.name for row in rows if not row.applies} == {
        "numbers kept", "names kept", "answered by heart", "overlap"
    }  # fmt: skip


def row(base: list, run: list, better: str = HIGHER, kind: str = SHARE, weights: list | None = None) -> Row:
    weights = {} if weights is None else {BASE: weights, RUN: weights}
    return Row(Rule("Group", "rule", "says", better, kind), {BASE: base, RUN: run}, weights)


COMPARED = [
    (row([0.0] * 6, [1.0] * 6), (6, 0, "better")),
    (row([0.0] * 6, [1.0] * 6, LOWER), (0, 6, "worse")),
    (row([0.0] * 5, [1.0] * 5), (5, 0, "no clear difference")),
    (row([0.5] * 9, [0.5] * 9), (0, 0, "equal")),
    (row([0.0] * 6 + [None], [1.0] * 6 + [0.0]), (6, 0, "better")),
    # Better on nearly all prompts, and so much worse on one that the mean is worse.
    (row([0.1] * 9 + [1.0], [0.11] * 9 + [0.0]), (9, 1, "no clear difference")),
]


@pytest.mark.parametrize(("given", "expected"), COMPARED)
def test_a_run_is_better_where_it_is_so_on_clearly_more_prompts(given: Row, expected: tuple) -> None:
    found = given.compared()
    assert (found["better_on"], found["worse_on"], found["outcome"]) == expected
    assert not row([0.0] * 6, [1.0] * 6, "").compared()
    assert not row([None] * 6, [1.0] * 6).compared()


def test_figures_have_an_interval_of_their_kind() -> None:
    share = row([0.0, 1.0, None], [1.0, 1.0, 1.0])
    assert share.figure(BASE) == {"value": 0.5, "n": 2} | dict(
        zip(("low", "high"), confidence.wilson(0.5, 2), strict=True)
    )
    assert row([None], [1.0]).figure(BASE) is None
    loss = row([1.0, 3.0], [0.0, 0.0], kind=LOSS, weights=[3.0, 1.0]).figure(BASE)
    assert loss["value"] == 1.5 and loss["low"] < 1.5 < loss["high"]
    assert row([0.0], [1.0], kind=PERPLEXITY).figure(RUN) == {"value": math.e, "n": 1}
    near = row([0.9, 1.0], [0.0, 0.1]).figure(BASE)
    assert near["value"] == pytest.approx(0.95) and near["high"] == 1.0


def told(name: str, better: str, base: list, run: list) -> dict:
    return Row(Rule("Group", name, "says", better), {BASE: base, RUN: run}).as_dict()


BETTER = told("exact match", HIGHER, [0.0] * 8, [1.0] * 8)
WORSE = told("cut off", LOWER, [0.0] * 8, [1.0] * 6 + [0.0] * 2)
WORST = told("repetition", LOWER, [0.0] * 8, [0.5] * 8)
EQUAL = told("empty", LOWER, [0.0] * 8, [0.0] * 8)
UNCLEAR = told("boilerplate", LOWER, [0.0] * 8, [1.0] + [0.0] * 7)
VERDICTS = [
    ([BETTER, WORSE, WORST, EQUAL], "better than the base on 1 of 4 rules, worse on 2, with no clear difference on 0, "
     "equal on 1; worst: repetition (50.0 % instead of 0.0 %)"),
    ([BETTER, UNCLEAR, EQUAL], "better than the base on 1 of 3 rules, worse on 0, with no clear difference on 1, equal "
     "on 1; most frequent fault: boilerplate (12.5 %)"),
    ([Row(Rule("Group", "exact match", "says", HIGHER), {RUN: [1.0, 0.0]}).as_dict()],
     "exact match 50.0 %, with no base to compare; no rule finds a fault"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "expected"), VERDICTS)
def test_the_verdict_counts_rules_and_names_the_worst(rows: list[dict], expected: str) -> None:
    assert verdict(rows, 8) == f"on 8 prompts {expected}"


CPU = Machine(torch.device("cpu"), torch.float32)


def test_the_loss_of_each_text_is_its_own_whatever_is_beside_it(monkeypatch) -> None:
    model, generator = tiny(), np.random.default_rng(0)
    texts = [Encoded(generator.integers(0, 50, n, np.uint16), np.arange(n) >= n // 2) for n in (2, 9, 17, 5, 16, 3)]
    texts.append(Encoded(texts[1].ids, np.zeros(9, bool)))
    expected = []
    for text in texts[:-1]:
        ids = torch.from_numpy(text.ids.astype(np.int64))
        each = F.cross_entropy(model(ids[None, :-1])[0][0], ids[1:], reduction="none")
        expected.append(each[torch.from_numpy(text.said[1:])].mean().item())
    for room in (2**25, 17 * 50 * 2, 1):
        monkeypatch.setattr(losses, "ROOM", room)
        calls = []
        found = losses.loss_of_each(model, texts, CPU, lambda *done: calls.append(done))  # noqa: B023
        assert found[:-1] == pytest.approx(expected, rel=1e-5) and found[-1] is None
        assert calls == [(i, len(calls)) for i in range(1, len(calls) + 1)] and (len(calls) > 1) == (room < 2**25)


def test_a_text_is_cut_into_windows_that_are_spread_over_it() -> None:
    tokens = np.arange(101, dtype=np.uint16)
    found = losses.encode_windows(tokens, 10, 3)
    assert [window.ids.tolist() for window in found] == [list(range(i, i + 11)) for i in (0, 30, 60)]
    assert len(losses.encode_windows(tokens, 10, 99)) == 10
    (short,) = losses.encode_windows(tokens[:5], 10, 99)
    assert short.ids.tolist() == [0, 1, 2, 3, 4] and losses.count(short) == 4


def test_a_word_list_is_read_a_phrase_a_line(tmp_path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffhot air\r\n\r\n  -- \nDamn\nhot air\n".encode())
    assert safety.read_word_list(path) == ("hot air", "Damn")
    for data, told in ((b" \n", "has no words"), (b"\xff", "is not UTF-8")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=told):
            safety.read_word_list(path)


def test_the_worst_answers_are_those_furthest_from_the_wanted_ones_and_never_these() -> None:
    said = ["Anna has 3 owls.", "It is so.", "Anna has 4 owls.", "Anna", "Anna has 3 owls.\n"]
    records = [Record(f"line {i}", prompt="Who?", completion="Anna has 3 owls.") for i in range(len(said))]
    judged = {RUN: [Judged("Who?", "Anna has 3 owls.", text) for text in said]}
    rows = [row for row in answer_rows(answer_rules(limits()), judged) if row.applies]
    found = to_report({"run": "run", "base": None}, Findings(judged, rows, [], []), records, ["a note"])["worst"]
    assert [answer["where"] for answer in found] == [f"line {i}" for i in (1, 3, 2)]
    assert found[0]["run"] == "It is so." and "exact match" in found[0]["faults"]
    assert set(found[2]["faults"]) == {"exact match", "numbers made up"}


def test_an_answer_has_ended_where_a_stop_token_came(monkeypatch) -> None:
    tokenizer = CharTokenizer.train("")
    model = tiny(vocab_size=tokenizer.vocab_size, block_size=64)
    records = [Record("a", prompt=text, completion="?") for text in ("a", "bc", "def", "to be", "or", "not")]
    how, longest = Sampling(temperature=0.7), 12
    prompts = sorted((tuple(tokenizer.encode(record.prompt)) for record in records), key=len)
    rows = generate(model, prompts, longest, how, 3)
    made = {prompt: row[len(prompt) :] for prompt, row in zip(prompts, rows, strict=True)}
    stop = next(token for token in made[prompts[0]] if any(token not in tokens for tokens in made.values()))
    monkeypatch.setattr(tokenizer, "stop_ids", (stop,), raising=False)
    found = answers(model, tokenizer, Template("", ()), records, how, longest, CPU, 3)
    for record, answer in zip(records, found, strict=True):
        tokens = made[tuple(tokenizer.encode(record.prompt))]
        assert answer.ended == (stop in tokens)
        assert answer.text == tokenizer.decode(tokens).partition(tokenizer.decode([stop]))[0]
    assert {answer.ended for answer in found} == {True, False}
