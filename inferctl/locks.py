"""Hashed locks of what an image installs, split so that its layers stay stable: the torch closure, the server's dependencies, int8.

A lock is a requirements file in which every package has its version and hashes; pip installs it with `--require-hashes --no-deps`.
The shipped locks live in `base-images/locks/<stack>/`; `inferctl lock` resolves new ones with uv, from an index or from a folder of wheels.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

from inferctl import assets, catalog
from inferctl.errors import InferctlError, NotReadyError, UsageError

if TYPE_CHECKING:
    from inferctl.catalog import BaseImage, Stack

_UV_PLATFORM = {"linux/amd64": "x86_64-manylinux_2_28", "linux/arm64": "aarch64-manylinux_2_28"}
# What an int8 image needs on top, by whether the stack has CUDA: on CPUs torch's own oneDNN does it.
_INT8: dict[bool, list[str]] = {True: ["bitsandbytes"], False: []}
# Packages that others require and that serving never imports -> what requires them. An image does without them.
# `tests/test_end_to_end.py` compares what a running server has imported with what its image has installed.
LEFT_OUT = {
    "typer": "the command line of inferctl, and that of transformers",
    "annotated-doc": "typer",
    "shellingham": "typer",
    "rich": "the command line of inferctl, and typer",
    "markdown-it-py": "rich",
    "mdurl": "rich",
    "pygments": "rich",
    "docker": "builds of images",
    "requests": "docker",
    "certifi": "requests",
    "charset-normalizer": "requests",
    "urllib3": "docker",
    "networkx": "compilation of models by torch",
    "setuptools": "compilation of C++ extensions by torch",
}


@dataclass(frozen=True)
class Locks:
    """Texts of the requirements files. `torch` is None when the base image brings torch itself."""

    torch: str | None
    server: str
    int8: str | None = None

    def files(self) -> dict[str, bytes]:
        """Build-context path -> content, for the locks that are there."""
        named = {"torch": self.torch, "server": self.server, "int8": self.int8}
        return {f"locks/{name}.txt": text.encode() for name, text in named.items() if text is not None}


def load(base: BaseImage, folder: Path | None, *, int8: bool) -> Locks:
    """The locks for an image on `base`, from `folder` or the shipped ones; `int8` asks for the int8 lock too."""
    cuda = catalog.stack(base.stack).cuda is not None
    where = folder or assets.root() / "base-images" / "locks" / base.stack
    needed = ["server", *([] if "torch" in base.provides else ["torch"]), *(["int8"] if int8 and _INT8[cuda] else [])]
    texts = {name: _read(where / f"{name}.txt") for name in needed}
    if missing := [name for name, text in texts.items() if text is None]:
        raise UsageError(
            f"there is no {missing[0]}.txt in {where}" if folder else f"no locks are shipped for the base {base.key}",
            f"`inferctl lock --base {base.key} --output {folder or 'locks'}`, then image.locks: {folder or 'locks'}",
        )
    return Locks(torch=texts.get("torch"), server=texts["server"] or "", int8=texts.get("int8"))


def _read(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None


@dataclass(frozen=True)
class Target:
    """What locks are resolved for.

    `wheels`: folder that replaces the package index. `index`: one more index, instead of the one that the stack names.
    """

    stack: Stack
    python: str
    platform: str
    wheels: Path | None = None
    index: str | None = None


def resolve(target: Target, provided: tuple[str, ...]) -> Locks:
    """Resolve the locks of `target` with uv. `provided`: packages that the base image brings and the image must not shadow.

    Raises `NotReadyError` without uv, `InferctlError` with uv's own words when there is no solution.
    """
    if util.find_spec("uv") is None:
        raise NotReadyError("uv is not installed", "pip install 'inferctl[lock]'")
    # NVIDIA's containers carry pre-releases that no index has; their own release number stands in for the resolution.
    release = re.match(r"\d+(\.\d+)*", target.stack.torch)
    torch_pin = f"torch=={release.group() if release else target.stack.torch}"
    if target.stack.index and target.stack.cuda is None:
        # Without the local version, PyPI's wheel of the same release would do too, and that one brings CUDA.
        torch_pin += "+cpu"
    wanted = [torch_pin, *served()]
    everything = _compile([*wanted, *_INT8[target.stack.cuda is not None]], [], target)
    pins = [f"{name}=={version}" for name, version in versions(everything).items()]
    closure = versions(_compile([torch_pin], pins, target))
    server = versions(_compile(wanted, pins, target))
    absent = {normalise(name) for name in provided} | set(LEFT_OUT)
    return Locks(
        torch=None if "torch" in absent else select(everything, set(closure) - set(LEFT_OUT)),
        server=select(everything, set(server) - set(closure) - absent),
        int8=select(everything, set(versions(everything)) - set(server) - set(closure) - absent) or None,
    )


def versions(lock: str) -> dict[str, str]:
    """Normalised package name -> version, in the order of the lock."""
    return {
        normalise(m.group(1)): m.group(2)
        for m in re.finditer(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;\\]+)", lock, re.MULTILINE)
    }


def select(lock: str, names: set[str]) -> str:
    """The entries of `lock` for `names` only, hashes included, sorted by name."""
    entries = re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE)
    chosen = [entry.rstrip() for entry in entries if (found := versions(entry)) and next(iter(found)) in names]
    return "".join(f"{entry}\n" for entry in sorted(chosen))


def normalise(name: str) -> str:
    """A package name as PEP 503 compares them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(extra: str) -> list[str]:
    """What inferctl itself declares that it needs: its core dependencies and those of `extra`."""
    found = []
    for line in metadata.requires("inferctl") or []:
        requirement, _, marker = line.partition(";")
        named = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        if named is None or named.group(1) == extra:
            found.append(requirement.strip())
    return found


def served() -> list[str]:
    """What a server needs of what inferctl declares."""
    return [line for line in declared("serve") if normalise(name_of(line)) not in LEFT_OUT]


def name_of(requirement: str) -> str:
    """The package that a requirement line is about: `uvicorn[standard]>=0.34` -> `uvicorn`."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return found.group() if found else requirement


def _compile(requirements: list[str], constraints: list[str], target: Target) -> str:
    if target.platform not in _UV_PLATFORM:
        raise UsageError(
            f"no locks can be resolved for the platform {target.platform}", f"known: {', '.join(_UV_PLATFORM)}"
        )
    from uv import find_uv_bin

    index = target.index or (target.stack.index if target.wheels is None else None)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in.txt").write_text("\n".join(requirements) + "\n")
        (Path(folder) / "pins.txt").write_text("\n".join(constraints) + "\n")
        command = [
            *(find_uv_bin(), "pip", "compile", "in.txt", "--constraint", "pins.txt", "--quiet"),
            *("--no-header", "--no-annotate", "--generate-hashes", "--index-strategy", "unsafe-best-match"),
            *("--python-version", target.python, "--python-platform", _UV_PLATFORM[target.platform]),
            *(["--no-index", "--find-links", str(target.wheels.resolve())] if target.wheels else []),
            *(["--index", index] if index else []),
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InferctlError(
            f"uv found no versions for the stack {target.stack.key}:\n{done.stderr.strip()}",
            "the wheel folder may lack a package or a version"
            if target.wheels
            else "check the network and the index that uv is set up for",
        )
    return done.stdout
