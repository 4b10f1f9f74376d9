"""Functions without side effects over records and receipts: summaries, validity, SLO, search decisions, comparison."""
