"""Options that several commands share, and the settings with the environment of the command line."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import typer

from inferctl.cli import completion, console
from inferctl.config import settings, spec
from inferctl.config.settings import Resolved
from inferctl.config.spec import Access, Spec
from inferctl.core.errors import UsageError, did_you_mean
from inferctl.facts import catalog

SpecFile = Annotated[
    Path | None,
    typer.Option("--spec", "-f", metavar="FILE", help="Read this spec file. [default: ./inferctl.yaml if it exists]"),
]
# One hour is longer than any client waits. A larger number is a typing error, and every result meets an infinite SLO.
MIN_SLO_MS, MAX_SLO_MS = 0.001, 3_600_000
Flags = dict[str, Any]  # the values of `with_settings`
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
ModelSource = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="SOURCE",
        help="Use this model folder, hub id or `oci://` image; no spec file is required.",
    ),
]


def hardware_option(help_: str, offered: completion.Callback = completion.HARDWARE) -> Any:
    """Return an option that is repeated for several kinds of hardware."""
    return typer.Option(metavar="KEY", autocompletion=offered, help=help_)


def precision_option(help_: str) -> Any:
    """Return an option for one precision, or several if it is repeated."""
    return typer.Option("--precision", "-p", metavar="NAME", autocompletion=completion.PRECISIONS, help=help_)


PrecisionOption = Annotated[
    str | None,
    precision_option(
        "Set the precision: auto, fp32, fp16, bf16, int8 or fp8 (generation). [default: the spec's, else auto]"
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        autocompletion=completion.one_of("auto", "cpu", "cuda"),
        help="Run on auto, cpu, cuda (all GPUs) or cuda:N; auto uses the GPUs if there are any.",
    ),
]
Engine = Annotated[
    str, typer.Option(hidden=True, help="Set the engine: encoder, or echo (no model, to measure the rest).")
]
Engines = Annotated[
    int | None,
    typer.Option(hidden=True, min=1, max=64, help="Start N engine processes. [default: one per GPU, else 1]"),
]
Network = Annotated[
    Literal["host"] | None, typer.Option(help="Run build steps and containers on the network of the host.")
]
# Settings whose options say more than the reference of the spec does.
_OPTIONS = {"model.source": ModelSource, "serve.precision": PrecisionOption}
_OFFERED = {"image.base": completion.BASES, "image.platform": completion.PLATFORMS}
Result = TypeVar("Result")


def with_settings(*paths: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Give a command one option for each of these settings, in the place of its parameter `flags`.

    The command gets their values there, by dotted path. Name, type, help and default of an option are those of the
    setting in the spec, whose values `load` checks.
    """

    def decorate(command: Callable[..., Result]) -> Callable[..., Result]:
        parameters: list[inspect.Parameter] = []
        names = {settings.flag(path).removeprefix("--").replace("-", "_"): path for path in paths}
        for each in inspect.signature(command, eval_str=True).parameters.values():
            found = {name: _option(path) for name, path in names.items()} if each.name == "flags" else {}
            parameters += [
                inspect.Parameter(name, each.KEYWORD_ONLY, default=None, annotation=option)
                for name, option in found.items()
            ] or [each.replace(kind=each.KEYWORD_ONLY)]

        @functools.wraps(command)
        def run(**values: Any) -> Result:
            return command(flags={path: values.pop(name) for name, path in names.items()}, **values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _option(path: str) -> Any:
    """Return the type of an option, with its help, as Typer reads it."""
    if path in _OPTIONS:
        return _OPTIONS[path]
    field, name = settings.field(path), settings.flag(path)
    kinds = {field.annotation, *get_args(field.annotation)} - {type(None)}
    # A setting with words too, such as `auto`, or a list is read from text.
    kind: Any = next((each for each in (bool, int, float) if kinds <= {each, each | None}), str)
    words = [each for each in kinds if isinstance(each, str)]
    text, _, default = (field.description or "").partition(" Default: ")
    default = default.rstrip(".") or (str(field.default) if isinstance(field.default, str | int | float) else "")
    if kind is bool:
        name, default = f"{name}/--no-{name[2:]}", "no"
    return Annotated[
        kind | None,
        typer.Option(
            name,
            metavar=None if kind is bool else "N" if kind in (int, float) else "VALUE",
            autocompletion=_OFFERED.get(path) or (completion.one_of(*words) if words else None),
            help=f"{text} [default: {default}]" if default else text,
        ),
    ]


ReadySeconds = Annotated[
    float,
    typer.Option(
        "--ready-timeout",
        metavar="SECONDS",
        min=0.1,
        max=86_400,
        help="Wait up to SECONDS for the started image to be ready.",
    ),
]
Revision = Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a hub id. [default: main]")]


def group(name: str, help_: str) -> typer.Typer:
    """Return a group of commands. Without a command, it prints its help."""
    app = typer.Typer(name=name, help=help_, invoke_without_command=True, rich_markup_mode=None, add_completion=False)

    @app.callback()
    def root(context: typer.Context) -> None:
        console.help_without_command(context)

    return app


def known(name: str, names: Collection[str], option: str) -> str:
    """Return `name` if it is one of `names`; raise `UsageError` otherwise."""
    if name not in names:
        raise UsageError(f"{option} cannot be {name!r}", did_you_mean(name, names) or f"use: {', '.join(names)}")
    return name


def without_model(spec_file: Path | None, flags: dict[str, Any]) -> Spec:
    """Return the settings for a command that needs no model, also without a spec. Raises `UsageError`."""
    if not names_model(spec_file, flags):
        flags = {**flags, "model.source": "."}
    return load(spec_file, flags, several=True).spec


def names_model(spec_file: Path | None, flags: dict[str, Any]) -> bool:
    """Return whether a spec file, `--model` or the environment specifies a model."""
    specified = spec_file or os.environ.get("INFERCTL_SPEC") or os.environ.get("INFERCTL_MODEL_SOURCE")
    return bool(specified or flags.get("model.source") or Path(spec.DEFAULT_FILE).exists())


def spec_path(spec_file: Path | None) -> Path:
    """Return the path of the spec: `spec_file`, else INFERCTL_SPEC, else ./inferctl.yaml. The file may not exist."""
    return spec_file or Path(os.environ.get("INFERCTL_SPEC") or spec.DEFAULT_FILE)


def access(spec_file: Path | None, keys: str | None) -> Access:
    """Return the section `access` of the settings, also without a spec. `keys`: an option. Default: keys.json."""
    return with_keys(without_model(spec_file, {"access.keys": keys}).access)


def with_keys(found: Access) -> Access:
    """Return the section `access` with a place of keys."""
    return found if found.keys else found.model_copy(update={"keys": "keys.json"})


def load(spec_file: Path | None, flags: dict[str, Any], *, several: bool = False) -> Resolved:
    """Return the settings and print their warnings. `several`: whether the command takes a spec with `models`.

    `flags` maps dotted paths to values; None means absent. Flags override INFERCTL_* variables, which override the spec
    file, which overrides the defaults. With `--model`, the spec file may be absent. Raises `UsageError`.
    """
    explicit, path = spec_file or os.environ.get("INFERCTL_SPEC"), spec_path(spec_file)
    without_file = (
        not explicit and not path.exists() and (flags.get("model.source") or os.environ.get("INFERCTL_MODEL_SOURCE"))
    )
    document = None if without_file else settings.read(path)
    resolved = settings.resolve(document, os.environ, flags, catalog.vocabulary())
    if resolved.spec.models and not several:
        names = ", ".join(one.name for one in resolved.spec.models)
        raise UsageError(
            f"{path} has several models ({names}), and this command takes one", "write one of them into `--spec FILE`"
        )
    for warning in resolved.warnings:
        console.warn(warning)
    return resolved
