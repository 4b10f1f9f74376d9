"""Create the tables of the ledger."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create events, sources and gaps."""
    op.create_table(
        "usage_events",
        sa.Column("source", sa.String, primary_key=True),
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("time_ms", sa.BigInteger, nullable=False),
        sa.Column("day", sa.String, nullable=False),
        *(sa.Column(name, sa.String) for name in ("key_id", "model", "model_sha256", "task", "endpoint")),
        *(sa.Column(name, sa.BigInteger) for name in ("inputs", "input_tokens", "cached_tokens", "output_tokens")),
        *(sa.Column(name, sa.Double) for name in ("engine_ms", "duration_ms")),
        sa.Column("status", sa.Integer),
        *(sa.Column(name, sa.String) for name in ("code", "hardware", "request_id")),
    )
    op.create_index("usage_events_time", "usage_events", ["time_ms"])
    op.create_table(
        "usage_sources",
        sa.Column("source", sa.String, primary_key=True),
        sa.Column("watermark", sa.BigInteger, nullable=False),
        sa.Column("sent", sa.BigInteger, nullable=False),
        sa.Column("ended", sa.String),
        sa.Column("ended_ms", sa.BigInteger),
    )
    op.create_table(
        "usage_gaps",
        sa.Column("source", sa.String, primary_key=True),
        sa.Column("first", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("last", sa.BigInteger, nullable=False),
        sa.Column("time_ms", sa.BigInteger, nullable=False),
    )
