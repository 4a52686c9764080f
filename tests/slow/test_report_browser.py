"""The report in a real browser: it fits the window, asks for nothing from outside, can be read by keyboard and aloud,
and runs nothing that a prompt brings along.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sdopt.bench.case.report import BenchReport
from sdopt.bench.page.render import IndexEntry
from sdopt.bench.page.report_files import write_index, write_report_files
from tests.browser import NAMES, Browser, find_browser, open_browser
from tests.planted_reports import make_full_report, make_gpu_processes, make_report, make_result, make_unet_report

EVIL = (
    '"><script>document.title = "ran"</script><img src=x onerror="document.title = 1">',
    "عصا كبيرة حمراء على خلفية زرقاء \N{RIGHT-TO-LEFT OVERRIDE}abc",
    "x" * 10_000,
    "word " * 2_000,
)
WIDTHS_PX = (1280, 390)


def make_evil_report() -> BenchReport:
    """Prompts, names, messages and commands as nobody would write them who means well."""
    report = make_full_report(EVIL)
    failed = report.candidates[-1].model_copy(update={"label": EVIL[0], "message": EVIL[2]})
    named = report.candidates[0].model_copy(update={"label": EVIL[2]})
    return report.model_copy(
        update={
            "case": report.case.model_copy(update={"bundle": EVIL[0] + EVIL[2]}),
            "candidates": (named, *report.candidates[1:-1], failed),
            "method": report.method.model_copy(update={"command": f"sdopt bench {EVIL[3]}", "suite": EVIL[0]}),
            "audits": {EVIL[0]: report.audits["engines"]},
        }
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip(f"no browser is installed ({', '.join(NAMES)}): apt-get install chromium")
    with open_browser(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    reports = {
        "full": make_full_report(), "plain": make_report(), "gpu": make_report(processes=make_gpu_processes()),
        "unet": make_unet_report(), "evil": make_evil_report(),
    }  # fmt: skip
    pages = {}
    for name, report in reports.items():
        (folder / name).mkdir()
        pages[name] = write_report_files(folder / name, make_result(report))
    entries = [IndexEntry(name, f"{name}/report.html", report) for name, report in reports.items()]
    return {**pages, "index": write_index(folder, "All runs", entries)}


NAMES_OF_PAGES = ("full", "plain", "gpu", "unet", "evil", "index")


@pytest.mark.parametrize("width_px", WIDTHS_PX)
@pytest.mark.parametrize("name", NAMES_OF_PAGES)
def test_nothing_is_wider_than_the_window(browser: Browser, pages: dict[str, Path], name: str, width_px: int) -> None:
    browser.open(pages[name], width_px)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width_px
    # Only what scrolls by itself may be wider than the window.
    wide = browser.evaluate(
        """[...document.querySelectorAll('body *')].filter(each =>
             each.getBoundingClientRect().right > innerWidth + 1 && !each.closest('.scroll, pre, .skip'))
           .map(each => each.tagName + ' ' + each.className)"""
    )
    assert wide == []


@pytest.mark.parametrize("name", NAMES_OF_PAGES)
def test_the_page_asks_for_nothing_and_complains_of_nothing(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    browser.open(pages[name], 1280)
    asked = {request["request"]["url"].split(",")[0] for request in browser.methods("Network.requestWillBeSent")}
    assert asked - {"data:image/webp;base64"} == {pages[name].as_uri()}
    entries = browser.methods("Log.entryAdded") + browser.methods("Runtime.consoleAPICalled")
    assert entries + browser.methods("Runtime.exceptionThrown") == []


@pytest.mark.parametrize("name", ["full", "evil"])
def test_every_picture_is_seen(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name], 1280)
    images = browser.evaluate("[...document.images].map(each => [each.complete, each.naturalWidth, each.alt.length])")
    assert len(images) >= 14
    assert all(complete and width > 0 and alt > 0 for complete, width, alt in images)


def test_long_names_do_not_bury_the_report(browser: Browser, pages: dict[str, Path]) -> None:
    heights = []
    for name in ("full", "evil"):
        browser.open(pages[name], 390)
        heights.append(browser.evaluate("document.documentElement.scrollHeight"))
    # It has twice the prompts, and a message of 1,200 characters.
    assert heights[1] < 2.5 * heights[0]


def test_no_prompt_runs(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["evil"], 1280)
    assert browser.evaluate("document.title").startswith("sdopt bench: ")
    assert browser.evaluate("document.querySelectorAll('script, [onerror]').length") == 0


def test_the_policy_forbids_scripts_of_the_page(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    """A planted fault: the same page with a script in it does not run it, and says so."""
    page = tmp_path / "planted.html"
    text = pages["plain"].read_text("utf-8")
    page.write_text(text.replace("</main>", "<script>document.title = 'ran'</script></main>"), "utf-8")
    browser.open(page, 1280)
    assert browser.evaluate("document.title") != "ran"
    assert "Content Security Policy" in str(browser.methods("Log.entryAdded"))


def test_an_overflow_is_noticed(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "planted.html"
    text = pages["plain"].read_text("utf-8")
    page.write_text(text.replace("</main>", '<div style="width: 2000px">wide</div></main>'), "utf-8")
    browser.open(page, 390)
    assert browser.evaluate("document.documentElement.scrollWidth") > 390


def test_the_dark_scheme_has_colours_of_its_own(browser: Browser, pages: dict[str, Path]) -> None:
    script = """[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
                 getComputedStyle(document.querySelector('svg text')).fill]"""
    browser.open(pages["full"], 1280)
    assert browser.evaluate(script) == ["rgb(250, 250, 248)", "rgb(27, 30, 35)", "rgb(27, 30, 35)"]
    browser.set_scheme("dark")
    assert browser.evaluate(script) == ["rgb(20, 22, 26)", "rgb(232, 234, 238)", "rgb(232, 234, 238)"]


def test_tab_reaches_every_region_that_scrolls(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["full"], 390)
    # A table within closed details is reached when they are open.
    browser.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    expected = browser.evaluate("document.querySelectorAll('.scroll, pre').length")
    assert expected >= 12
    reached, first = set(), ""
    for place in range(expected + 40):
        browser.press("Tab", 9)
        name = browser.evaluate(
            """(() => { const each = document.activeElement;
                 return each.matches('.scroll, pre') ? each.getAttribute('aria-label') : each.textContent.trim() })()"""
        )
        first = first or (name if place == 0 else "")
        reached.add(name)
    names = browser.evaluate("[...document.querySelectorAll('.scroll, pre')].map(e => e.getAttribute('aria-label'))")
    assert len(set(names)) == expected
    assert set(names) <= reached
    assert first == "Skip to the results"


def test_arrow_keys_scroll_a_wide_table(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["full"], 390)
    browser.evaluate("document.querySelector('.scroll').focus()")
    browser.press("ArrowRight", 39)
    browser.evaluate("new Promise(done => setTimeout(done, 500))")
    assert browser.evaluate("document.querySelector('.scroll').scrollLeft") > 0


@pytest.mark.parametrize("name", ["full", "gpu", "unet"])
def test_a_screen_reader_has_a_name_for_everything(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name], 1280)
    browser.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    by_role: dict[str, list[str]] = {}
    for node in nodes:
        if not node["ignored"]:
            role = node.get("role", {}).get("value", "")
            by_role.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    for role in ("table", "image", "region", "heading", "link", "navigation"):
        assert by_role.get(role), role
        assert all(by_role[role]), role
    assert len(by_role["table"]) == browser.evaluate("document.querySelectorAll('table').length")
    assert len(by_role["main"]) == 1


@pytest.mark.parametrize("width_px", WIDTHS_PX)
def test_text_of_the_plots_is_not_cut(browser: Browser, pages: dict[str, Path], width_px: int) -> None:
    browser.open(pages["full"], width_px)
    cut = browser.evaluate(
        """[...document.querySelectorAll('svg')].flatMap(svg => {
             const frame = svg.getBoundingClientRect();
             return [...svg.querySelectorAll('text')].filter(text => {
               const box = text.getBoundingClientRect();
               return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1;
             }).map(text => text.textContent) })"""
    )
    assert cut == []
    smallest_px = browser.evaluate(
        "Math.min(...[...document.querySelectorAll('svg text')].map(each => each.getBoundingClientRect().height))"
    )
    assert smallest_px >= 9


def test_the_links_of_the_index_lead_to_the_reports(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["index"], 1280)
    links = browser.evaluate("[...document.querySelectorAll('main a')].map(each => each.href)")
    assert links == [pages[name].as_uri() for name in NAMES_OF_PAGES if name != "index"]
