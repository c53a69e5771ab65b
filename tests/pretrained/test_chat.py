"""Tokenizers and chat templates against transformers' own, and texts that end where they are told to."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import transformers
from tiny_chats import CHATML, LOOPS, opened
from tiny_models import make, save

from data.chat import encode_chat, shortened, template_of
from data.pretrained_tokenizer import PretrainedTokenizer, pretrained_tokenizer
from jobs.generating.stopping import StopAt, cut
from runtime.errors import UserError

CHAT = [
    {"role": "user", "content": ' the cat <s> & "dog" '},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "on\nthe mat </s>"},
]
TEXTS = ["", "the cat", "<s>the</s> cat\n\n\n on", "Ünïcode 😀 text", " \t leading", "\u2028", "the\ud800cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(make("llama"), tmp_path_factory.mktemp("chat"))


def with_template(folder: Path, template: str) -> tuple[PretrainedTokenizer, transformers.PreTrainedTokenizerBase]:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = template
    ours = opened(folder)
    ours.template = template
    return ours, theirs


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_no_text_becomes_a_special_token_and_a_bos_comes_first(folder: Path, text: str) -> None:
    ours = opened(folder)
    ids = ours.encode(text)
    assert ids[0] == ours.bos_id == 1
    assert not {1, 2} & set(ids[1:])
    plain = text.encode("utf-8", "replace").decode()
    if "<s>" not in plain:
        assert ids == transformers.AutoTokenizer.from_pretrained(folder)(plain)["input_ids"]
    stream = ours.stream()
    assert "".join(map(stream.feed, ids)) + stream.flush() == ours.decode(ids)
    assert ours.stop_ids == (2,)


@pytest.mark.parametrize("template", [CHATML, LOOPS], ids=["chatml", "loops"])
@pytest.mark.parametrize("reply", [True, False])
def test_a_chat_is_rendered_as_transformers_does(folder: Path, template: str, reply: bool) -> None:
    ours, theirs = with_template(folder, template)
    expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=reply)
    assert template_of(ours).write(CHAT, reply=reply) == expected
    if reply:
        plain = [m | {"content": m["content"].replace("<s>", "(").replace("</s>", ")")} for m in CHAT]
        expected = theirs.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        assert encode_chat(ours, plain) == theirs(expected, add_special_tokens=False)["input_ids"]
        with pytest.raises(UserError, match="a message of the user has the special token '<s>'; take it out"):
            encode_chat(ours, CHAT)


def test_where_a_template_comes_from(folder: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}
    config = json.loads(files["tokenizer_config.json"])
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "several"}]
    for values, jinja, expected in (({}, b"file", "file"), ({"chat_template": "text"}, None, "text")):
        there = files | {"tokenizer_config.json": json.dumps(config | values).encode()}
        there |= {"chat_template.jinja": jinja} if jinja else {}
        assert template_of(pretrained_tokenizer(there, "here")).write(CHAT) == expected
    there = files | {"tokenizer_config.json": json.dumps(config | {"chat_template": named}).encode()}
    assert template_of(pretrained_tokenizer(there, "here")).write(CHAT) == "several"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('no system') }}", "the chat template refuses these messages: no system"),
        ("{{ messages.__class__.__mro__ }}", "refuses these messages: access to attribute '__class__'"),
        ("{{ 'x' * 10**9 }}", "the template makes too long a text"),
        ("{{ [0] * 10**9 }}", "the template makes too long a text"),
        ("{{ 9 ** 9 ** 9 }}", "the template makes too long a text"),
        ("{% for", "the chat template cannot be read: unexpected 'end of template' (line 1)"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "loops too long"),
        (None, "this model has no chat template"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_serve(folder: Path, template: str | None, told: str) -> None:
    ours = opened(folder)
    ours.template = template
    with pytest.raises(UserError, match=re.escape(told)):
        template_of(ours).write(CHAT)


def test_a_chat_that_outgrows_the_context_loses_its_oldest_turns_but_not_the_system_prompt(folder: Path) -> None:
    ours, _ = with_template(folder, CHATML)
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"the cat {i}"} for i in range(9)]
    chat = [{"role": "system", "content": "sat"}, *turns]
    kept, ids = shortened(ours, chat, 120)
    assert kept[0] == chat[0]
    assert kept[1:] == turns[-(len(kept) - 1) :]
    assert 1 < len(kept) < len(chat)
    assert kept[1]["role"] == "user"
    assert ids == encode_chat(ours, kept)
    assert len(ids) <= 120 < len(encode_chat(ours, [chat[0], *turns[-(len(kept) + 1) :]]))
    with pytest.raises(UserError, match="the message has [0-9]+ tokens with what goes before it, and 9 fit"):
        shortened(ours, chat, 9)


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize("stops", [("END",), ("END", "EN", "x"), ("abab",), ()], ids=str)
def test_a_text_ends_before_a_stop_however_it_is_cut(size: int, stops: tuple[str, ...]) -> None:
    text = "abaEabababENEND and more"
    until, told = StopAt(stops), ""
    for at in range(0, len(text), size):
        told += until.feed(text[at : at + size])
        if until.ended:
            break
    told += until.flush()
    assert told == cut(text, stops)
    assert until.ended == (told != text)
