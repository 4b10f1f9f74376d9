"""Measure how long a container takes to its first right response, with an empty and with a warm image store.

    benchmarks/images/container_start.py REF FOLDER [--spec FILE] [--network host] [--rounds N] [--json FILE]

REF is an image for embeddings in a registry, FOLDER its model. Each round removes the image from the Docker Engine of
DOCKER_HOST, pulls it, starts a container as `inferctl serve --image` does, and asks it every 20 ms until the vector is
that of a server of this machine in fp32. Then it starts another container of the image that is now in the store.
`--spec`: the spec of the image, for the estimate of `inferctl check` in the table.

An engine keeps layers that another image has, or the build cache of its classic store. A pull that needs not all layers
ends the script: use an engine that builds nothing, such as `dockerd --data-root NEW --host unix:///NEW/docker.sock`.
The files that a pull wrote are in memory when the container reads them, in both cases.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "peers"))
import peers

from inferctl.image import serve_image
from inferctl.image.docker import DockerEngine
from inferctl.image.running_container import exit_error

TEXT = "A container serves its first request."
LOWEST_COSINE = 0.999  # of any precision but int8
# Row of the table -> the parts of `inferctl check` for it.
ROWS = {
    "pull and unpack": ("pull", "unpack"),
    "start of the container": (),
    "until the first right response": ("load and warm-up",),
}


def vector(url: str) -> list[float]:
    """Return the vector of `TEXT`. Raises `OSError` while there is none."""
    body = json.dumps({"input": TEXT, "encoding_format": "base64"}).encode()
    request = urllib.request.Request(f"{url}/v1/embeddings", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=5) as response:
        return peers.decode(json.load(response)["data"][0]["embedding"])


def expected(folder: Path) -> list[float]:
    """Return the vector of a server of this machine."""
    server = peers.inferctl(
        peers.free_port(), "--model", str(folder.resolve()), "--device", "cpu", "--precision", "fp32"
    )
    try:
        return vector(server.url)
    finally:
        server.end()


def pull(reference: str) -> float:
    """Remove the image, pull it, and return the seconds of the pull."""
    subprocess.run(["docker", "image", "rm", "--force", reference], capture_output=True, check=False)
    began = time.perf_counter()
    done = subprocess.run(["docker", "pull", reference], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"error: cannot pull {reference}: {done.stderr.strip()}")
    if "Already exists" in done.stdout or "Image is up to date" in done.stdout:
        sys.exit(f"error: the engine had layers of {reference}\nhint: use an engine that builds nothing")
    return seconds


def start(
    engine: DockerEngine, reference: str, folder: Path, network: str | None, right: list[float]
) -> tuple[float, float]:
    """Return the seconds of the start of a container, and those from then to its first right response."""
    image = engine.image(reference)
    assert image is not None
    address = serve_image.Address("127.0.0.1", peers.free_port(), network)
    weights = serve_image.weights(image, serve_image.ServeOptions(address, str(folder)))
    options = serve_image.options(image, weights, address, gpu=False)
    began = time.perf_counter()
    with engine.start(image.id, options) as container:
        started = time.perf_counter()
        for attempt in range(10_000):
            try:
                found = vector(f"http://127.0.0.1:{address.port}")
                break
            except OSError:
                if attempt % 50 == 49 and (error := exit_error(container, "see its log")):
                    raise error from None
                time.sleep(0.02)
        else:
            sys.exit(f"error: no response of {reference}")
        answered = time.perf_counter()
    cosine = sum(a * b for a, b in zip(found, right, strict=True)) / math.hypot(*found) / math.hypot(*right)
    assert cosine >= LOWEST_COSINE, f"the vector has a cosine of {cosine:.5f} to the right one"
    return started - began, answered - started


def estimate(spec: Path | None) -> dict[str, dict[str, Any]]:
    """Return the parts of the cold start that `inferctl check` estimates, by name. Empty without a spec."""
    if spec is None:
        return {}
    command = [sys.executable, "-m", "inferctl", "check", "--spec", str(spec), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {part["name"]: part for part in json.loads(done.stdout)["cold_start"]}


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(rounds=5)
    parser.add_argument("reference", metavar="REF", help="image in a registry")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of its model")
    parser.add_argument("--spec", type=Path, help="spec of the image, for the estimate of `inferctl check`")
    parser.add_argument("--network", choices=["host"], help="for an engine without a bridge")
    given = parser.parse_args()
    engine, right, estimated = DockerEngine.connect(), expected(given.folder), estimate(given.spec)
    seconds: dict[str, list[tuple[float, ...]]] = {"empty": [], "warm": []}
    for _ in range(given.rounds):
        pulled = pull(given.reference)
        for store, before in (("empty", pulled), ("warm", 0.0)):
            seconds[store].append((before, *start(engine, given.reference, given.folder, given.network, right)))
    image = engine.image(given.reference)
    assert image is not None
    rows: list[tuple[object, ...]] = []
    for number, (row, parts) in enumerate(ROWS.items()):
        measured = (peers.median([each[number] for each in runs]) for runs in seconds.values())
        rows.append((row, *measured, sum(estimated[name]["seconds"] for name in parts if name in estimated)))
    totals = (peers.median([sum(each) for each in runs]) for runs in seconds.values())
    rows.append(("all", *totals, sum(part["seconds"] for part in estimated.values())))
    print(f"{image.size / 1e6:.0f} MB in {len(image.layers)} layers; seconds, medians of {given.rounds} rounds")
    peers.table(("", "empty store", "warm store", "estimate"), rows)
    figures = {"image": {"bytes": image.size, "layers": len(image.layers)}, "seconds": seconds, "estimate": estimated}
    peers.write(given.json, {"date": time.strftime("%Y-%m-%d"), "parts": [*ROWS], **figures})


if __name__ == "__main__":
    main()
