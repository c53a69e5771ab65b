"""Pages without scripts in chromium, without a window: what a script measures in them, and what their console says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from tests.browser import CHROMIUM

MEASURE = """<!DOCTYPE html><meta charset="utf-8"><body>FRAMES<pre id="found"></pre><script>
const measure = (document, window) => { SCRIPT };
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(f => measure(f.contentDocument, f.contentWindow));
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


def chromium() -> str:
    """The browser; without it the test is skipped."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if not found:
        pytest.skip("no chromium on PATH, in which this page would be looked at")
    return found


def look(page: str, widths: Sequence[int], script: str, folder: Path) -> tuple[list[Any], list[str]]:
    """What the script returns at each width, and the lines of the console.

    page: HTML as text. script: the body of a JavaScript function of the page's `document` and `window`. folder: an
    empty one.
    """
    frames = "".join(
        f'<iframe srcdoc="{escape(page)}" style="width:{w}px;height:900px;border:0"></iframe>' for w in widths
    )
    outer = folder / "measure.html"
    outer.write_text(MEASURE.replace("FRAMES", frames).replace("SCRIPT", script), "utf-8")
    flags = ["--headless", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--window-size=1600,2000"]
    flags += ["--no-sandbox"] if os.geteuid() == 0 else []  # which root must do without
    done = subprocess.run([chromium(), *flags, outer.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1])), re.findall(r".*CONSOLE.*", done.stderr)
