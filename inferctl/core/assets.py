"""Paths of the shipped folders: inside the wheel, or at the top of a checkout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[1]
_WHEEL_ASSETS = _PACKAGE / "_assets"


def root() -> Path:
    """Return the folder that holds `templates/`, `base-images/` and `benchmarks/`.

    The wheel contains them as `inferctl/_assets`. In a checkout or an editable install they are next to the package.
    """
    return _WHEEL_ASSETS if _WHEEL_ASSETS.is_dir() else _PACKAGE.parent


def page(template: str, filters: Mapping[str, Callable[..., Any]] = {}, **values: Any) -> str:
    """Return an HTML page of a file in `templates/`. All values are escaped."""
    import jinja2

    loader = jinja2.FileSystemLoader(root() / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters
    return environment.get_template(template).render(**values)


def package() -> Path:
    """Return the folder of the `inferctl` package. The server layer of an image is a copy of files from it."""
    return _PACKAGE
