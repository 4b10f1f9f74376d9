"""What a reader must know before using the numbers of a result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from inferctl.bench.judge import validity
from inferctl.bench.report.rows import NOT_MEASURED_HERE, NOT_RUN, MeasuredRow, Row


@dataclass(frozen=True)
class Caveat:
    """A limitation of a result.

    `kind` is one of `invalid`, `absent` (not run, or not measured), `emulated`, `unchecked` (quality) and `caution`, which
    reports show as `warning`.
    """

    kind: str
    text: str

    @property
    def label(self) -> str:
        """The kind in reports."""
        return "warning" if self.kind == "caution" else self.kind


def caveats(rows: Sequence[Row]) -> list[Caveat]:
    """Return the limitations of all rows, the most severe first."""
    measured = [row for row in rows if isinstance(row, MeasuredRow)]
    found = [Caveat("invalid", f"{row.configuration}: {reason}") for row in measured for reason in row.reasons]
    found += [
        Caveat("absent", f"{row.configuration} did not run: {row.reason}") for row in rows if row.outcome == NOT_RUN
    ]
    elsewhere = by_text((row.reason, row.configuration) for row in rows if row.outcome == NOT_MEASURED_HERE)
    found += [Caveat("absent", f"not measured here: {names}; {reason}") for reason, names in elsewhere]
    emulated = (
        (row.precision.get("reason"), row.configuration) for row in rows if row.precision.get("level") == "emulated"
    )
    found += [Caveat("emulated", f"{names}: {reason}") for reason, names in by_text(emulated)]
    unchecked = ((row.quality["reason"], row.configuration) for row in measured if not row.quality["checked"])
    found += [Caveat("unchecked", f"{names}: quality not checked, {reason}") for reason, names in by_text(unchecked)]
    cautions = [(caution, row.configuration) for row in rows for caution in row.cautions]
    highest = validity.highest_shares([caution for caution, _ in cautions])
    by_kind = {validity.kind_of(caution): caution for caution in highest}
    alike = by_text((by_kind[validity.kind_of(caution)], name) for caution, name in cautions)
    return found + [Caveat("caution", f"{names}: {caution}") for caution, names in alike]


def by_text(pairs: Iterable[tuple[str | None, str]]) -> Iterator[tuple[str | None, str]]:
    """Yield each text of (text, name) pairs once, with all its names."""
    groups: dict[str | None, list[str]] = {}
    for text, name in pairs:
        groups.setdefault(text, []).append(name)
    for text, names in groups.items():
        yield text, ", ".join(dict.fromkeys(names))


def lines(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Return each text of (text, name) pairs once, with the names that it is about if there are several texts."""
    groups = list(by_text(pairs))
    return [str(text) if len(groups) == 1 else f"{names}: {text}" for text, names in groups]
