"""How a record is written, which of its tokens are learned, that inference sees the same: against a slow version."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from data.chat import END_TEXT, GUIDE, LINE, Template, encode_chat, own_template
from data.instructions.encoding import encode_all, encode_prompt, encode_record
from data.instructions.records import to_record
from data.instructions.tuning import Sizes, fit
from data.tokenizers import BPETokenizer, CharTokenizer, Tokenizer
from runtime.errors import UserError
from tests.pretrained.tiny_chats import CHATML, LOOPS, opened
from tests.pretrained.tiny_models import make, save

TEXT = (
    "### Instruction:\nthe cat sat on the mat\n\n### Response:\nthe dog\n\n### Input: The answers, they are these.\n"
    * 9
)
FORGETS = (  # as Qwen 3's, which takes the thoughts out of older answers
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' and loop.last %}(thinks) {% endif %}"
    "{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_END = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TEMPLATES = {"guide": GUIDE, "line": LINE, "chatml": CHATML, "loops": LOOPS, "forgets": FORGETS, "no end": NO_END}
ROWS = {
    "instruction": {"instruction": "the cat", "output": "sat on the mat"},
    "input": {"instruction": "Which one?", "input": "a cat\nand a dog", "output": "the\n\ndog "},
    "messages": {"messages": [
        {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "where"}, {"role": "assistant", "content": " on the mat"},
    ]},
    "sharegpt": {"conversations": [{"from": "human", "value": "the"}, {"from": "gpt", "value": "the"}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    """Characters; pieces that merge across where an answer begins; and a pretrained one, which puts a BOS in front."""
    theirs = opened(save(make("llama"), tmp_path_factory.mktemp("masks")))
    return {"char": CharTokenizer.train(TEXT), "bpe": BPETokenizer.train(TEXT, 400), "pretrained": theirs}


def slowly(record, template: Template, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Turn by turn: what inference would be given, then what the template adds once the answer is there."""
    ids, said, before = [], [], ""
    for i, message in enumerate(record.messages):
        if message["role"] != "assistant":
            continue
        prompt, whole = template.write(record.messages[:i], reply=True), template.write(record.messages[: i + 1])
        if not prompt.startswith(before):
            ids, said, before = [], [], ""
        given = tokenizer.encode_rendered(prompt[len(before) :])
        answer = tokenizer.encode_rendered(whole[len(prompt) :])
        learned = list(answer)
        while tokenizer.stop_ids and learned and learned[-1] not in tokenizer.stop_ids:
            learned.pop()
        if tokenizer.stop_ids and not learned:
            answer = learned = [*answer, tokenizer.stop_ids[0]]
        ids += given + answer
        said += [False] * len(given) + [True] * len(learned) + [False] * (len(answer) - len(learned))
        before = whole
    return ids, said


@pytest.mark.parametrize("kind", ["char", "bpe", "pretrained"])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("row", ROWS)
def test_training_sees_what_inference_sees_and_learns_the_answers(row: str, name: str, kind: str, tokenizers) -> None:
    tokenizer = tokenizers[kind]
    template, record = Template.of(TEMPLATES[name], tokenizer), to_record(ROWS[row], "here", {})
    found = encode_record(record, template, tokenizer)
    assert (found.ids.tolist(), found.said.tolist()) == slowly(record, template, tokenizer)
    prompt = encode_prompt(record, template, tokenizer)
    assert prompt == encode_chat(tokenizer, record.messages[:-1], template)
    assert found.ids[: len(prompt)].tolist() == prompt
    assert not found.said[: len(prompt)][-1]
    last = found.ids[len(prompt) :][found.said[len(prompt) :]]
    written = tokenizer.decode([i for i in last.tolist() if i not in tokenizer.stop_ids])
    assert record.answer.strip() in written
    if tokenizer.stop_ids:
        assert last[-1] in tokenizer.stop_ids
    elif name == "guide":
        assert written == record.answer + END_TEXT + "\n\n"


@pytest.mark.parametrize(("name", "count"), [("guide", 2), ("chatml", 2), ("forgets", 1)])
def test_answers_that_the_template_rewrites_are_not_learned_and_that_is_told(
    name: str, count: int, tokenizers, capsys
) -> None:
    tokenizer, record = tokenizers["pretrained"], to_record(ROWS["messages"], "here", {})
    found = encode_record(record, Template.of(TEMPLATES[name], tokenizer), tokenizer)
    assert found.answers == count
    fit([record], [found], Sizes(1024, 1, 1, 0))
    told = "Of 1 of 1 record only the last answer is learned, as the template rewrites older ones"
    assert (told in capsys.readouterr().err) == (count == 1)


def test_pieces_would_merge_across_the_seam(tokenizers) -> None:
    """Else the test above would show nothing of it."""
    tokenizer = tokenizers["bpe"]
    template, record = Template.of(NO_END, tokenizer), to_record(ROWS["instruction"], "here", {})
    prompt, whole = template.write(record.messages[:1], reply=True), template.write(record.messages)
    assert tokenizer.encode(whole)[: len(tokenizer.encode(prompt))] != tokenizer.encode(prompt)


@pytest.mark.parametrize("kind", ["char", "bpe", "pretrained"])
@pytest.mark.parametrize("row", [{"prompt": "the cat", "completion": " sat"}, {"text": "the cat sat"}], ids=list)
def test_a_text_is_learned_after_its_prompt_with_one_bos(row: dict, kind: str, tokenizers) -> None:
    tokenizer = tokenizers[kind]
    template, record = Template.of(GUIDE, tokenizer), to_record(row, "here", {})
    found = encode_record(record, template, tokenizer)
    assert found.ids.tolist().count(tokenizer.bos_id) == (1 if kind == "pretrained" else 0)
    said = tokenizer.decode([i for i in found.ids[found.said].tolist() if i not in tokenizer.stop_ids])
    assert said == record.completion + ("" if tokenizer.stop_ids else END_TEXT)
    prompt = encode_prompt(record, template, tokenizer)
    if record.prompt or kind == "pretrained":
        assert found.ids[~found.said].tolist() == prompt
    if record.prompt:
        assert prompt == tokenizer.encode(record.prompt)


def test_the_guide_has_one_bos_and_its_input_apart(tokenizers) -> None:
    tokenizer = tokenizers["pretrained"]
    record = to_record(ROWS["input"], "here", {})
    text = Template.of(GUIDE, tokenizer).write(record.messages)
    assert text == (
        "<s>### Instruction:\nWhich one?\n\n### Input:\na cat\nand a dog\n\n### Response:\nthe\n\ndog </s>\n\n"
    )
    assert encode_record(record, Template.of(GUIDE, tokenizer), tokenizer).ids.tolist().count(tokenizer.bos_id) == 1
    assert "Which one?\n\na cat" in Template.of(LOOPS.replace(" | tojson", ""), tokenizer).write(record.messages)


def test_special_tokens_come_from_the_template_only(tokenizers) -> None:
    for kind, token in (("pretrained", "</s>"), ("bpe", "<|endoftext|>")):
        row = {"instruction": f"say {token}", "output": "no"}
        with pytest.raises(UserError, match=r"file line 3: a message of the user has the special token"):
            encode_record(to_record(row, "file line 3", {}), Template.of(GUIDE, tokenizers[kind]), tokenizers[kind])
    row = {"prompt": "a</s>b", "completion": "<s>c</s>"}
    template = Template.of(GUIDE, tokenizers["pretrained"])
    found = encode_record(to_record(row, "here", {}), template, tokenizers["pretrained"]).ids.tolist()
    assert (found.count(1), found.count(2)) == (1, 1)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("{{ raise_exception('only one turn') }}", "here: the chat template refuses these messages: only one turn"),
        ("{% if %}", "here: the chat template cannot be read"),
        ("{% for i in range(10**6) %}{% for j in range(10**6) %}{% endfor %}{% endfor %}", "loops too long"),
        ("{{ messages | length }} {{ messages[0].content }}", "writes an answer otherwise than after its own prompt"),
    ],
)
def test_a_template_that_cannot_serve_is_told_with_the_record(source: str, told: str, tokenizers) -> None:
    record = to_record(ROWS["instruction"], "here", {})
    with pytest.raises(UserError, match=told):
        encode_record(record, Template.of(source, tokenizers["char"]), tokenizers["char"])


def test_tokens_are_kept_and_torn_ones_made_again(tokenizers, tmp_path: Path) -> None:
    rng = random.Random(0)
    records = [
        to_record({"instruction": "the cat", "output": "the dog " * rng.randint(1, 9)}, f"{i}", {}) for i in range(20)
    ]
    template = Template.of(GUIDE, tokenizers["bpe"])
    first = encode_all(records, template, tokenizers["bpe"], tmp_path, "digest")
    (folder,) = (tmp_path / "tokens").iterdir()
    for torn in (False, True):
        if torn:
            (folder / "ids.bin").write_bytes(b"xx")
        again = encode_all(records, template, tokenizers["bpe"], tmp_path, "digest")
        for one, other, record in zip(first, again, records, strict=True):
            expected = encode_record(record, template, tokenizers["bpe"])
            assert one.ids.tolist() == other.ids.tolist() == expected.ids.tolist()
            assert one.said.tolist() == other.said.tolist() == expected.said.tolist()


def test_a_base_without_a_template_has_none(tokenizers) -> None:
    assert own_template(tokenizers["char"]) is None
    assert torch.tensor(encode_chat(tokenizers["char"], [{"role": "user", "content": "the"}],
                                    Template.of(GUIDE, tokenizers["char"]))).dim() == 1  # fmt: skip
