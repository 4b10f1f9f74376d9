"""The options of a server that are not part of the spec."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServerOptions:
    """The options of a server that are not part of the spec.

    `announce`: a file that is written when the server is ready. `image`: (reference, digest) of the image that the
    server runs in. `published`: the HOST:PORT at which clients reach a container, None for the address that the server
    listens at. `engines`: their number, None for one per device. `hang_seconds`: an engine is killed if a batch
    exceeds this and 20 times its prediction. `log`: text or json. `traces`: whether to record OpenTelemetry spans.
    """

    device: str = "auto"
    engine: str = "encoder"
    truncate: bool = True
    announce: Path | None = None
    image: tuple[str, str | None] | None = None
    published: str | None = None
    engines: int | None = None
    hang_seconds: float = 60.0
    log: str = "text"
    traces: bool = False
