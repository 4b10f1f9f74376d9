"""What a machine lacks: tests that need it skip there, and fail where INFERCTL_REQUIRE names it."""

import os
import re
from pathlib import Path
from typing import NoReturn

import pytest

# The modules and programs of the packages that `make test` installs and `make test ROOM=...` does not.
GROUPS = {
    "dev-clients": "cohere haystack haystack_integrations langchain_openai llama_index llm-comply schemathesis "
    "voyageai",
    "dev-deploy": "check-jsonschema envoy kubectl kubernetes_validate shellcheck",
    "dev-docs": "plotly zensical",
    "dev-models": "peft sentence_transformers sentencepiece",
}


def requires(what: str) -> bool:
    """Whether INFERCTL_REQUIRE names `what`: `docker`, `gpu`, `packages`, `services` or `vllm`."""
    return what in os.environ.get("INFERCTL_REQUIRE", "").split(",")


def missing(what: str, problem: str) -> NoReturn:
    """Skip the test, or fail it if this machine must have `what`."""
    (pytest.fail if requires(what) else pytest.skip)(problem)


def absent_package(error: str) -> str | None:
    """Return what to install if `error` is that of a missing module or program of `GROUPS`, and may be missing here."""
    found = re.search(r"No module named '(\w+)|No such file or directory: '([^']+)'", error)
    name = (found[1] or Path(found[2]).name) if found else ""
    group = next((group for group, names in GROUPS.items() if name in names.split()), None)
    if not group or requires("packages"):
        return None
    return f"{name} is not installed: run `make .venv/.dev-all`, or install the extra `{group}`"
