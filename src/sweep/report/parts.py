"""What stands apart in a report, each model on each machine, and what each comes to, in words. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from sweep.report import asked, frontier, overview, published
from sweep.report.decision import Decision, Limits, decide
from sweep.report.evidence import NOTHING, Evidence
from sweep.report.overview import Overview

_NOTHING = "No pruned cell has a quality to compare with a dense one's."


@dataclass(frozen=True)
class Part:
    """One model on one machine, or one value of a facet: what is compared with each other."""

    title: str  # empty where there is one part
    rows: pd.DataFrame
    overview: Overview | None
    decision: Decision | None

    @property
    def suffix(self) -> str:
        """Of the names of its files."""
        return f"-{asked.file_name(self.title)}" if self.title else ""


def parts(
    rows: pd.DataFrame, metrics: Sequence[str], facet: str | None, limits: Limits, evidence: Evidence
) -> list[Part]:
    """What stands in a report apart, with what it comes to; rows as `ready` gives them."""
    found = []
    for title, mine in asked.facets(rows, facet):
        seen = overview.overview(mine, metrics, evidence)
        decided = decide(seen, mine, limits) if seen is not None and seen.gains else None
        found.append(Part(title, mine, seen, decided))
    return found


def ready(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """(the rows that can be drawn: ok, of one version, their points numbered; what is said of those left out)."""
    ok, left_out = frontier.newest(rows[rows.status == "ok"], published.ANOTHER_VERSION)
    return frontier.numbered(frontier.with_paired_latency(ok)), left_out


def words(seen: Sequence[Part]) -> str:
    """What a terminal shows of each part: the overview, and what to choose."""
    text = []
    for part in seen:
        text += [part.title] if part.title else []
        text += [overview.words(part.overview), *part.overview.notes] if part.overview else [_NOTHING]
        text += [part.decision.words()] if part.decision else []
    return "\n\n".join(text) + "\n"


def told(rows: pd.DataFrame) -> str:
    """The words on some rows, without the outcomes of their documents; empty where there is no pruned one to tell of."""
    ok, _ = ready(rows)
    if ok.empty or ok.baseline.all():
        return ""
    seen = parts(ok, asked.quality_metrics(ok), None, Limits(), NOTHING)
    return words(seen) if any(part.overview for part in seen) else ""
