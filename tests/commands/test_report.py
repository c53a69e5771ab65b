"""report.py: a page that says what the runs' files say, that nothing in them breaks, and that reads well anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from html import unescape
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from jobs.adapting.adapted import open_adapters
from jobs.adapting.report import sizes
from jobs.reporting.writers.charts import labels, ticks
from report import main
from runtime.processes.command import run_command as run_in_process
from runtime.storage.encoding import to_sealed_json
from runtime.storage.lock import RunLock
from runtime.storage.runs import open_run
from runtime.training.metrics import read_metrics
from tests.commands.command_line import run as run_command
from tests.static_pages import look

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
HOSTILE = "<script>alert('x')</script> & \"ye\" <img src=http://x onerror=alert(1)>"
NAMED = "<script>alert(1)<b>"  # what a run may be called whose folder somebody has renamed
VOID = {"meta", "wbr"}


class Page(HTMLParser):
    """A page as a tree would have it: its elements with their attributes, what is in each, and how they are nested."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text("utf-8")
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[tuple[str, str]] = []  # the element, and a text in it
        self.feed(self.text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append((self.open[-1] if self.open else "", data))

    def words(self, *tags: str) -> str:
        """All that is said in these elements, or in all."""
        return " ".join(data for tag, data in self.said if tag in tags or (not tags and tag != "style"))

    def rows(self) -> list[list[str]]:
        """The rows of all tables, cell by cell."""
        found = []
        for row in re.findall(r"<tr>(.*?)</tr>", self.text, re.DOTALL):
            cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
            found.append([unescape(re.sub(r"<[^>]*>", "", cell)) for cell in cells])
        return found


@pytest.fixture(scope="module")
def here(tmp_path_factory, data_dir) -> Path:
    """Runs of an earlier version, and an adapter that was trained just now, whose folder and samples are hostile."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(FIXTURES / "runs", folder / "checkpoints")
    for text in ("text.txt", "other.txt"):
        shutil.copy(FIXTURES / text, folder)
    flags = "--use-lora --base base --dataset other.txt --max-iters 20 --eval-interval 5 --lora-rank 2 --run-name new"
    done = run_command(folder, data_dir, "training.py", *flags.split(), "--checkpoints-dir", "checkpoints")
    assert done.returncode == 0, done.stderr
    new = folder / "checkpoints" / "new"
    result = open_run(new).result
    result["samples"]["texts"][0] |= {"text": HOSTILE, "marked": ["ye"]}
    (new / "result.json").write_bytes(to_sealed_json(result))
    shutil.copytree(new, folder / "checkpoints" / NAMED)
    words = ("new", "--out", "one.html", "--md", "--png", "--checkpoints-dir", "checkpoints")
    done = run_command(folder, folder / "cache", "report.py", *words)
    assert done.returncode == 0, done.stderr
    done = report(folder, NAMED, "lora", "full", "stopped-base", "--out", "several.html", "--no-measure")
    assert done.returncode == 0, done.stderr
    return folder


def report(folder: Path, *words: str) -> CompletedProcess:
    """What `python report.py` does with these words in the folder, in this process, which has imported torch."""
    places = ("--checkpoints-dir", "checkpoints", "--data-dir", "cache")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["report.py", *words, *places])
        try:
            run_in_process(main)
            status = 0
        except SystemExit as end:
            status = end.code or 0
    return CompletedProcess(words, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def one(here) -> Page:
    return Page(here / "one.html")


@pytest.fixture(scope="module")
def several(here) -> Page:
    return Page(here / "several.html")


# --- what it says -----------------------------------------------------------------------------------------------------


def test_its_figures_are_those_of_the_runs_files(here, one):
    run = open_run(here / "checkpoints" / "new")
    result, words = run.result, one.words("dd")
    for name in ("val_loss", "base_val_loss", "bits_per_character", "best"):
        assert f"{result[name]:.4f}" in words
    assert f"{result['tokens_per_second']:,.0f}" in words and f"{result['peak_memory'] / 1e6:.1f} MB" in words
    lines = read_metrics(run.folder / "metrics.jsonl")
    losses = [[f"{line['step']}", f"{line['val_loss']:.4f}"] for line in lines if "val_loss" in line]
    assert len(losses) == 4 and all(row in one.rows() for row in losses)
    assert all(f"{path.stat().st_size:,}" in one.text for path in run.artifact.iterdir())


def test_its_curves_are_those_of_the_log(here, one):
    lines = read_metrics(here / "checkpoints" / "new" / "metrics.jsonl")
    paths = re.findall(r'<g class="line [^"]*"><path d="M([^"]*)"', one.text)
    training = [tuple(map(float, point.split())) for point in paths[0].split("L")]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(training) == len(losses) == 20
    (x0, y0), (x1, y1) = training[0], training[-1]
    scale = (y1 - y0) / (losses[-1] - losses[0])  # pixels a nat, downwards
    assert scale < 0
    for i, ((x, y), loss) in enumerate(zip(training, losses, strict=True)):
        assert y == pytest.approx(y0 + scale * (loss - losses[0]), abs=0.5)
        assert x == pytest.approx(x0 + (x1 - x0) * i / 19, abs=0.2)


def test_the_bar_of_parameters_adds_up(here, one):
    counts = open_run(here / "checkpoints" / "new").metadata["parameters"]
    told = {name: int(count.replace(",", "")) for name, count in re.findall(r"> ([a-z: ]+): ([\d,]+)[ <]", one.text)}
    parts = [counts["lora"], counts["embedding"], counts["frozen"]]
    assert list(told.values())[:4] == [*parts, sum(parts)] and sum(parts) == counts["total"]
    bar = one.text.partition('class="bar"')[2].partition("</svg>")[0]
    places = [tuple(map(float, pair)) for pair in re.findall(r'x="([\d.]+)%".*?width="([\d.]+)%"', bar)]
    assert sum(width for _, width in places) == pytest.approx(100, abs=0.01)
    for (left, width), (following, _), part in zip(places, [*places[1:], (100.0, 0)], parts, strict=True):
        assert left + width == pytest.approx(following, abs=0.01)
        assert width == pytest.approx(100 * part / sum(parts), abs=0.5)


def test_what_each_linear_learned_is_what_inspect_says(here, one):
    (adapted,) = open_adapters(here / "checkpoints", ("new",))
    found = {path.rpartition(".")[2]: f"{100 * size.relative:.0f}" for path, size in sizes(adapted).items()}
    heat = one.text.partition('class="heat"')[2].partition("</table>")[0]
    heads = re.findall(r'scope="col"><span>(\w+)', heat)
    cells = re.findall(r'<td class="h\d">([\d.]+)</td>', heat)
    assert dict(zip(heads, cells, strict=True)) == found
    assert 'class="h9"' in heat


def test_it_tells_what_was_forgotten_and_how_to_make_the_run_again(here, one):
    rows = {row[0]: row[1:] for row in one.rows()}
    own, base = rows["other.txt (the adapter's)"], rows["text.txt (the base's)"]
    assert float(own[2]) < float(base[2]) and f"On text.txt the loss fell by {base[2][1:]}." in one.words("p")
    for before, after, change in (own, base):
        assert float(after) - float(before) == pytest.approx(float(change), abs=2e-4)
    (code,) = [text for tag, text in one.said if tag == "code" and "training.py" in text]
    assert code.splitlines()[1].startswith("python training.py --use-lora --base base --dataset other.txt ")


def test_words_of_the_target_text_alone_are_marked(one):
    assert re.findall("<mark>(.*?)</mark>", one.text)[0] == "ye"


def test_several_runs_stand_side_by_side(here, several):
    rows = {row[0]: row[1:] for row in reversed(several.rows()) if row}
    assert rows["USE_LORA"] == ["True", "True", "False", "False"]
    assert rows["steps"] == ["20", "20", "20", "13"] and rows["state"] == [*["finished"] * 3, "stopped"]
    losses = [open_run(here / "checkpoints" / name).result["val_loss"] for name in ("new", "lora", "full")]
    assert rows["loss, all held out"] == [*(f"{loss:.4f}" for loss in losses), "–"]
    chart = several.text.partition("<figcaption>Validation loss")[2].partition("</figure>")[0]
    assert len(re.findall('<g class="line c[0-3]">', chart)) == 4


# --- how it is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one", "several"])
def test_a_page_needs_nothing_and_runs_nothing(here, name):
    page = Page(here / f"{name}.html")
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base", "b"}
    for _, attributes in page.elements:
        assert not attributes.keys() & {"src", "href", "srcset", "style", "action", "xlink:href"}
        assert not any(key.startswith("on") for key in attributes)
    (style,) = [text for tag, text in page.said if tag == "style"]
    assert "url(" not in style and "@import" not in style
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'")


def test_what_looks_like_html_is_text(one, several):
    assert HOSTILE.partition("ye")[0].strip('"& ') in one.words("pre")
    assert NAMED in several.words("title", "h1", "h2").replace("\u200b", "")


def test_everything_has_a_name_for_who_cannot_see_it(one, several):
    for page in (one, several):
        names = {a["id"] for _, a in page.elements if "id" in a}
        for tag, attributes in page.elements:
            if tag == "svg" and "aria-hidden" not in attributes:
                assert attributes["role"] == "img" and set(attributes["aria-labelledby"].split()) <= names
            assert tag != "th" or attributes["scope"] in ("row", "col")
        assert page.text.count("<table") == page.text.count("<caption>")
        levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(b <= a + 1 or b == 4 for a, b in zip(levels, levels[1:], strict=False))


def test_markdown_and_pictures_stand_beside_the_page(here):
    told = (here / "one.md").read_text("utf-8")
    assert told.startswith("# new\n") and "![new: one-curves.png](<one-curves.png>)" in told
    assert f"```text\n{HOSTILE}\n```" in told
    for name in ("one-curves.png", "one-changes.png"):
        assert (here / name).read_bytes().startswith(b"\x89PNG")


# --- what can be wrong ------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_says_so_and_nothing_is_overwritten(here):
    with RunLock(here / "checkpoints" / "stopped-base"):
        first = report(here, "stopped-base", "--no-measure")
    second = report(here, "stopped-base", "--no-measure")
    assert (first.stdout, second.stdout) == (
        "Report: stopped-base-report.html\n",
        "Report: stopped-base-report-2.html\n",
    )
    assert "It is still training: 13 of 20 steps" in (here / "stopped-base-report.html").read_text("utf-8")
    assert "It was stopped after 13 of 20 steps" in (here / "stopped-base-report-2.html").read_text("utf-8")
    before = (here / "one.html").read_bytes()
    refused = report(here, "base", "--out", "one.html")
    assert refused.returncode == 2 and "one.html is there already" in refused.stderr
    assert (here / "one.html").read_bytes() == before


def test_what_is_wrong_is_one_plain_line(here):
    begun = here / "checkpoints" / "begun"
    begun.mkdir()
    shutil.copy(here / "checkpoints" / "base" / "run.json", begun)
    done = report(here, "begun")
    assert done.returncode == 1 and done.stderr.startswith("error: begun has not taken a step yet")
    assert done.stderr.count("\n") == 1
    done = report(here, "nobody")
    assert done.returncode == 2 and "there is no run 'nobody'" in done.stderr
    torn = here / "checkpoints" / "torn"
    shutil.copytree(here / "checkpoints" / "base", torn)
    line = json.dumps({"step": 7, "loss": "<b>", "lr": None, "val_loss": float("inf")})
    (torn / "metrics.jsonl").write_bytes(b'\xff\x00{"step": 3\n' + line.encode() + b'\n{"step": 8, "loss": 2.5}\n')
    done = report(here, "torn", "--no-measure", "--out", "torn.html")
    assert done.returncode == 0 and done.stderr.splitlines() == [
        "checkpoints/torn/metrics.jsonl: 1 corrupted line(s) left out"
    ]
    assert "2.5 at step 8" in (here / "torn.html").read_text("utf-8")


@pytest.mark.parametrize(
    "low, high", [(0, 1), (2.4, 2.8), (1.0, 1.0), (0, 0), (-3, 5), (1e-6, 3e-6), (0, 123_456), (0.999, 1.001), (0, 7)]
)
def test_ticks_are_few_round_and_cover_all(low, high):
    found = ticks(low, high)
    assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12 and 2 <= len(found) <= 9
    assert len(set(labels(found))) == len(found), labels(found)


# --- in a browser -----------------------------------------------------------------------------------------------------

MEASURED = """
const boxes = [...document.querySelectorAll("svg.chart")].flatMap(svg => {
  const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
  const outer = svg.getBoundingClientRect();
  const cut = texts.filter(([, b]) => b.left < outer.left - 1 || b.right > outer.right + 1);
  const over = texts.flatMap(([s, a], i) => texts.slice(i + 1).filter(([, b]) =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2).map(([t]) => s + t));
  return [...cut.map(([s]) => "cut: " + s), ...over.map(s => "over: " + s)];
});
const hidden = ".wide, svg, details:not([open]) > :not(summary)";
const wide = [...document.querySelectorAll("main *")].filter(e =>
  !e.closest(hidden) && e.getBoundingClientRect().right > window.innerWidth).map(e => e.tagName);
const root = document.documentElement;
const small = [...document.querySelectorAll("svg.chart .tick")].map(t => t.getBoundingClientRect().height);
return {width: root.clientWidth, scroll: root.scrollWidth, boxes, wide, least: Math.min(...small)};
"""


@pytest.mark.browser
@pytest.mark.parametrize("name", ["one", "several"])
def test_a_page_fits_a_phone_and_a_desk_with_no_text_over_another(here, name, tmp_path):
    found, console = look((here / f"{name}.html").read_text("utf-8"), (375, 1400), MEASURED, tmp_path)
    for measured, width in zip(found, (375, 1400), strict=True):
        assert measured["scroll"] <= measured["width"] and width - 20 <= measured["width"] <= width
        assert not measured["boxes"] and not measured["wide"], measured
        assert measured["least"] >= 10, "a tick is too small to read"
    assert not console
