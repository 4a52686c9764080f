"""The page of a history: one file, escaped, whose lines break where an environment changes."""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path

import pytest

from sdopt.perf.history.history import DamagedLine, HistoryContents
from sdopt.perf.history.record import FailureRecord, Metric, RunKind
from sdopt.perf.history.view import HistoryView, view_history
from sdopt.perf.page.page import (
    COLUMNS,
    PAGE_NAME,
    describe_history,
    format_csv,
    format_history,
    list_breaks,
    make_row,
    render_history,
    write_history_page,
)
from tests.planted_runs import NEWER_ENVIRONMENT, make_key, make_nights, make_run
from tests.unit.test_report_html import Page

EVIL = '"><script>alert(1)</script>{{ 7 * 7 }}'
RTL = "عصا كبيرة"
KEY = make_key()
VALUES = {KEY: 1e8, make_key(Metric.PSNR): ((45.0, 47.0),), make_key(Metric.PSNR, "eager"): ((math.inf,),)}


def make_view() -> HistoryView:
    failure = FailureRecord(case="tiny", candidate="compile", message=EVIL)
    records = [
        *make_nights(5, VALUES),
        make_run(5, VALUES, dirty=(EVIL,), verdict=""),
        make_run(6, VALUES, environment=NEWER_ENVIRONMENT, kind=RunKind.BRIDGE, verdict=""),
        make_run(7, VALUES | {KEY: 1.1e8, make_key(case=EVIL, candidate=RTL): 2e6}, environment=NEWER_ENVIRONMENT,
                 verdict="alarm", changed=True, failures=(failure,)),
    ]  # fmt: skip
    return view_history(HistoryContents(tuple(records), (DamagedLine(4, EVIL),)))


@pytest.fixture(scope="module")
def page() -> str:
    return render_history(make_view())


def test_it_is_one_file_without_scripts_and_everything_is_escaped(page: str) -> None:
    read = Page(page)
    assert read.all("script") == read.all("link") == read.all("iframe") == []
    assert "default-src 'none'" in page
    assert not re.search(r"(?:src|href)=[\"'](?!#)", page)
    assert "{{ 7 * 7 }}" in read.text
    assert "<script" not in page
    assert RTL in read.text


def test_tables_and_drawings_can_be_read_aloud(page: str) -> None:
    read = Page(page)
    assert len(read.all("caption")) == len(read.all("table")) == 3
    drawings = read.all("svg")
    assert len(drawings) == 3, "equal pictures have no number to draw"
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in drawings)
    assert any("110 ms in the run of 2026-01-08" in (svg["aria-label"] or "") for svg in drawings)
    ids = [values["id"] for _, values in read.tags if "id" in values]
    assert len(ids) == len(set(ids))


def test_what_happened_is_said(page: str) -> None:
    text = Page(page).text
    for words in (
        "The last run alarmed. 8 runs from 2026-01-01 to 2026-01-08 of 4 series in 2 environments: 1 alarmed, 1 was",
        "1 line of the history is not a run and was passed over",
        "torch 2.12 -> 2.13",
        "a bridge run",
        "with uncommitted changes",
        "tiny/compile failed:",
    ):
        assert words in text
    assert "not in the last run" not in text


def count_lines(page: str, title: str) -> int:
    """The drawn lines of the values in the plot whose title begins so: matplotlib's `line2d` outside of the axes."""
    svg = next(svg for svg in re.findall(r"<svg.*?</svg>", page, re.S) if title in svg)
    body = svg[svg.index("LineCollection") :]
    return len(re.findall(r'<path d="M[^"]*"[^>]*stroke: var\(--s1\); stroke-width: 1\.2[^>]*linecap: square', body))


def test_the_line_breaks_at_a_new_environment() -> None:
    whole = render_history(view_history(HistoryContents(tuple(make_nights(6, {KEY: 1e8})))))
    broken = render_history(
        view_history(
            HistoryContents(
                (*make_nights(3, {KEY: 1e8}), *make_nights(3, {KEY: 1e8}, first=3, environment=NEWER_ENVIRONMENT))
            )
        )
    )
    assert count_lines(whole, "engines, end to end") == 1
    assert count_lines(broken, "engines, end to end") == 2
    assert "What changed" not in whole.split('id="environments"')[1]


def test_a_series_is_held_against_its_own_environment() -> None:
    records = (*make_nights(9, {KEY: 1e8}), *make_nights(3, {KEY: 2e8}, first=9, environment=NEWER_ENVIRONMENT))
    row = make_row(view_history(HistoryContents(records)), KEY)
    assert (row.last, row.usual, row.change, row.count, row.is_old) == ("200 ms", "200 ms", "+0.0%", 12, False)
    alone = make_row(view_history(HistoryContents(records[:10])), KEY)
    assert (alone.usual, alone.change) == ("", "")
    lost = view_history(HistoryContents((*records, make_run(12, {make_key(Metric.LOAD): 1e9}))))
    assert make_row(lost, KEY).is_old
    assert "not in the last run" in Page(render_history(lost)).text


def test_every_new_environment_has_its_own_letter() -> None:
    digests = [f"{i:064x}" for i in range(30)]
    records = tuple(make_run(i, {KEY: 1e8}, suite_digest=digest) for i, digest in enumerate(digests))
    breaks = list_breaks(view_history(HistoryContents(records)))
    letters = [found.letter for found in breaks.values()]
    assert letters[:2] == ["a", "b"]
    assert letters[25:] == ["z", "aa", "ab", "ac"]


def test_the_csv_has_every_point_and_no_formula() -> None:
    view = make_view()
    rows = list(csv.DictReader(io.StringIO(format_csv(view))))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == sum(map(len, view.points.values())) == 25
    first = next(row for row in rows if row["metric"] == "end_to_end")
    assert (first["value"], first["low"], first["high"]) == ("2000000.0", "1992000.0", "2008000.0")
    formula = view_history(HistoryContents((make_run(0, {make_key(case="=1+1"): 1e8}, dirty=("@evil",)),)))
    assert format_csv(formula).count("'=1+1") == format_csv(formula).count("'@evil") == 1


def test_the_terminal_shows_the_same() -> None:
    text = format_history(make_view())
    assert "line 4 is not a run" in text
    assert "  -- torch 2.12 -> 2.13\n20260107T030000Z-00000006  bridge" in text
    assert re.search(r"alarm  uncommitted changes$", text, re.M)
    assert re.search(r"tiny/engines/end_to_end +110 ms +100 ms +\+10\.0%", text)


def test_an_empty_history_has_a_page(tmp_path: Path) -> None:
    page, table = write_history_page(tmp_path / "new", HistoryView())
    assert page.name == PAGE_NAME
    assert "The history has no run yet." in Page(page.read_text()).text
    assert table.read_text().strip() == ",".join(COLUMNS)
    assert format_history(HistoryView()) == "The history has no run yet.\n"


def test_one_run_is_counted_as_one() -> None:
    view = view_history(HistoryContents((make_run(0, {KEY: 1e8}),)))
    assert describe_history(view) == "The last run passed. 1 run of 1 series in 1 environment: 0 alarmed, 0 were dirty."


def test_years_of_nights_stay_a_small_page() -> None:
    page = render_history(view_history(HistoryContents(tuple(make_nights(500, {KEY: 1e8})))))
    assert len(page) < 200_000
    assert "The first 100 runs are in history.csv only." in Page(page).text
    assert "400 older runs are in history.csv." in Page(page).text
