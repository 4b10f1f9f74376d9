"""`inferctl schema` prints every key of the spec. `inferctl config` prints each setting and its source."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from inferctl.cli import console
from inferctl.cli.options import Json, ModelSource, SpecFile, load
from inferctl.config import settings, spec


def schema() -> None:
    """Print the JSON Schema of inferctl.yaml for editors.

    Example: inferctl schema > inferctl.schema.json
    """
    console.document(spec.json_schema())


def config(
    spec_file: SpecFile = None,
    model: ModelSource = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Print only settings that differ from the default.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print each setting, its value and its source: flag, environment, file or default.

    Set any of them with an environment variable INFERCTL_<SECTION>_<NAME>, such as INFERCTL_SERVE_PRECISION=bf16.
    Paths in a spec are relative to the spec file. Paths in flags and variables are relative to the working directory.
    Variables that Kubernetes sets for a Service, such as INFERCTL_SERVE_PORT=tcp://10.0.0.1:80, are ignored.

    Example: inferctl config --changed
    """
    resolved = load(spec_file, {"model.source": model})
    values = {}
    # Plain data, because the items of a list can be sections. Addresses have no passwords there.
    data = resolved.spec.model_dump(mode="json")
    for path in settings.paths():
        value: Any = data
        for key in path.split("."):
            value = value[key]
        if not changed or resolved.origins[path] != "default":
            values[path] = value
    if as_json:
        console.document({path: {"value": value, "origin": resolved.origins[path]} for path, value in values.items()})
        return

    rows = [(path, "-" if value is None else str(value), resolved.origins[path]) for path, value in values.items()]
    console.report(console.table(("setting", "value", "from"), rows))
