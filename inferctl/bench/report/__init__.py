"""Writes what was measured: receipts, result, findings, charts, HTML, terminal, JUnit."""
