"""A real browser without a window: the system's chromium, led by selenium; tests are skipped where it is not there."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def found() -> tuple[str, str]:
    """The paths of chromium and its driver. Skips where they or selenium are not there."""
    pytest.importorskip("selenium", reason="selenium is in requirements-browser.txt; make browser-tests installs it")
    browser = next(filter(None, map(shutil.which, CHROMIUM)), None)
    driver = shutil.which("chromedriver")
    if not (browser and driver):
        pytest.skip("there is no chromium with its chromedriver; on Debian: apt-get install chromium chromium-driver")
    return browser, driver


@contextmanager
def chromium() -> Iterator[Any]:
    """A selenium driver, 1,400 pixels wide, with what the pages say on the console."""
    browser, driver = found()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    page = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield page
    finally:
        page.quit()


def resize(page: Any, width: int, height: int) -> None:
    """What the page sees as its window, which may be narrower than chromium's own can be."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """What the condition gives as soon as it holds. Fails where it does not in time."""
    late = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < late, "it took too long"
        time.sleep(0.03)
    return found
