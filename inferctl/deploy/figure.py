"""A derived number with its formula and source, for `--explain` and for the comments in manifests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Noted:
    """A scalar in a Kubernetes object with the comment that `manifest.py` writes on its line."""

    value: int | float | str
    note: str


@dataclass(frozen=True)
class Figure:
    """A derived number: its value with a unit, the formula with its numbers, and where these come from."""

    name: str
    value: int | float
    unit: str
    formula: str
    source: str

    @property
    def note(self) -> str:
        """The formula and the source on one line, for a comment."""
        return f"{self.name}: {self.formula}; {self.source}" if self.formula else f"{self.name}: {self.source}"

    @property
    def noted(self) -> Noted:
        """The value with its comment."""
        return Noted(self.value, self.note)

    def as_dict(self) -> dict[str, int | float | str]:
        """Return the figure for `--json`."""
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "formula": self.formula,
            "source": self.source,
        }


def shown(value: float) -> str:
    """Return a number for a formula: `90,000`, `0.7`, `33.33`."""
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 100 else f"{value:,.1f}"
