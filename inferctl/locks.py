"""Hashed locks of what an image installs, split so that its layers stay stable: the torch closure, the server's dependencies, int8.

A lock is a requirements file in which every package has its version and hashes; pip installs it with `--require-hashes --no-deps`.
Its first line names the stack, the Python version and the platform that it was resolved for.
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


# How uv reports an index that does not respond, or responds with a failure of its own.
_UNREACHABLE = re.compile(
    r"error sending request|failed to fetch|could not connect|connection (?:refused|reset)|dns error|timed? ?out"
    r"|network (?:is unreachable|connectivity)|HTTP status (?:client|server) error \((?:401|403|407|429|5\d\d)",
    re.IGNORECASE,
)


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

    def versions(self) -> dict[str, str]:
        """Package -> version, of all the locks."""
        return {**versions(self.torch or ""), **versions(self.server), **versions(self.int8 or "")}


def differences(before: Locks, after: Locks) -> list[str]:
    """What changes from one to the other, one package a line."""
    old, new = before.versions(), after.versions()
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return [f"  {name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}" for name in names]


def load(base: BaseImage, folder: Path | None, *, int8: bool) -> Locks:
    """The locks for an image on `base`, from `folder` or the shipped ones; `int8` asks for the int8 lock too."""
    cuda = catalog.stack(base.stack).cuda is not None
    where = folder or assets.root() / "base-images" / "locks" / base.stack
    needed = ["server", *([] if "torch" in base.provides else ["torch"]), *(["int8"] if int8 and _INT8[cuda] else [])]
    texts = {name: _read(where / f"{name}.txt") for name in needed}
    for name, text in texts.items():
        _refuse_foreign(where / f"{name}.txt", text or "", base)
    if missing := [name for name, text in texts.items() if text is None]:
        raise UsageError(
            f"there is no {missing[0]}.txt in {where}" if folder else f"no locks are shipped for the base {base.key}",
            f"`inferctl lock --base {base.key} --output {folder or 'locks'}`, then image.locks: {folder or 'locks'}",
        )
    return Locks(torch=texts.get("torch"), server=texts["server"] or "", int8=texts.get("int8"))


def header(stack: str, python: str, platform: str) -> str:
    """The first line of a lock."""
    return f"# inferctl lock: stack {stack}, Python {python}, {platform}\n"


def _refuse_foreign(file: Path, text: str, base: BaseImage) -> None:
    """Raise `UsageError` for the lock of another stack or Python than those of `base`.

    A lock without a header is judged by its torch.
    """
    hint = f"`inferctl lock --base {base.key} --output DIR` resolves locks for it"
    if found := re.match(r"# inferctl lock: stack (\S+), Python (\S+), (\S+)$", text, re.MULTILINE):
        if (found.group(1), found.group(2)) != (base.stack, base.python.version):
            raise UsageError(
                f"{file} is a lock for {found.group(1)} and Python {found.group(2)}, "
                f"and the base {base.key} has {base.stack} and Python {base.python.version}",
                hint,
            )
    elif torch := versions(text).get("torch"):
        stack = catalog.stack(base.stack)
        release, _, local = torch.partition("+")
        if release != stack.torch or (local == "cpu") != (stack.cuda is None and stack.index is not None):
            raise UsageError(f"{file} has torch {torch}, and the base {base.key} has torch {stack.torch}", hint)


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


def resolve(
    target: Target, provided: tuple[str, ...], kept: Locks | None = None, upgraded: tuple[str, ...] = ()
) -> Locks:
    """Resolve the locks of `target` with uv. `provided`: packages that the base image brings and the image must not shadow.

    `kept`: locks whose versions stay where they can, except for the packages `upgraded`.

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
    before = "".join(text or "" for text in (kept.torch, kept.server, kept.int8)) if kept else ""
    everything = _compile([*wanted, *_INT8[target.stack.cuda is not None]], [], target, before, upgraded)
    pins = [f"{name}=={version}" for name, version in versions(everything).items()]
    closure = versions(_compile([torch_pin], pins, target))
    server = versions(_compile(wanted, pins, target))
    absent = {normalise(name) for name in provided} | set(LEFT_OUT)
    first = header(target.stack.key, target.python, target.platform)
    int8 = select(everything, set(versions(everything)) - set(server) - set(closure) - absent)
    return Locks(
        torch=None if "torch" in absent else first + select(everything, set(closure) - set(LEFT_OUT)),
        server=first + select(everything, set(server) - set(closure) - absent),
        int8=first + int8 if int8 else None,
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
    chosen = [
        re.sub(r"\n#.*", "", entry.rstrip())
        for entry in entries
        if (found := versions(entry)) and next(iter(found)) in names
    ]
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


def _compile(
    requirements: list[str], constraints: list[str], target: Target, before: str = "", upgraded: tuple[str, ...] = ()
) -> str:
    if target.platform not in _UV_PLATFORM:
        raise UsageError(
            f"no locks can be resolved for the platform {target.platform}", f"known: {', '.join(_UV_PLATFORM)}"
        )
    from uv import find_uv_bin

    index = target.index or (target.stack.index if target.wheels is None else None)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in.txt").write_text("\n".join(requirements) + "\n")
        (Path(folder) / "pins.txt").write_text("\n".join(constraints) + "\n")
        # uv prefers the versions that its output has already.
        (Path(folder) / "out.txt").write_text(before)
        command = [
            *(find_uv_bin(), "pip", "compile", "in.txt", "--constraint", "pins.txt", "--quiet"),
            *("--no-header", "--no-annotate", "--generate-hashes", "--index-strategy", "unsafe-best-match"),
            *("--output-file", "out.txt", *(part for name in upgraded for part in ("--upgrade-package", name))),
            *("--python-version", target.python, "--python-platform", _UV_PLATFORM[target.platform]),
            *(["--no-index", "--find-links", str(target.wheels.resolve())] if target.wheels else []),
            *(["--index", index] if index else []),
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        resolved = (Path(folder) / "out.txt").read_text()
    if done.returncode and _UNREACHABLE.search(done.stderr):
        raise NotReadyError(
            f"uv cannot reach a package index:\n{done.stderr.strip()}",
            "check the network, the proxy and the index that uv is set up for; or pass `--wheels DIR`",
        )
    if done.returncode:
        raise InferctlError(
            f"uv found no versions for the stack {target.stack.key}:\n{done.stderr.strip()}",
            "the wheel folder may lack a package or a version"
            if target.wheels
            else "check the network and the index that uv is set up for",
        )
    return resolved
