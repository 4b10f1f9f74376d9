"""Add what requests with a budget cost, and what servers spent of budgets."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add columns, which existing rows do not have, and the table of totals. No row is rewritten."""
    for name, kind in (("cost", sa.BigInteger), ("currency", sa.String), ("admitted_ms", sa.BigInteger)):
        op.add_column("usage_events", sa.Column(name, kind))
    op.create_table(
        "usage_budgets",
        *(sa.Column(name, sa.String, primary_key=True) for name in ("account", "label", "run")),
        sa.Column("window_end", sa.BigInteger, nullable=False, index=True),
        sa.Column("spent", sa.BigInteger, nullable=False),
    )
