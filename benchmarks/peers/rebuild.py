"""Measure the cost of a rebuild: seconds and bytes pushed, for inferctl's image and for two plain Dockerfiles.

    python benchmarks/peers/rebuild.py [--repeats 3] [--wheels DIR] [--registry localhost:5000] [--base IMAGE]
                                       [--json FILE]

There are three images of one server with baked weights, and three changes to each: none, one number in the
configuration, the weights. The builds are interleaved. `plain` copies everything and then runs pip, as simple
Dockerfiles do; `plain, pip first` installs before it copies. The seconds are those of build and push. inferctl's
verification is a row of its own. Bytes pushed are the sizes of the blobs that the registry did not have, manifest
included; each image has its own repository.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
CHANGES = ("nothing", "config", "weights")
PIP = "/usr/local/bin/python3.11 -m pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore"
PLAIN = """\
FROM {base}
COPY . /app
RUN --mount=type=bind,from=wheels,target=/wheels {pip} --no-index --find-links=/wheels -r /app/requirements.txt
ENV PYTHONPATH=/app/server
CMD ["/usr/local/bin/python3.11", "-m", "inferctl", "serve", "--spec", "/app/inferctl.yaml", \\
     "--model", "/app/model", "--host", "0.0.0.0"]
"""
PIP_FIRST = """\
FROM {base}
COPY requirements.txt /app/requirements.txt
RUN --mount=type=bind,from=wheels,target=/wheels {pip} --no-index --find-links=/wheels -r /app/requirements.txt
COPY . /app
ENV PYTHONPATH=/app/server
CMD ["/usr/local/bin/python3.11", "-m", "inferctl", "serve", "--spec", "/app/inferctl.yaml", \\
     "--model", "/app/model", "--host", "0.0.0.0"]
"""


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        sys.exit(f"error: {' '.join(map(str, command))} failed\n{done.stdout}{done.stderr}")
    return done.stdout


@dataclass
class Contender:
    """One way to build the image. `build` builds and pushes a tag of `repository`; `known` has the pushed blobs."""

    name: str
    repository: str
    folder: Path
    build: Callable[[str], None]
    known: set[str] = field(default_factory=set)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    pushed: dict[str, list[int]] = field(default_factory=dict)

    @property
    def salt(self) -> int:
        """A number that makes the changes of each contender different: equal blobs would not have to be pushed."""
        return 1 + sum(self.name.encode()) % 997

    def rebuild(self, change: str, turn: int) -> None:
        tag = f"{change}-{turn}"
        start = time.perf_counter()
        self.build(f"{self.repository}:{tag}")
        self.seconds.setdefault(change, []).append(time.perf_counter() - start)
        self.pushed.setdefault(change, []).append(self.new_bytes(tag))

    def new_bytes(self, tag: str) -> int:
        """Return the size of the manifest and of the blobs that no earlier push of this repository had."""
        host, _, name = self.repository.partition("/")
        kinds = "application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.manifest.v1+json"
        request = urllib.request.Request(f"http://{host}/v2/{name}/manifests/{tag}", headers={"Accept": kinds})
        with urllib.request.urlopen(request) as response:
            text = response.read()
            digest = response.headers["Docker-Content-Digest"]
        manifest = json.loads(text)
        sizes = {digest: len(text), **{b["digest"]: b["size"] for b in [manifest["config"], *manifest["layers"]]}}
        new = {d: size for d, size in sizes.items() if d not in self.known}
        self.known |= set(new)
        return sum(new.values())


def plain(template: str, base: str, wheels: Path, folder: Path) -> Callable[[str], None]:
    folder.joinpath("Dockerfile").write_text(template.format(base=base, pip=PIP))

    def build(reference: str) -> None:
        run(
            "docker",
            "buildx",
            "build",
            "--quiet",
            "--network",
            "host",
            "--build-context",
            f"wheels={wheels}",
            "--tag",
            reference,
            folder,
        )
        run("docker", "push", "--quiet", reference)

    return build


def through_inferctl(folder: Path, *flags: str) -> Callable[[str], None]:
    def build(reference: str) -> None:
        command = [
            sys.executable,
            "-m",
            "inferctl",
            "build",
            "--spec",
            folder / "inferctl.yaml",
            "--push",
            "--tag",
            reference,
        ]
        run(*command, "--network", "host", "--no-lint", *flags)

    return build


def prepare(work: Path, model: Path, base: str, wheels: Path, registry: str) -> list[Contender]:
    """Return the contenders, each with the same server, weights and configuration in its own folder."""
    locks = work / "locks"
    run(sys.executable, "-m", "inferctl", "lock", "--base", "cpu", "--wheels", wheels, "--output", locks)
    requirements = "".join((locks / f"{name}.txt").read_text() for name in ("torch", "server"))
    spec = {
        "name": "minilm",
        "model": {"source": "model", "weights": "bake"},
        "serve": {"precision": "bf16", "max_batch_tokens": 4096},
        "image": {"base": "cpu", "base_image": base, "wheels": str(wheels), "locks": str(locks)},
    }
    unique = uuid.uuid4().hex[:8]
    contenders = []
    for name in ("inferctl", "inferctl, verified", "plain", "plain, pip first"):
        folder = work / name.replace(", ", "-").replace(" ", "-")
        folder.mkdir()
        shutil.copytree(model, folder / "model")
        spec["model"] = {"source": str(folder / "model"), "weights": "bake"}
        repository = f"{registry}/rebuild-{unique}/{folder.name}"
        if name.startswith("inferctl"):
            build = through_inferctl(folder, *([] if name.endswith("verified") else ["--no-verify"]))
        else:
            (folder / "requirements.txt").write_text(requirements)
            shutil.copytree(
                ROOT / "inferctl", folder / "server" / "inferctl", ignore=shutil.ignore_patterns("__pycache__")
            )
            build = plain(PLAIN if name == "plain" else PIP_FIRST, base, wheels, folder)
        (folder / "inferctl.yaml").write_text(yaml.safe_dump(spec))
        contenders.append(Contender(name, repository, folder, build))
    return contenders


def change(contender: Contender, what: str, turn: int) -> None:
    if what == "config":
        file = contender.folder / "inferctl.yaml"
        spec = yaml.safe_load(file.read_text())
        spec["serve"]["max_batch_tokens"] = 1000 * (turn + 2) + contender.salt
        file.write_text(yaml.safe_dump(spec))
    if what == "weights":
        # The last bytes are weights of one layer. The change is small, and the model stays usable.
        with (contender.folder / "model" / "model.safetensors").open("r+b") as stream:
            stream.seek(-4 * (turn + 1), os.SEEK_END)
            stream.write(contender.salt.to_bytes(4, "little"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--wheels", type=Path, help="folder with all wheels (default: download them)")
    parser.add_argument("--registry", default="localhost:5000")
    parser.add_argument("--base", default="localhost:5000/base:trixie-python3.11")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "all-MiniLM-L6-v2")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        wheels = (options.wheels or download(work / "wheels")).resolve()
        contenders = prepare(work, options.model, options.base, wheels, options.registry)
        for contender in contenders:
            print(f"first build: {contender.name} ...", flush=True)
            contender.rebuild("first", 0)
        for turn in range(options.repeats):
            for what in CHANGES:
                # Every second turn runs in reverse order, so that a drift of the machine affects all equally.
                for contender in contenders if turn % 2 == 0 else reversed(contenders):
                    change(contender, what, turn)
                    contender.rebuild(what, turn)
                    print(
                        f"{what:8} {contender.name:18} {contender.seconds[what][-1]:7.1f} s "
                        f"{contender.pushed[what][-1]:12,} bytes",
                        flush=True,
                    )
    report(contenders, options.repeats)
    if options.json:
        options.json.write_text(
            json.dumps({c.name: {"seconds": c.seconds, "bytes_pushed": c.pushed} for c in contenders}, indent=2) + "\n"
        )


def download(folder: Path) -> Path:
    from inferctl.facts import catalog
    from inferctl.image import locks

    wanted = [f"torch=={catalog.stack(catalog.base('cpu').stack).torch}", *locks.declared_requirements("serve")]
    run(sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder, *wanted)
    return folder


def report(contenders: list[Contender], repeats: int) -> None:
    print(f"\nmedians of {repeats} (first: one build, layers of other runs may be cached)\n")
    print(f"{'change':10}{'':20}{'seconds':>9}{'bytes pushed':>15}{'time, plain = 1':>18}")
    plain_seconds = {
        what: statistics.median(next(c for c in contenders if c.name == "plain").seconds[what])
        for what in ("first", *CHANGES)
    }
    for what in ("first", *CHANGES):
        for contender in contenders:
            seconds = statistics.median(contender.seconds[what])
            pushed = int(statistics.median(contender.pushed[what]))
            print(f"{what:10}{contender.name:20}{seconds:9.1f}{pushed:15,}{seconds / plain_seconds[what]:18.2f}")


if __name__ == "__main__":
    main()
