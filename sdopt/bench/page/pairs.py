"""Each candidate against each other: who is faster, beyond doubt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from sdopt.bench.case.report import BenchReport, CandidateRecord, Status
from sdopt.bench.case.stats import PairVerdict, Ratio, Speed, judge_pair


@dataclass(frozen=True)
class Pair:
    """How fast `candidate` is against `against`."""

    candidate: CandidateRecord
    against: CandidateRecord
    verdict: PairVerdict

    def reversed(self) -> Pair:
        """The same judgement, seen from the other side."""
        ratio, speed = self.verdict.ratio, self.verdict.speed
        turned = Ratio(1 / ratio.value, 1 / ratio.high, 1 / ratio.low)
        swapped = {Speed.FASTER: Speed.SLOWER, Speed.SLOWER: Speed.FASTER, Speed.NO_DIFFERENCE: Speed.NO_DIFFERENCE}
        verdict = PairVerdict(swapped[speed], turned, self.verdict.p_value, self.verdict.reason)
        return Pair(self.against, self.candidate, verdict)


def judge_pairs(report: BenchReport) -> list[Pair]:
    """Every pair once, of candidates that were measured, in the report's order: the earlier against the later."""
    stage = report.case.scope.stage
    measured = [each for each in report.candidates if each.status is Status.OK and each.samples_of(stage)]
    return [
        Pair(candidate, against, verdict)
        for candidate, against in combinations(measured, 2)
        if (verdict := judge_pair(against.samples_of(stage), candidate.samples_of(stage)))
    ]


def lay_out_matrix(pairs: Sequence[Pair]) -> dict[str, dict[str, Pair]]:
    """Pairs by the candidate's name (a row) and that of the one it is held against (a column), both ways round."""
    matrix: dict[str, dict[str, Pair]] = {}
    for pair in pairs:
        for each in (pair, pair.reversed()):
            matrix.setdefault(each.candidate.name, {})[each.against.name] = each
    return matrix
