"""Create the table of keys, and the number of its last change."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create both tables. The second one has one row."""
    op.create_table(
        "api_keys", sa.Column("id", sa.String, primary_key=True), sa.Column("content", sa.String, nullable=False)
    )
    changes = op.create_table("api_key_changes", sa.Column("number", sa.BigInteger, nullable=False))
    op.bulk_insert(changes, [{"number": 0}])
