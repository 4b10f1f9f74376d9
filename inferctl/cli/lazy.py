"""A command group that imports a command only if it runs. `--help` of the group imports none."""

from __future__ import annotations

import contextlib
import importlib
import signal
from collections import UserDict
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import typer
from typer.core import TyperGroup
from typer.main import get_command


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Defer SIGINT and SIGTERM. Callbacks of imports drop the exception of a handler, and pydantic converts it."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


class Command(NamedTuple):
    """The place of a command and its line in the help of the group. `EPILOG` of the module ends the command's help."""

    module: str
    # A function, or the Typer app of a group.
    attribute: str
    short_help: str

    def build(self, name: str) -> Any:
        with deferred_signals():
            module = importlib.import_module(self.module)
            target = getattr(module, self.attribute)
            if isinstance(target, typer.Typer):
                app = target
            else:
                app = typer.Typer(add_completion=False, rich_markup_mode=None)
                app.command(name, epilog=getattr(module, "EPILOG", None))(target)
            command = get_command(app)
        command.short_help = self.short_help
        return command


class _Commands(UserDict[str, Any]):
    """Commands by name. Reading a value builds the command."""

    def __getitem__(self, name: str) -> Any:
        command = self.data[name]
        if isinstance(command, Command):
            command = self.data[name] = command.build(name)
        return command


class LazyGroup(TyperGroup):
    """A group of the commands in `table`, listed in this order."""

    table: ClassVar[dict[str, Command]]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Commands(self.table)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.short_help) for name, command in self.table.items()])
