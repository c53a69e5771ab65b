"""The playground's page in a real browser, used as a person does."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import LONG, TEXT, clean_environment, serving, train, weather

from tests.browser import chromium, found, resize, until

pytest.importorskip("uvicorn", reason="uvicorn is in requirements-serve.txt")

BASE, HTML, WEATHER = "base", "lora-html", "lora-weather"
EVIL = "<img src=x onerror=\"document.title='evil'\">"
PROMPT = f'-it\'s "$HOME" `id` \\n $(id) ; * !\n\tand %s\nשלום \N{GRINNING FACE}\N{ZERO WIDTH JOINER} {EVIL}\n'


pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an adapter that says HTML, and one that answers."""
    found()
    folder, lora = tmp_path_factory.mktemp("play"), {"USE_LORA": "True", "BASE": BASE}
    (folder / "html.txt").write_text("<b>\n" * 5000)
    (folder / "both.txt").write_text(TEXT.read_text("utf-8") + "<b>\n" * 1000, "utf-8")
    train(
        folder,
        {"DATASET": "both.txt", "TOKENIZER": "bpe", "VOCAB_SIZE": "400", "RUN_NAME": BASE},
        lora | {"DATASET": "html.txt", "RUN_NAME": HTML, "LEARNING_RATE": "0.05"},
        lora | {"DATASET": weather(folder), "RUN_NAME": WEATHER},
    )
    return folder


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    with serving(runs, "--no-open", "--max-tokens", LONG, command="playground.py") as served:
        yield served


@pytest.fixture
def site(server: tuple[str, subprocess.Popen]) -> str:
    return server[0].removesuffix("v1")


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


class Page:
    """The page, by what a person sees and does."""

    def __init__(self, driver: Any, site: str) -> None:
        self.driver = driver
        driver.get(site)
        until(lambda: self.all(".text"))

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def fill(self, selector: str, text: str) -> None:
        """Paste a text, which chromedriver cannot type where it has emoji."""
        script = "[e, t] = arguments; e.value = t; e.dispatchEvent(new InputEvent('input', {bubbles: true}))"
        self.driver.execute_script(script, self.one(selector), text)

    def make(self, prompt: str) -> dict[str, str]:
        self.fill("#prompt", prompt)
        self.one("#make").click()
        return self.texts()

    def texts(self) -> dict[str, str]:
        """The text of each column by its title, when all are there and nothing more is on its way."""
        script = """return [...document.querySelectorAll(".text")].map((e) => [
            e.querySelector("h3").textContent, e.querySelector(".made").textContent,
            e.querySelector(".made").getAttribute("aria-busy"), e.querySelector(".status").textContent])"""

        def settled() -> list[list[str]] | None:
            told = self.driver.execute_script(script)
            return told if all(busy == "false" and status for _, _, busy, status in told) else None

        return {title: text for title, text, *_ in until(settled)}

    def statuses(self) -> list[str]:
        return [element.text for element in self.all(".status")]

    def copied(self, button: str) -> str:
        """What the sliders' column copies."""
        self.driver.execute_cdp_cmd(
            "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
        )
        self.all(button)[-1].click()
        until(lambda: self.statuses()[-1] == "copied")
        return self.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")

    def slide(self, name: str, strength: float) -> None:
        """Move a slider by the keyboard, whose step is 0.05."""
        slider = self.one(f"[type=range][aria-label='Strength of {name}']")
        steps = round((strength - float(slider.get_attribute("value"))) / 0.05)
        slider.send_keys(("\ue014" if steps > 0 else "\ue012") * abs(steps))  # arrow right, arrow left

    def complaints(self) -> list[str]:
        """What the console says, but for answers that are errors by intent."""
        told = [entry["message"] for entry in self.driver.get_log("browser")]
        return [line for line in told if "status of 400" not in line]


@pytest.fixture
def page(driver: Any, site: str) -> Iterator[Page]:
    page = Page(driver, site)
    yield page
    assert not page.complaints()


def shell(runs: Path, line: str) -> str:
    """What a command line prints."""
    done = subprocess.run(["sh", "-c", line], cwd=runs, env=clean_environment(), capture_output=True, check=False)
    assert not done.returncode, done.stderr
    return done.stdout.decode()


def test_a_text_follows_its_prompt_and_the_sliders(page: Page) -> None:
    page.one("#prompt").send_keys("The ")  # live: nothing else is pressed
    until(lambda: any(page.statuses()))
    first = page.texts()
    assert list(first) == [BASE, HTML] and all(first.values()) and first[BASE] != first[HTML]
    assert page.all(".text:last-child mark") and not page.all(".text:first-child mark")
    page.one("#marks").click()
    assert not page.all("mark")
    page.slide(HTML, 0.5)
    until(lambda: f"{HTML} × 0.5" in page.texts())
    second = page.texts()
    assert second[BASE] == first[BASE] and second[f"{HTML} × 0.5"] not in first.values()
    page.slide(WEATHER, 0.25)
    until(lambda: f"{HTML} × 0.5 + {WEATHER} × 0.25" in page.texts())
    assert page.one("#temperature").get_attribute("placeholder") == "0.3"  # of what was tuned on instructions
    page.slide(WEATHER, 0)
    page.slide(HTML, 1)
    until(lambda: HTML in page.texts())
    assert page.texts() == first  # the same seed
    page.one("#dice").click()
    until(lambda: page.texts() != first)
    for box in page.all("#beside input:not(:checked)"):
        box.click()
    assert list(until(lambda: (t := page.texts()) and WEATHER in t and t)) == [BASE, WEATHER, HTML]


def test_the_command_and_the_curl_line_give_the_same_text(page: Page, runs: Path) -> None:
    page.fill("#max_tokens", "25")
    page.fill("#top_k", "50")
    page.slide(HTML, 0.85)
    text = page.make(PROMPT)[f"{HTML} × 0.85"]
    assert text and shell(runs, page.copied(".copy-command")) == f"{PROMPT}{text}\n"
    (choice,) = json.loads(shell(runs, page.copied(".copy-curl").replace("curl ", "curl -s ", 1)))["choices"]
    assert choice["text"] == text == page.copied(".copy-text")


def test_a_chat_goes_on_is_taken_back_and_has_a_command(page: Page, runs: Path) -> None:
    page.one("[value=chat]").click()
    page.slide(HTML, 0)
    page.slide(WEATHER, 1)
    page.fill("#max_tokens", "20")
    page.one("#beside input").click()  # the base has no template
    page.one("#prompt").send_keys("Hot?\n")
    until(lambda: any(page.statuses()))
    first = page.texts()[WEATHER]
    page.fill("#prompt", f"And {EVIL} \N{SNOWMAN}?")
    page.one("#make").click()
    until(lambda: len(page.all("#turns li")) == 3)
    second = page.texts()[WEATHER]
    told = [element.get_attribute("textContent") for element in page.all("#turns li")]
    assert first and told == ["Hot?", first, f"And {EVIL} \N{SNOWMAN}?"]
    line = json.loads(shell(runs, page.copied(".copy-command")))
    assert line["text"] == second and line["messages"][2]["content"] == told[2]
    page.one("#back").click()
    assert page.one("#prompt").get_attribute("value") == told[2]
    until(lambda: page.texts()[WEATHER] == first)


def test_what_is_written_is_text_and_never_markup(page: Page) -> None:
    text = page.make(EVIL)[HTML]
    assert "<b>" in text, text
    assert not page.all("#texts b, img") and "evil" not in page.driver.title


def test_what_is_refused_is_one_line(page: Page) -> None:
    page.make("word\n" * 500)
    assert page.statuses()[-1].startswith("the prompt has ") and page.statuses()[-1].endswith("the model sees 128")
    page.fill("#top_p", "0")
    page.make("a")
    assert page.statuses()[-1] == "top_p must be a number above 0, at most 1"
    page.fill("#top_p", "")
    page.fill("#seed", "-1")
    page.one("#make").click()
    assert page.one("#wrong").text.startswith("Seed: ") and page.one("#seed[aria-invalid=true]")
    page.fill("#seed", "1")
    assert all(page.make("a").values()) and not page.one("#wrong").text


def test_a_slow_text_tells_how_far_it_is_and_can_be_stopped(page: Page, site: str) -> None:
    page.fill("#max_tokens", LONG)
    page.fill("#prompt", "a")
    for stop in (page.one("#stop").click, lambda: page.one("#prompt").send_keys("\ue00c")):  # Escape
        until(page.one("#make").is_enabled)
        page.one("#make").click()
        until(lambda: all(int(bar.get_property("value")) > 30 for bar in page.all("progress")))
        until(lambda: f"/ {LONG}" in page.all(".count")[0].text)
        stop()
        assert page.statuses() == ["stopped", "stopped"] and all(page.texts().values())
        health = "fetch('/health').then((a) => a.json()).then(arguments[0])"
        until(lambda: page.driver.execute_async_script(health)["made"] == 0)  # noqa: B023


def test_the_page_is_for_narrow_windows_and_screen_readers(page: Page) -> None:
    try:
        resize(page.driver, 375, 800)
        page.driver.refresh()
        until(lambda: page.all(".text"))
        page.one("summary").click()
        for prompt in ("a", "a" * 600, "a\n" * 40):
            page.make(prompt)
            wide = page.driver.execute_script("return document.documentElement.scrollWidth")
            assert wide == 375
        for mode in ("text", "chat"):
            page.one(f"[value={mode}]").click()
            shown = [element for element in page.all("input, button, textarea") if element.is_displayed()]
            assert len(shown) > 15 and all(element.accessible_name for element in shown)
    finally:
        resize(page.driver, 1400, 900)


def test_a_server_that_goes_away_is_told_and_its_return_too(
    driver: Any, runs: Path, site: str, server: tuple[str, subprocess.Popen]
) -> None:
    page, port = Page(driver, site), site.rpartition(":")[2].removesuffix("/")
    before = page.make("The ")
    server[1].kill()  # so this is the last test of the file
    until(lambda: "The server does not answer" in page.one("#server").text)
    page.fill("#seed", "5")
    until(lambda: page.statuses() == ["the server does not answer"] * 2)
    server[1].wait()
    flags = ("--no-open", "--port", port)
    with serving(runs, *flags, command="playground.py", SERVE_API_KEY="sesame"):  # and now it has a key
        until(page.one("#secret").is_displayed)
        page.one("#secret").send_keys("wrong\n")
        until(lambda: page.one("#key-wrong").text == "This is not its key.")
        page.one("#secret").send_keys("sesame\n")
        until(lambda: page.statuses() == ["at max tokens"] * 2)
        assert page.texts().keys() == before.keys() and page.texts() != before
        assert not page.one("#server").text and "sesame" not in page.driver.page_source
        assert driver.execute_script("return [localStorage.length, sessionStorage.length, document.cookie]") == [
            0,
            0,
            "",
        ]
