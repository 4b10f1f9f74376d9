"""Runs the migrations of the table of keys on the connection of `inferctl.tenancy.database`. Alembic loads it."""

from __future__ import annotations

from alembic import context

_attributes = context.config.attributes
context.configure(connection=_attributes["connection"], version_table=_attributes["version_table"])
with context.begin_transaction():
    context.run_migrations()
