"""A group that imports and builds a command only when it is used: `--help` builds none, a call builds one."""

from __future__ import annotations

import importlib
from collections import UserDict
from typing import Any, ClassVar, NamedTuple

import typer
from typer.core import TyperGroup
from typer.main import get_command


class Command(NamedTuple):
    """Where a command is, and the line that the help of its group shows. The module's `EPILOG` ends its own help."""

    module: str
    # A function, or the Typer app of a group.
    attribute: str
    short_help: str

    def build(self, name: str) -> Any:
        module = importlib.import_module(self.module)
        found = getattr(module, self.attribute)
        if isinstance(found, typer.Typer):
            app = found
        else:
            app = typer.Typer(add_completion=False, rich_markup_mode=None)
            app.command(name, epilog=getattr(module, "EPILOG", None))(found)
        command = get_command(app)
        command.short_help = self.short_help
        return command


class _Commands(UserDict[str, Any]):
    """Commands by name. Reading a value builds it; reading the names builds nothing."""

    def __getitem__(self, name: str) -> Any:
        found = self.data[name]
        if isinstance(found, Command):
            found = self.data[name] = found.build(name)
        return found


class LazyGroup(TyperGroup):
    """The group of the commands in `table`, listed in its order."""

    table: ClassVar[dict[str, Command]]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Commands(self.table)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.short_help) for name, command in self.table.items()])
