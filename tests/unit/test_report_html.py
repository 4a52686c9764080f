"""The HTML report: one file, escaped, and it says what happened."""

from __future__ import annotations

import html.parser
import re

import pytest

from sdopt.bench.render import encode_picture, render_html, shorten
from sdopt.bench.report import Conditions, Status
from sdopt.bench.summary import describe_result, format_bytes, format_ns
from sdopt.fidelity.metrics import to_picture
from tests.planted_reports import (
    make_candidate,
    make_drawing,
    make_fidelity,
    make_gpu_processes,
    make_report,
    make_result,
)

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}'
RTL = "عصا كبيرة حمراء على خلفية زرقاء"


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; fails where an element is closed that is not open."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page() -> str:
    return render_html(make_result(make_report()))


def test_the_page_stands_alone(page: str) -> None:
    parsed = Page(page)
    assert not parsed.all("script")
    assert not parsed.all("link")
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "xlink:href", "action"):
            value = attributes.get(name) or "#"
            assert value.startswith(("data:image/webp;base64,", "#")), (tag, name, value)
    assert "default-src 'none'" in page
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    assert len(page) < 5_000_000


def test_the_page_is_the_same_each_time(page: str) -> None:
    assert render_html(make_result(make_report())) == page


def test_ids_are_unique_and_every_reference_is_met(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for reference in re.findall(r'(?:href="#|url\(#|aria-labelledby=")([^")]+)', page):
        assert reference in ids


def test_it_can_be_read_aloud(page: str) -> None:
    parsed = Page(page)
    assert parsed.all("html")[0]["lang"] == "en"
    assert len(parsed.all("caption")) == len(parsed.all("table"))
    assert all(th.get("scope") in ("col", "row") for th in parsed.all("th"))
    assert all(image.get("alt") for image in parsed.all("img"))
    assert all(svg.get("aria-label") and svg.get("role") == "img" for svg in parsed.all("svg"))
    assert parsed.all("svg")
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_the_summary_comes_first(page: str) -> None:
    text = Page(page).text
    summary = "OpenVINO bf16 draws a picture in 102 ms: 2.43 times as fast as torch eager-fp32."
    assert summary in text
    assert text.index(summary) < text.index("Median")
    assert "The pictures agree with those of torch fp32 (PSNR 45.0 dB or better, SSIM 0.985 or better)." in text


def test_the_memory_of_a_gpu_is_shown_where_it_was_measured(page: str) -> None:
    assert "GPU memory" not in page
    report = make_report(processes=make_gpu_processes())
    on_gpu = render_html(make_result(report))
    test_it_can_be_read_aloud(on_gpu)
    test_ids_are_unique_and_every_reference_is_met(on_gpu)
    rows = [" ".join(Page(row).text.split()) for row in re.findall(r"<tr.*?</tr>", on_gpu, re.S)]
    assert "OpenVINO bf16text encoder 250 MB90 MB1.00 MB" in rows
    assert "OpenVINO bf16unet 1.70 GB600 MB2.00 MB" in rows
    assert any(row.startswith("OpenVINO bf16") and "3.10 GB700 MB" in row for row in rows)
    # Weights and buffers of both, and the larger scratch memory, which they share.
    assert describe_result(report).endswith(
        " On the GPU its engines hold 2.55 GB: 1.95 GB of weights, 600 MB of activations and 3.00 MB of inputs and "
        "outputs; the process held 3.10 GB at its peak."
    )


def test_prompts_are_escaped_and_shortened() -> None:
    prompts = (EVIL, RTL, "very " * 2000 + "long", "")
    page = render_html(make_result(make_report(prompts)))
    parsed = Page(page)
    assert not parsed.all("script")
    assert "<img src=x" not in page
    assert "{{ 7 * 7 }}" in parsed.text
    titles = [bdi["title"] for bdi in parsed.all("bdi") if bdi.get("title")]
    assert titles == [prompts[2]]
    assert "very " * 100 not in parsed.text
    assert RTL in parsed.text
    assert all(bdi.get("dir") == "auto" for bdi in parsed.all("bdi")[1:])
    assert "(an empty prompt)" in parsed.text


def test_names_and_messages_are_escaped() -> None:
    report = make_report(("a",), status=Status.FAILED, message=EVIL, processes=(), fidelity=())
    report = report.model_copy(update={"case": report.case.model_copy(update={"bundle": EVIL})})
    parsed = Page(render_html(make_result(report)))
    assert not parsed.all("script")
    assert parsed.text.count("alert(1)") >= 3


def test_a_failure_is_a_row() -> None:
    failed = make_candidate(
        "compile", (), ("a",), status=Status.SKIPPED, message="no C++ compiler", processes=(), fidelity=()
    )
    parsed = Page(render_html(make_result(make_report(("a",), failed))))
    assert "torch compile" in parsed.text
    assert "no C++ compiler" in parsed.text


def test_nothing_measured_still_renders() -> None:
    lost = {"status": Status.FAILED, "message": "crashed", "processes": (), "fidelity": ()}
    report = make_report(("a",), **lost)
    report = report.model_copy(update={"candidates": report.candidates[:1]})
    page = render_html(make_result(report))
    assert "The engines (OpenVINO bf16) failed: crashed" in Page(page).text
    assert "<svg" not in page


def test_nan_is_named_under_the_picture() -> None:
    result = make_result(make_report())
    result.drawings["engines"].images[:] = float("nan")
    assert "This picture has NaN or Inf in it." in Page(render_html(result)).text


def test_many_prompts_stay_small_and_are_counted() -> None:
    page = render_html(make_result(make_report(tuple(f"prompt {i}" for i in range(9)))))
    assert "3 more prompts were drawn and compared" in page
    assert len(page) < 5_000_000


def test_sentences_of_other_results() -> None:
    differ = make_report(fidelity=make_fidelity(("a red circle", "a star"), 9.0))
    assert "The pictures differ from those of torch fp32 (PSNR 9.0 dB" in describe_result(differ)
    heard = make_candidate("eager-bf16", (150, 160), (), fidelity=make_fidelity(("a red circle", "a star"), 30.0))
    assert "The pictures agree" in describe_result(
        make_report(("a red circle", "a star"), heard, fidelity=heard.fidelity)
    )
    shared = make_report()
    busy = shared.machine.model_copy(update={"conditions": Conditions(neighbours_cores=1.3)})
    shared = shared.model_copy(update={"machine": busy})
    assert "kept 1.3 of 2 cores busy" in describe_result(shared)
    unknown = make_report(fidelity=())
    assert "were not compared" in describe_result(unknown)
    slower = make_report(processes=make_candidate("x", (480, 500, 490, 520), ()).processes)
    assert "0.50 times as fast as" in describe_result(slower)
    alike = make_report(processes=make_candidate("x", (240, 250, 246, 261), ()).processes)
    assert "no faster or slower than torch eager-fp32" in describe_result(alike)


def test_large_pictures_are_made_smaller() -> None:
    small = encode_picture(to_picture(make_drawing(1).images[0]))
    assert small.startswith("data:image/webp;base64,")
    large = encode_picture(to_picture(make_drawing(1).images[0]).repeat(32, axis=0).repeat(32, axis=1))
    assert len(large) < 200_000


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (999, "999 ns"),
        (1500, "1.50 µs"),
        (12_300_000, "12.3 ms"),
        (412_000_000, "412 ms"),
        (61e9, "61.0 s"),
    ],
)
def test_times_have_three_digits(value: float | None, text: str) -> None:
    assert format_ns(value) == text


def test_bytes_are_decimal() -> None:
    assert [format_bytes(v) for v in (None, 12, 1500, 512e6, 1.74e9)] == ["-", "12 B", "1.50 kB", "512 MB", "1.74 GB"]


def test_shorten_keeps_the_limit() -> None:
    assert len(shorten("x" * 500)) == 160
    assert shorten("short") == "short"
