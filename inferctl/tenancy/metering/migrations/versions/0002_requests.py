"""Let one row stand for several requests: the sum of those that were rejected."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the number of requests, which is 1 for existing rows. No row is rewritten."""
    op.add_column("usage_events", sa.Column("requests", sa.BigInteger, nullable=False, server_default="1"))
