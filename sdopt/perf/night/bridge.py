"""Bridge runs: what links the series of a new environment with those before it.

A new driver changes speed, and so may tonight's commit. The last good commit, measured again under the new driver, says
which it was: its bridge run is the first point of the new series, and tonight is held against it.
"""

from __future__ import annotations

from collections.abc import Sequence

from sdopt.perf.history.nights import find_last_good
from sdopt.perf.history.record import RunRecord


def find_bridge_commit(records: Sequence[RunRecord], fingerprint: str, suite_digest: str, commit: str) -> str:
    """The commit that has to be measured again before tonight's `commit`, or the empty string.

    Empty where this environment has a run of the suite already, where no commit was ever good, and where tonight's is
    the last good one itself: its run is the link.
    """
    if any((r.fingerprint, r.suite_digest) == (fingerprint, suite_digest) for r in records):
        return ""
    good = last_good(records, suite_digest)
    return "" if good is None or good.commit == commit else good.commit


def last_good(records: Sequence[RunRecord], suite_digest: str) -> RunRecord | None:
    """The newest run of a suite whose commit can be trusted, in whichever environment: `find_last_good`'s rule."""
    environments = {record.fingerprint: record for record in records if record.suite_digest == suite_digest}
    good = [found for record in environments.values() if (found := find_last_good(records, record))]
    ids = {record.id for record in good}
    return next((record for record in reversed(records) if record.id in ids), None)
