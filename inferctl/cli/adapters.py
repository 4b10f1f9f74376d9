"""`inferctl adapters`: add and remove LoRA adapters of a running server of generation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from inferctl.bench.load import http_json
from inferctl.bench.load.http_json import StatusError
from inferctl.cli import console, options
from inferctl.cli.bench_options import AccessOptions
from inferctl.core.errors import InferctlError
from inferctl.models import adapter_effect

EPILOG = """\b
Examples:
  # Add ./legal, which is below a folder of serve.adapter_folders on the server
  inferctl adapters add legal legal --url http://10.0.0.7:8080 --api-key-env ADMIN_KEY
  inferctl adapters remove legal --url http://10.0.0.7:8080 --api-key-env ADMIN_KEY
"""
app = options.group("adapters", "Add and remove LoRA adapters of a running server of generation.")
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the adapter in the API.")]
Url = Annotated[str, typer.Option(metavar="URL", help="Address of the server.")]
ApiKeyEnv = Annotated[str, typer.Option("--api-key-env", metavar="VARIABLE", help="Variable with an admin key.")]
_LOCAL, _KEY = "http://127.0.0.1:8080", "INFERCTL_API_KEY"
_WITHIN_S = 3600.0  # the last requests of an adapter may be long


@app.command(epilog=EPILOG)
def add(
    name: Name,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="On the server, below serve.adapter_folders.")],
    url: Url = _LOCAL,
    api_key_env: ApiKeyEnv = _KEY,
    as_json: options.Json = False,
) -> None:
    """Add an adapter, after a comparison with PEFT in fp32."""
    found = _post(url, "/adapters", {"name": name, "source": folder}, api_key_env)
    console.result(found, f"{name}: {adapter_effect.line(found['next_tokens'])}", as_json=as_json)


@app.command(epilog=EPILOG)
def remove(name: Name, url: Url = _LOCAL, api_key_env: ApiKeyEnv = _KEY, as_json: options.Json = False) -> None:
    """Remove an adapter, after the requests that run."""
    console.result(_post(url, "/adapters/remove", {"name": name}, api_key_env), f"{name} removed", as_json=as_json)


def _post(url: str, path: str, body: Mapping[str, str], api_key_env: str) -> dict[str, Any]:
    """Return the response. Raises `InferctlError` with the message of the server."""
    access = AccessOptions(api_key_env=api_key_env).access()
    try:
        return dict(http_json.post(f"{url.rstrip('/')}{path}", _WITHIN_S, body, access))
    except StatusError as error:
        said = re.search(r'"message":("(?:[^"\\]|\\.)*")', error.message)
        raise InferctlError(json.loads(said[1]) if said else error.message) from None
