"""The HTML report: one file, escaped, and it says what happened."""

from __future__ import annotations

import html.parser
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from sdopt.bench.case.report import Conditions, Status
from sdopt.bench.page.pictures import encode_picture
from sdopt.bench.page.render import IndexEntry, render_html, render_index
from sdopt.bench.page.stage_plots import plot_cosines
from sdopt.bench.page.summary import (
    describe_result,
    format_bytes,
    format_ns,
    format_share,
    shorten,
    summarize_candidates,
)
from sdopt.fidelity.metrics import to_picture
from sdopt.model.precision import Precision
from tests.planted_reports import (
    make_candidate,
    make_drawing,
    make_fidelity,
    make_full_report,
    make_gpu_processes,
    make_report,
    make_result,
    make_unet_report,
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


def read_rows(page: str) -> list[str]:
    """The words of each row of each table, with one blank between; x for the sign of multiplication."""
    apart = page.replace("</t", " </t").replace("<small", " <small").replace("\N{MULTIPLICATION SIGN}", "x")
    return [" ".join(Page(row).text.split()) for row in re.findall(r"<tr.*?</tr>", apart, re.S)]


@pytest.fixture(scope="module")
def page() -> str:
    return render_html(make_result(make_full_report()))


@pytest.fixture(scope="module")
def plain() -> str:
    """Of a report from before conditions, sweeps, energy and the other fields of schema 4."""
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
    assert render_html(make_result(make_full_report())) == page


def test_ids_are_unique_and_every_reference_is_met(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for reference in re.findall(r'(?:href="#|url\(#|aria-labelledby=")([^")]+)', page):
        assert reference in ids


def test_it_can_be_read_aloud(page: str) -> None:
    parsed = Page(page)
    assert parsed.all("html")[0]["lang"] == "en"
    assert len(parsed.all("caption")) == len(parsed.all("table"))
    assert all(th.get("scope") in ("col", "row", "rowgroup") for th in parsed.all("th"))
    assert all(image.get("alt") for image in parsed.all("img"))
    assert all(svg.get("aria-label") and svg.get("role") == "img" for svg in parsed.all("svg"))
    assert parsed.all("svg")
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_the_summary_comes_first(page: str) -> None:
    text = Page(page).text
    summary = (
        "OpenVINO bf16 draws a picture in 102 ms: faster than torch eager fp32 (2.42 times as fast), torch eager bf16 "
        "(2.43 times as fast) and torch.compile fp32, max-autotune, channels last (1.38 times as fast). optimum, ONNX "
        "Runtime fp32 failed."
    )
    assert summary in text
    assert text.index(summary) < text.index("Median")
    assert "The pictures agree with those of torch fp32 (PSNR 45.0 dB or better, SSIM 0.985 or better)." in text


def test_the_memory_of_a_gpu_is_shown_where_it_was_measured(page: str) -> None:
    assert "GPU memory" not in page
    report = make_report(processes=make_gpu_processes())
    on_gpu = render_html(make_result(report))
    test_it_can_be_read_aloud(on_gpu)
    test_ids_are_unique_and_every_reference_is_met(on_gpu)
    rows = read_rows(on_gpu)
    assert "OpenVINO bf16 text encoder 250 MB 90 MB 1.00 MB" in rows
    assert "OpenVINO bf16 unet 1.70 GB 600 MB 2.00 MB" in rows
    assert any(row.startswith("OpenVINO bf16") and "3.10 GB 700 MB" in row for row in rows)
    assert "weights, activations, inputs and outputs, and the rest" in on_gpu
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
    assert titles == [prompts[2][:1999] + "\N{HORIZONTAL ELLIPSIS}"]
    assert "very " * 100 not in parsed.text
    assert RTL in parsed.text
    assert len([bdi for bdi in parsed.all("bdi") if bdi.get("dir") == "auto"]) == 3 * len(prompts)
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
    assert "Other programs kept 1.30 cores busy, so measure again" in describe_result(shared)
    assert "This run is dirty" in render_html(make_result(shared))
    unknown = make_report(fidelity=())
    assert "were not compared" in describe_result(unknown)
    slower = make_report(processes=make_candidate("x", (480, 500, 490, 520), ()).processes)
    assert "slower than torch eager-fp32 (0.50 times as fast)" in describe_result(slower)
    alike = make_report(processes=make_candidate("x", (240, 250, 246, 261), ()).processes)
    assert "no difference from torch eager-fp32" in describe_result(alike)


def test_large_pictures_are_made_smaller() -> None:
    small = encode_picture(to_picture(make_drawing(1).images[0]))
    assert small.startswith("data:image/webp;base64,")
    large = encode_picture(to_picture(make_drawing(1).images[0]).repeat(32, axis=0).repeat(32, axis=1))
    assert len(large) < 200_000


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\N{EN DASH}"),
        (999, "999 ns"),
        (-1_595_109_210, "-1.60 s"),
        (1500, "1.50 µs"),
        (12_300_000, "12.3 ms"),
        (412_000_000, "412 ms"),
        (61e9, "61.0 s"),
    ],
)
def test_times_have_three_digits(value: float | None, text: str) -> None:
    assert format_ns(value) == text


def test_small_shares_keep_a_digit_behind_the_point() -> None:
    assert [format_share(value) for value in (0.0041, 0.0999, 0.1, 0.93)] == ["0.4 %", "10.0 %", "10 %", "93 %"]


def test_bytes_are_decimal() -> None:
    assert [format_bytes(v) for v in (12, 1500, 512e6, 1.74e9)] == ["12 B", "1.50 kB", "512 MB", "1.74 GB"]


def test_shorten_keeps_the_limit() -> None:
    assert len(shorten("x" * 500, 160)) == 160
    assert shorten("short") == "short"


def test_every_pair_has_a_verdict_both_ways_round(page: str) -> None:
    rows = read_rows(page)
    assert any(row.startswith("OpenVINO bf16 itself faster 2.42x faster 2.43x faster 1.38x") for row in rows)
    assert any(row.startswith("torch eager fp32 slower 0.41x itself no difference 1.01x slower 0.57x") for row in rows)
    pairs = [row for row in rows if "rank test, interval and effect agree" in row or "holds 1" in row]
    assert len(pairs) == 6


def test_what_was_not_measured_is_said(plain: str) -> None:
    text = " ".join(Page(plain).text.split())
    assert "Fixed cost and cost of a step Not measured" in text
    assert "Roofline Not measured." in text
    assert "<dt>LPIPS</dt><dd>not measured (no weights)</dd>" in plain
    assert "No audit of the graphs is at hand." in text
    assert "J by" not in text


def test_every_figure_of_a_full_report_is_shown(page: str) -> None:
    rows = read_rows(page)
    # 40 GFLOP in the median of 25.5 ms, of 7.5 TFLOP/s.
    assert any(row.startswith("OpenVINO bf16 unet 40 GFLOP 25.5 ms") and "21 %" in row for row in rows)
    assert any("31.0 s 12 MB 3.5 J by rapl 2" in row for row in rows)
    # Of a process that imported 180 MB, had 390 when all was open, and 500 at its peak.
    assert "OpenVINO bf16 500 MB 180 MB 210 MB 110 MB" in rows
    assert any(row.startswith("OpenVINO bf16 unet 1.10e-02") for row in rows)
    assert any(row.startswith("mid_block.attentions.2 unet") and "1.30 parts" in row for row in rows)
    assert any("1,024 nodes" in row for row in rows)
    assert any(row.startswith("1. OpenVINO bf16") and "2990 to 3010" in row for row in rows)
    assert any(row.startswith("up_blocks.3.resnets.1") and "not timed" in row for row in rows)
    assert "0.42" in page
    assert "p99 1.70" in page
    assert "<li>the layers of torch.compile have no names to compare</li>" in page


def test_candidates_with_the_reference_s_latents_are_in_no_plot_of_their_distance() -> None:
    report = make_full_report()
    rounding = tuple(p.model_copy(update={"latent_cosines": (1 - 1e-15, 1.0)}) for p in report.candidates[0].fidelity)
    equal = tuple(record.model_copy(update={"fidelity": rounding}) for record in report.candidates[:2])
    rows = summarize_candidates(report.model_copy(update={"candidates": equal}))
    assert plot_cosines(rows) is None
    plot = plot_cosines(summarize_candidates(report))
    assert plot is not None
    assert len(plot.legend) == 3


def test_the_unet_alone_has_a_report_without_pictures() -> None:
    page = render_html(make_result(make_unet_report()))
    test_it_can_be_read_aloud(page)
    test_ids_are_unique_and_every_reference_is_met(page)
    text = Page(page).text
    assert "OpenVINO bf16 takes a step of the UNet in 4.10 s: faster than torch eager-fp32 (2.24 times" in text
    assert "The UNet was measured alone: no pictures were drawn." in text
    assert not Page(page).all("img")


def test_a_precision_without_a_rate_of_its_own_is_held_against_the_fastest() -> None:
    report = make_full_report()
    quantized = report.candidates[0].model_copy(update={"precision": Precision.INT8})
    rows = read_rows(
        render_html(make_result(report.model_copy(update={"candidates": (quantized, *report.candidates[1:])})))
    )
    assert any("bf16 (no rate of int8 was measured)" in row and "21 %" in row for row in rows)


def test_headings_step_down_by_one(page: str) -> None:
    levels = [int(level) for level in re.findall(r"<h([1-6])", page)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def read_colours(page: str) -> dict[str, dict[str, str]]:
    """The page's variables of colours in the light and in the dark."""
    light, dark = re.findall(r":root \{(.*?)\}", page, re.S)
    schemes = {"light": light, "dark": dark}
    return {name: dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", text)) for name, text in schemes.items()}


def measure_contrast(a: str, b: str) -> float:
    """As WCAG 2.2 defines it, from 1 to 21."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_measured_as_published() -> None:
    assert measure_contrast("#ffffff", "#000000") == pytest.approx(21)
    assert measure_contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_plots_can_be_told_from_their_ground(page: str, scheme: str) -> None:
    colours = read_colours(page)[scheme]
    assert {"ground", "card", "ink", "soft", "accent", "good", "bad", "warn", "s1", "s8"} <= colours.keys()
    for ground in ("ground", "card", "warn"):
        for text in ("ink", "soft", "accent", "good", "bad"):
            assert measure_contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    # Rows of this bundle: 7 % of the accent over the card.
    parts = zip(*(bytes.fromhex(colours[name][1:]) for name in ("accent", "card")), strict=True)
    tinted = "#" + "".join(f"{round(0.07 * accent + 0.93 * card):02x}" for accent, card in parts)
    assert all(measure_contrast(colours[text], tinted) >= 4.5 for text in ("ink", "soft", "accent", "good", "bad"))
    # WCAG asks 3 of what is not text.
    assert all(measure_contrast(colours[f"s{i}"], colours["card"]) >= 3 for i in range(1, 9))


def test_every_colour_of_a_plot_is_one_of_the_page(page: str) -> None:
    svgs = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(svgs) == 5
    used = set(re.findall(r"#[0-9a-fA-F]{6}", "".join(svgs)))
    assert used <= {"#ffffff", "#000000"}
    assert set(re.findall(r"var\(--(\w+)\)", "".join(svgs))) <= read_colours(page)["dark"].keys()


def test_the_legend_names_every_stage(page: str) -> None:
    legends = re.findall(r'<ul class="legend">(.*?)</ul>', page, re.S)
    assert any("scheduler and loop" in legend and "text encoder" in legend for legend in legends)


def test_dollars_and_foreign_letters_in_a_label_are_only_text() -> None:
    report = make_full_report()
    named = report.candidates[0].model_copy(update={"label": r"$\frac{1}{0}$ 日本語 <b>"})
    page = render_html(make_result(report.model_copy(update={"candidates": (named, *report.candidates[1:])})))
    assert r"$\frac{1}{0}$ 日本語 &lt;b&gt;" in page
    assert "<b>" not in page


def test_very_many_samples_and_prompts_keep_the_page_small() -> None:
    report = make_full_report(tuple(f"{i} " * 5000 for i in range(60)))
    busy = tuple(
        record.model_copy(
            update={
                "processes": tuple(
                    each.model_copy(
                        update={"samples_ns": {stage: values * 60 for stage, values in each.samples_ns.items()}}
                    )
                    for each in record.processes
                )
            }
        )
        for record in report.candidates
    )
    page = render_html(make_result(report.model_copy(update={"candidates": busy})))
    assert len(page.encode()) < 5_000_000
    assert "The worst 120 of 240; all are in report.json." in page


def test_noise_in_many_large_pictures_fits_into_five_megabytes() -> None:
    report = make_full_report(tuple(f"prompt {i}" for i in range(6)))
    result = make_result(report)
    rng = np.random.default_rng(0)
    noise = {
        name: replace(each, images=rng.random((6, 512, 512, 3), np.float32)) for name, each in result.drawings.items()
    }
    page = render_html(replace(result, drawings=noise, reference=noise["eager-fp32"]))
    assert len(page.encode()) < 5_000_000
    assert page.count("data:image/webp") == 6 * 7


def test_an_index_links_each_run() -> None:
    page = render_index(
        EVIL, [IndexEntry(EVIL, "a b/report.html", make_report()), IndexEntry("u", "u/report.html", make_unet_report())]
    )
    parsed = Page(page)
    assert [link["href"] for link in parsed.all("a")] == ["#content", "a%20b/report.html", "u/report.html"]
    assert not parsed.all("script")
    assert "faster than torch eager-fp32" in parsed.text
