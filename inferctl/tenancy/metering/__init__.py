"""Usage events from a server to the ledger: recorder, outbox, ledger, and the report with prices."""
