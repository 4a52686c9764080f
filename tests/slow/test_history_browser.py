"""The page of a history in a real browser: it fits a phone and a desk, in both colour schemes, and runs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sdopt.perf.page.page import write_history_page
from tests.browser import NAMES, Browser, find_browser, open_browser
from tests.unit.test_perf_page import make_view


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip(f"no browser is installed ({', '.join(NAMES)}): apt-get install chromium")
    with open_browser(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_history_page(tmp_path_factory.mktemp("history"), make_view())[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width_px", [1280, 390])
def test_it_fits_the_window_and_asks_for_nothing(browser: Browser, page: Path, width_px: int, scheme: str) -> None:
    browser.open(page, width_px, scheme=scheme)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width_px
    assert browser.methods("Log.entryAdded") == browser.methods("Runtime.exceptionThrown") == []
    assert [request["request"]["url"] for request in browser.methods("Network.requestWillBeSent")] == [page.as_uri()]
    assert browser.evaluate(
        "[...document.querySelectorAll('svg')].every(svg => svg.getBoundingClientRect().width > 250)"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_marks_have_the_colours_of_the_page(browser: Browser, page: Path, scheme: str) -> None:
    """No colour that matplotlib wrote as a placeholder is left, and the line stands out from its ground."""
    browser.open(page, 1280, scheme=scheme)
    colours = browser.evaluate(
        "[...document.querySelectorAll('svg path, svg use')].map(path => getComputedStyle(path).stroke)"
    )
    assert colours
    assert not any("10, 11" in colour for colour in colours)
    line = {"light": "rgb(31, 111, 196)", "dark": "rgb(90, 162, 238)"}[scheme]
    assert line in colours
