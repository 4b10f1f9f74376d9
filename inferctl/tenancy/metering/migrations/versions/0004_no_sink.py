"""Forget which events an HTTP sink has: there is none any more."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Drop the column."""
    op.drop_column("usage_sources", "sent")
