"""serve.py as a process, asked by the real openai client and by clients that misbehave."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from command_line import run
from served import LONG, TEXT, serving, train, weather

openai = pytest.importorskip("openai", reason="the openai client is in requirements-test.txt")
pytest.importorskip("uvicorn", reason="uvicorn is in requirements-serve.txt")

BASE, FOLIO, WEATHER = "base", "lora-text", "lora-weather"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and two adapters of it."""
    folder, lora = tmp_path_factory.mktemp("serve"), {"USE_LORA": "True", "BASE": BASE}
    train(
        folder,
        {"DATASET": str(TEXT), "RUN_NAME": BASE, "ARCHITECTURE": "gpt"},
        lora | {"DATASET": str(TEXT), "RUN_NAME": FOLIO, "LEARNING_RATE": "0.02"},
        lora | {"DATASET": weather(folder), "RUN_NAME": WEATHER},
    )
    return folder


@pytest.fixture(scope="module")
def url(runs: Path) -> Iterator[str]:
    with serving(runs, "--at-once", "4", "--waiting", "6", "--max-tokens", LONG) as (url, _):
        yield url


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def generated(folder: Path, prompt: str, *flags: str) -> str:
    """What generate.py continues a prompt with."""
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": prompt}))
    done = run(folder, folder, "generate.py", "--prompts", "prompts.jsonl", *flags)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)["text"]


def test_each_adapter_is_a_model_and_says_what_generate_says(runs: Path, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [BASE, FOLIO, WEATHER]
    assert client.models.retrieve(FOLIO).parent == BASE
    texts = {}
    for model in (BASE, FOLIO, WEATHER):
        answer = client.completions.create(model=model, prompt="The ", max_tokens=40, seed=7)
        texts[model] = answer.choices[0].text
        adapter = "none" if model == BASE else model
        flags = ("--adapter", adapter, "--run", BASE, "--seed", "7", "--max-new-tokens", "40")
        assert texts[model] == generated(runs, "The ", *flags)
        ended = answer.choices[0].finish_reason == "stop"  # as the adapter that was tuned on pairs may
        assert (answer.usage.completion_tokens < 40) == ended and not (ended and model != WEATHER)
    assert len(set(texts.values())) == 3
    half = {"adapters": {FOLIO: 0.5, WEATHER: 0.5}}
    mixed = client.completions.create(model=BASE, prompt="The ", max_tokens=40, seed=7, extra_body=half)
    flags = ("--run", BASE, "--adapter", f"{FOLIO}=0.5", "--adapter", f"{WEATHER}=0.5")
    assert mixed.choices[0].text == generated(runs, "The ", *flags, "--seed", "7", "--max-new-tokens", "40")


def test_a_stream_is_the_whole_text_in_pieces(client: openai.OpenAI) -> None:
    asked = {"model": FOLIO, "prompt": ["The ", "A "], "n": 2, "max_tokens": 30, "seed": 3, "temperature": 1.2}
    whole = [choice.text for choice in client.completions.create(**asked).choices]
    texts, reasons, usage = [""] * 4, {}, None
    for part in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = part.usage or usage
        for choice in part.choices:
            texts[choice.index] += choice.text
            reasons |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    assert texts == whole and len(set(whole)) == 4 and reasons == dict.fromkeys(range(4), "length")
    assert usage.completion_tokens == 120


def test_a_stop_text_ends_a_text_and_is_not_told(client: openai.OpenAI) -> None:
    asked = {"model": FOLIO, "prompt": "The ", "max_tokens": 60, "seed": 5}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[20:23]
    (choice,) = client.completions.create(**asked, stop=[stop, "\0never"]).choices
    assert choice.text == whole[: whole.index(stop)] and choice.finish_reason == "stop"
    parts = list(client.completions.create(**asked, stop=stop, stream=True))
    assert "".join(part.choices[0].text for part in parts) == choice.text


def test_many_clients_get_what_each_gets_alone(client: openai.OpenAI) -> None:
    asked = [
        {"model": (BASE, FOLIO, WEATHER)[i % 3], "prompt": "The A of"[: 1 + i % 7], "max_tokens": 5 + 7 * i % 40}
        for i in range(10)
    ]
    alone = [client.completions.create(**each, seed=i).choices[0].text for i, each in enumerate(asked)]
    with ThreadPoolExecutor(10) as threads:

        def one(i: int) -> str:
            return client.completions.create(**asked[i], seed=i).choices[0].text

        assert list(threads.map(one, range(10))) == alone


def busy(url: str) -> dict:
    return openai.OpenAI(base_url=url, api_key="none").get("../health", cast_to=object)


def wait_for(condition, seconds: float = 10) -> None:
    late = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < late
        time.sleep(0.02)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_frees_its_place(url: str, streamed: bool) -> None:
    host, port = re.search(r"//(.*):(\d+)/", url).groups()
    body = json.dumps({"model": BASE, "prompt": "a", "n": 4, "max_tokens": int(LONG), "stream": streamed}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(3):
        with socket.create_connection((host, int(port))) as gone:
            gone.sendall(head + body)
            wait_for(lambda: busy(url)["made"] == 4)
            with socket.create_connection((host, int(port))) as waiting:
                waiting.sendall(head + body)
                wait_for(lambda: busy(url)["waiting"] == 4)
            wait_for(lambda: busy(url)["waiting"] == 0)
            assert busy(url)["made"] == 4
        wait_for(lambda: busy(url)["made"] == 0)


def test_a_full_queue_is_told_and_nothing_is_lost(url: str, client: openai.OpenAI) -> None:
    asked = {"model": BASE, "prompt": "a", "max_tokens": int(LONG), "stream": True}
    with client.completions.create(**asked, n=3) as long, client.completions.create(**asked, n=1):
        next(iter(long))
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(client.completions.create, model=BASE, prompt="a", n=6, max_tokens=9)
            wait_for(lambda: busy(url)["waiting"] == 6)
            with pytest.raises(openai.RateLimitError, match="as many texts are waiting as may"):
                client.completions.create(model=BASE, prompt="a", max_tokens=1)
            long.close()
            assert len(waiting.result().choices) == 6


REFUSED = {
    "unknown model": ({"model": "gone"}, 404, "there is no model 'gone' here"),
    "no prompt": ({"prompt": None}, 400, "prompt is missing"),
    "number as prompt": ({"prompt": 5}, 400, "prompt must be text"),
    "token ids": ({"prompt": [1, 2]}, 400, "prompt must be text"),
    "unknown character": ({"prompt": "\N{SNOWMAN}"}, 400, "the tokenizer has no"),
    "negative": ({"max_tokens": -1}, 400, "max_tokens must be a whole number from 1 to 200000"),
    "too many": ({"max_tokens": 200_001}, 400, "max_tokens must be a whole number from 1 to 200000"),
    "true": ({"max_tokens": True}, 400, "max_tokens must be"),
    "text": ({"temperature": "hot"}, 400, "temperature must be a number from 0 to 100"),
    "zero": ({"top_p": 0}, 400, "top_p must be a number above 0, at most 1"),
    "stops": ({"stop": ["a"] * 10_000}, 400, "stop must be"),
    "empty stop": ({"stop": ""}, 400, "stop must be"),
    "unheeded": ({"frequency_penalty": 0.5}, 400, "frequency_penalty is not supported here"),
    "unknown field": ({"grammar": "x"}, 400, "'grammar' is not a field here"),
    "adapters": ({"adapters": {"gone": 1}}, 400, "there is no adapter 'gone' here"),
    "adapters of an adapter": ({"model": FOLIO, "adapters": {WEATHER: 1}}, 400, "adapters go with the base"),
    "many": ({"n": 11}, 400, "this asks for 11 texts at once, and 10 have room here"),
    "long": ({"prompt": "a" * 129}, 400, "the prompt has 129 tokens, and the model sees 128"),
    "large": ({"prompt": "a" * 2**21}, 413, "the body has more than 1,048,576 bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_refused_in_the_protocols_words(case: str, client: openai.OpenAI) -> None:
    changes, status, message = REFUSED[case]
    asked = {"model": BASE, "prompt": "a", "max_tokens": 1} | changes
    with pytest.raises(openai.APIStatusError) as error:
        client.post("/completions", body=asked, cast_to=object)
    assert error.value.status_code == status and message in error.value.body["message"]
    assert error.value.body["type"]


def test_what_is_no_request_is_refused(client: openai.OpenAI) -> None:
    http = client._client
    for body in (b"", b"{", b"[]", b"[" * 10_000, b"\xff"):
        answer = http.post(f"{client.base_url}completions", content=body)
        assert answer.status_code == 400 and "JSON" in answer.json()["error"]["message"]
    assert http.get(f"{client.base_url}completions").status_code == 405
    assert "error" in http.get(f"{client.base_url}nothing").json()
    assert http.get(f"{client.base_url}../").status_code == 404  # the page is the playground's
    elsewhere = http.post(f"{client.base_url}completions", content=b"{}", headers={"Host": "evil.example"})
    assert elsewhere.status_code == 400
    body, own = json.dumps({"model": BASE, "prompt": "a", "max_tokens": 1}), str(client.base_url).removesuffix("/v1/")
    for origin, status in (("http://evil.example", 403), ("null", 403), (own, 200)):
        answer = http.post(f"{client.base_url}completions", content=body, headers={"Origin": origin})
        assert answer.status_code == status


def test_what_was_tuned_on_instructions_chats_and_others_cannot(runs: Path, client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Hot?"}]
    asked = {"model": WEATHER, "messages": messages, "seed": 5, "max_completion_tokens": 20}
    answer = client.chat.completions.create(**asked).choices[0].message
    parts = client.chat.completions.create(**asked, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == answer.content
    done = run(runs, runs, "generate.py", "--run", WEATHER, "--instruction", "Hot?", "--seed", "5",
               "--max-new-tokens", "20")  # fmt: skip
    assert answer.role == "assistant" and done.stdout.rstrip("\n") == answer.content.rstrip("\n")
    with pytest.raises(openai.BadRequestError, match="has no chat template"):
        client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "Hi"}])


def check_page(client: openai.OpenAI, site: str) -> None:
    """The page is for whoever asks and runs nothing but its own script; what it says of the models needs the key."""
    http = client._client
    for path, kind in (("", "text/html"), ("page/page.js", "text/javascript"), ("page/style.css", "text/css")):
        answer = http.get(site + path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';") and "unsafe" not in policy
        assert "://" not in answer.text  # nothing is fetched from elsewhere
    for path in ("page/", "page/../playground.py", "page/%2e%2e/app.py"):
        assert http.get(site + path).status_code == 404
    assert http.get(f"{site}page/about").status_code == 401
    about = http.get(f"{site}page/about", headers={"Authorization": "Bearer secret"}).json()
    assert about["command"].endswith(f"generate.py --run {BASE} --dtype=fp32") and about["key"]
    assert [(model["word"], model["chat"]) for model in about["models"]] == [
        (BASE, False), (FOLIO, False), (WEATHER, True),
    ]  # fmt: skip
    assert (about["context"], about["models"][2]["sampling"]["top_k"]) == (128, 40)


def test_the_playground_has_a_page_and_sigterm_finishes_what_has_begun(runs: Path) -> None:
    opened, opener = runs / "opened", runs / "opener"
    opener.write_text(f'#!/bin/sh\necho "$1" > {opened}.new && mv {opened}.new {opened}\n')
    opener.chmod(0o755)
    seen = {"DISPLAY": ":9", "BROWSER": f"{opener} %s", "SERVE_API_KEY": "secret"}
    flags = ("--dtype", "fp32", "--at-once", "2", "--max-seconds", "60")
    with serving(runs, *flags, command="playground.py", **seen) as (url, server):
        wait_for(opened.exists)
        assert opened.read_text() == f"{url.removesuffix('/v1')}\n"
        client = openai.OpenAI(base_url=url, api_key="secret", max_retries=0)
        check_page(client, url.removesuffix("v1"))
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
        stream = client.completions.create(model=FOLIO, prompt="a", max_tokens=500, seed=1, stream=True)
        text = next(iter(stream)).choices[0].text
        server.send_signal(signal.SIGTERM)
        text += "".join(part.choices[0].text for part in stream)
        assert len(text) == 500
        assert server.wait(20) == 0
        assert "Stopped; what had begun was finished" in server.stdout.read()


def test_what_cannot_be_served_is_one_line(runs: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for flags, status, message in (
            (("--port", port), 1, f"port {port} of 127.0.0.1 is taken by another program"),
            (("--host", "0.0.0.0"), 2, "set SERVE_API_KEY"),
            (("--adapter", "gone"), 2, "gone"),
            (("--run", "gone"), 2, "gone"),
        ):
            done = run(runs, runs, "serve.py", *flags)
            assert done.returncode == status and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
