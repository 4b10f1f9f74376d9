"""What a machine lacks: tests that need it skip there, and fail where INFERCTL_REQUIRE names it."""

import os
from typing import NoReturn

import pytest


def requires(what: str) -> bool:
    """Whether INFERCTL_REQUIRE names `what`: `docker`, `gpu`, `services` or `vllm`."""
    return what in os.environ.get("INFERCTL_REQUIRE", "").split(",")


def missing(what: str, problem: str) -> NoReturn:
    """Skip the test, or fail it if this machine must have `what`."""
    (pytest.fail if requires(what) else pytest.skip)(problem)
