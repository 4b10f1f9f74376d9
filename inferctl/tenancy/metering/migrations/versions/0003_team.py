"""Add the team of the key, as it was when the request ended."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the team, which existing rows do not have. No row is rewritten."""
    op.add_column("usage_events", sa.Column("team", sa.String))
