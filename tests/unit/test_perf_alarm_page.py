"""The gate's page: what it says first, what it tells to do, and that nothing in it is markup."""

from __future__ import annotations

from html.parser import HTMLParser

from sdopt.perf.gate.findings import Evidence, Finding, GateReport, Outcome, Rule, SuspectRecord
from sdopt.perf.history.record import Metric, RunRecord
from sdopt.perf.page.alarm_page import describe_gate, render_markdown, render_page
from tests.planted_runs import make_key, make_run

KEY = make_key()
SLOWER = Finding(
    rule=Rule.SLOWER, series=KEY, sentence="tiny/engines/end_to_end is 5.0% slower than the last good commit",
    evidence=Evidence.SAME_NIGHT, old=100e6, new=105e6, change=0.05, p_value=0.001, q_value=0.002,
)  # fmt: skip
TONIGHT = make_run(14, {KEY: 105e6})


def make_report(*findings: Finding, **changes: object) -> GateReport:
    fields: dict[str, object] = {
        "run": TONIGHT.id, "commit": TONIGHT.commit, "last_good_run": "20260101T030000Z-00000000",
        "last_good_commit": "a" * 40, "nights": 14, "screened": 12, "looked_for_drift": False, "findings": findings,
    }  # fmt: skip
    return GateReport.model_validate(fields | changes)


class _Cells(HTMLParser):
    """Tags, and the text of the cells of the table."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if self.tags[-1] == "td":
            self.cells.append(data)


def test_the_headline_is_the_most_pressing_finding() -> None:
    assert describe_gate(make_report(SLOWER)) == f"Alarm: {SLOWER.sentence}."
    assert describe_gate(make_report(SLOWER, SLOWER, SLOWER)).endswith(", and 2 more findings.")
    assert describe_gate(make_report()).startswith("Nothing to report: 12 series")
    better = SLOWER.model_copy(update={"rule": Rule.IMPROVED})
    assert describe_gate(make_report(better)).startswith("Better than before, please look: ")
    assert "not judged" in describe_gate(make_report(times_judged=False))
    waiting = SuspectRecord(
        series=KEY, old=100e6, new=105e6, change=0.05, threshold=0.02, outcome=Outcome.OPEN
    )  # what may be an alarm tomorrow is not as usual
    headline = describe_gate(make_report(suspects=(waiting,)))
    assert "11 of 12 series as usual, 1 left open" in headline


def test_both_pages_hold_the_figures_the_environment_and_the_commands() -> None:
    report = make_report(SLOWER, notes=("a note",))
    markdown, page = render_markdown(report, TONIGHT), render_page(report, TONIGHT)
    for text in (markdown.replace("\\", ""), page):
        for expected in (
            "100 ms", "105 ms", "+5.0%", "0.002", "A/B in the same night", "a note", "A processor", "torch 2.12",
            f"sdopt perf compare {report.last_good_run} {report.run}",
            f"sdopt perf bisect {'a' * 12}..{TONIGHT.commit[:12]} --suite nightly --series tiny/engines/end_to_end",
            f"sdopt perf gate --accept {report.run}",
        ):  # fmt: skip
            assert expected in text
    assert _Cells(page).cells[:5] == ["slower", "tiny/engines/end_to_end", "100 ms", "105 ms", "+5.0%"]


def test_a_quiet_night_has_no_commands_and_names_what_was_cleared() -> None:
    suspect = SuspectRecord(
        series=KEY, old=100e6, new=104e6, change=0.04, threshold=0.02, outcome=Outcome.CLEARED, confirmed_change=0.0
    )
    markdown = render_markdown(make_report(suspects=(suspect,)), TONIGHT)
    assert "1 no difference" in markdown
    assert "perf bisect" not in markdown


def test_messages_of_other_programs_are_text() -> None:
    message = "<script>alert(1)</script> | a [link](http://x)\n# heading `code` " + "y" * 10_000
    report = make_report(SLOWER.model_copy(update={"rule": Rule.FAILED, "sentence": message}), notes=(message,))
    page, markdown = render_page(report, TONIGHT), render_markdown(report, TONIGHT)
    assert "script" not in _Cells(page).tags
    assert "\\<script\\>alert" in markdown
    assert "\n# heading" not in markdown
    assert not [line for line in markdown.splitlines() if "<script>" in line.replace("\\<", "")]


def test_the_page_stays_one_page() -> None:
    """Of a night that lost everything, too: 25 rows and the number of the others."""
    findings = [SLOWER.model_copy(update={"series": make_key(Metric.UNET_STEP, case=f"c{i}")}) for i in range(400)]
    report = make_report(*findings)
    assert render_page(report, TONIGHT).count("<tr><td>") == 25
    assert "and 375 more in the JSON" in render_markdown(report, TONIGHT)


def test_runs_outside_of_a_repository_have_no_bisect() -> None:
    tonight: RunRecord = make_run(14, {KEY: 105e6}, commit="")
    markdown = render_markdown(make_report(SLOWER, commit="", last_good_commit=""), tonight)
    assert "commit unknown" in markdown
    assert "perf bisect" not in markdown
    assert "perf compare" in markdown
