"""Whether a server applies an adapter: its next tokens, next to those of the adapter and of the base in fp32.

A server can list an adapter and answer with the base, or apply it with another scale or to some of its layers. Rounding
in the server's precision moves the tokens of base and adapter about equally far from fp32, so the distance of the base
says how close an adapter has to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inferctl.core.errors import InferctlError
from inferctl.models import divergence
from inferctl.models.divergence import Scored
