"""Usage events from a server to the ledger: recorder, outbox, broker and sink, and the report with prices."""
