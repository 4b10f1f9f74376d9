"""`inferctl serve --image`: the image as a container, as it will run elsewhere, in the foreground."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from inferctl.errors import InferctlError
from inferctl.image import forecast
from inferctl.image.docker import ContainerOptions, Engine
from inferctl.image.verify import CACHE_PATH, explain_exit, mounts_of

# Weights that a container downloads outlive it there.
_CACHE_VOLUME = "inferctl-models"
_STOP_SECONDS = 35


@dataclass(frozen=True)
class ServeOptions:
    """`model`: folder to mount at /model, None when the image brings or fetches its weights. `port` 0 takes a free one.

    `gpu` None: passed through when the engine has the NVIDIA runtime. `network`: None, or `host`.
    """

    model: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    gpu: bool | None = None
    network: str | None = None
    arguments: tuple[str, ...] = ()


def run_server(
    engine: Engine,
    reference: str,
    options: ServeOptions,
    log: Callable[[str], None],
    started: Callable[[str], None] = lambda url: None,
) -> int:
    """Run `reference` until it ends or a KeyboardInterrupt, which stops it cleanly; returns its exit code.

    Pulls the image when the engine has none. `log` gets every line of the container, `started` the URL once.
    Raises `NotReadyError` for a taken port, a missing image or no engine.
    """
    if engine.image(reference) is None:
        log(f"pulling {reference}")
        engine.pull(reference)
    image = engine.image(reference)
    if image is None:
        raise InferctlError(f"there is no image {reference}", "`inferctl build` makes one")
    if options.model is None and image.labels.get("io.inferctl.model.weights") == "mount":
        raise InferctlError(
            f"{reference} carries no weights ({forecast.size(image.size)} of software only)",
            "`--model DIR` mounts them at /model",
        )
    gpu = (
        engine.info().gpu and image.environment.get("NVIDIA_VISIBLE_DEVICES") is not None
        if options.gpu is None
        else options.gpu
    )
    inside = int(image.environment.get("INFERCTL_SERVE_PORT", "8080"))
    host_network = options.network == "host"
    port = options.port if host_network else inside
    extra = ("--host", options.host, "--port", str(port)) if host_network else ()
    wanted = ContainerOptions(
        command=(*image.command, *extra, *options.arguments),
        environment={"INFERCTL_SERVE_PORT": str(port)},
        mounts=mounts_of(options.model) if options.model else {},
        volumes={CACHE_PATH: _CACHE_VOLUME} if image.environment.get("HF_HOME") == CACHE_PATH else {},
        port=inside,
        host=options.host,
        host_port=options.port,
        network=options.network,
        gpu=gpu,
        labels={"io.inferctl.role": "serve"},
    )
    with engine.start(image.id, wanted) as container:
        try:
            with suppress(InferctlError):
                started(f"http://{options.host}:{port if host_network else container.host_port(inside)}")
            for line in container.follow():
                log(line)
        except KeyboardInterrupt:
            container.stop(_STOP_SECONDS)
        code = container.wait(_STOP_SECONDS)
        if code:
            error = explain_exit(container)
            if error is not None:
                raise error
        return code or 0
