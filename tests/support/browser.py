"""Chromium without a window, where the machine has it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--window-size=1000,1200",
)


@contextmanager
def opened(address: str, profile: Path) -> Iterator[Any]:
    """A page in a browser; skips the test where there is none."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no chromium with chromedriver on this machine")
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = browser
    for each in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(each)
    page = webdriver.Chrome(options=options, service=Service(driver))
    try:
        page.get(address)
        yield page
    finally:
        page.quit()
