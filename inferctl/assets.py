"""Where the shipped folders are: inside the wheel, or at the top of a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_WHEEL_ASSETS = _PACKAGE / "_assets"


def root() -> Path:
    """The folder that holds `templates/`, `base-images/` and `benchmarks/`.

    The wheel carries them as `inferctl/_assets`; a checkout or an editable install has them beside the package.
    """
    return _WHEEL_ASSETS if _WHEEL_ASSETS.is_dir() else _PACKAGE.parent


def package() -> Path:
    """The folder of the `inferctl` package itself (what the server layer of an image is made of)."""
    return _PACKAGE
