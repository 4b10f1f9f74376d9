"""Reads and resolves the hashed locks of the packages in an image.

A lock is a requirements file with the version and the hashes of each package. pip installs it with `--require-hashes
--no-deps`. Its first line names the stack, the Python version and the platform of the lock. Several locks keep the
layers of an image independent: torch and its dependencies, vLLM and its dependencies, the server's dependencies, int8,
and what `inferctl embed` needs. The shipped locks are in `base-images/locks/<stack>/`. `inferctl lock` resolves new
ones with uv, from an index or a folder of wheels.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

from inferctl.core import assets
from inferctl.core.errors import InferctlError, NotReadyError, UsageError, install_hint
from inferctl.facts import catalog

if TYPE_CHECKING:
    from inferctl.facts.catalog import BaseImage, Stack

_UV_PLATFORM = {"linux/amd64": "x86_64-manylinux_2_28", "linux/arm64": "aarch64-manylinux_2_28"}
# Additional packages of an int8 image, by whether the stack has CUDA. On CPUs, oneDNN in torch runs int8.
_INT8: dict[bool, list[str]] = {True: ["bitsandbytes"], False: []}
# What `inferctl embed` imports and the server does not, without what these require.
_EMBED = ("typer", "rich", "pyarrow")
# Packages that images leave out, because the server never imports them -> what requires them. vLLM imports some of
# them, so the lock of vLLM has those that it requires.
# `tests/project/test_end_to_end.py` compares the imports of a running server with the packages in its image.
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
# Packages that vLLM requires but that do not run on a CPU -> the reason.
_NOT_ON_CPU = {
    "torchaudio": "PyPI has the CUDA build only, which does not load with the CPU build of torch",
    "torchcodec": "PyPI has the CUDA build only, which does not load with the CPU build of torch",
    "triton": "it compiles kernels for GPUs; vLLM runs without it",
}

# Messages of uv for an index that does not respond or reports an error.
_UNREACHABLE = re.compile(
    r"error sending request|failed to fetch|could not connect|connection (?:refused|reset)|dns error|timed? ?out"
    r"|network (?:is unreachable|connectivity)|HTTP status (?:client|server) error \((?:401|403|407|429|5\d\d)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Locks:
    """The texts of the locks. `torch` is None if the base image contains it.

    Only a stack for generation has `vllm`, and only others have `int8` and `embed`.
    """

    torch: str | None
    server: str
    int8: str | None = None
    vllm: str | None = None
    embed: str | None = None

    def files(self) -> dict[str, bytes]:
        """Return the content of the existing locks by path in the build context."""
        return {f"locks/{name}.txt": text.encode() for name, text in vars(self).items() if text is not None}

    def versions(self) -> dict[str, str]:
        """Return the version of each package in all locks."""
        return {name: version for text in vars(self).values() for name, version in versions(text or "").items()}


def load(base: BaseImage, folder: Path | None, *, int8: bool, embed: bool = False) -> Locks:
    """Return the locks for an image on `base`, from `folder` or the shipped ones.

    `int8`, `embed`: include this lock, if the stack has it.
    """
    stack = catalog.stack(base.stack)
    source = folder or assets.root() / "base-images" / "locks" / base.stack
    needed = ["server", *([] if "torch" in base.provides else ["torch"])]
    needed += ["vllm"] if stack.vllm else []
    needed += ["int8"] if int8 and _int8(stack) else []
    needed += ["embed"] if embed and not stack.vllm else []
    texts = {name: _read(source / f"{name}.txt") for name in needed}
    for name, text in texts.items():
        _check_target(source / f"{name}.txt", text or "", base)
    if missing := [name for name, text in texts.items() if text is None]:
        raise UsageError(
            f"{missing[0]}.txt not found in {source}" if folder else f"no shipped locks for the base {base.key}",
            f"run `inferctl lock --base {base.key} --output {folder or 'locks'}`, then set image.locks to that folder",
        )
    return Locks(texts.get("torch"), texts["server"] or "", texts.get("int8"), texts.get("vllm"), texts.get("embed"))


def _int8(stack: Stack) -> list[str]:
    """Return the additional packages of an int8 image. vLLM has its own kernels."""
    return [] if stack.vllm else _INT8[stack.cuda is not None]


def header(stack: str, python: str, platform: str) -> str:
    """Return the first line of a lock."""
    return f"# inferctl lock: stack {stack}, Python {python}, {platform}\n"


def _check_target(file: Path, text: str, base: BaseImage) -> None:
    """Raise `UsageError` if the header of the lock is that of another stack or Python version than those of `base`."""
    found = re.match(r"# inferctl lock: stack (\S+), Python (\S+), (\S+)$", text, re.MULTILINE)
    if found and (found.group(1), found.group(2)) != (base.stack, base.python.version):
        raise UsageError(
            f"{file} is a lock for {found.group(1)} and Python {found.group(2)}, "
            f"but the base {base.key} has {base.stack} and Python {base.python.version}",
            f"resolve locks for this base with `inferctl lock --base {base.key} --output DIR`",
        )


def _read(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None


@dataclass(frozen=True)
class LockTarget:
    """The stack, Python version and platform of a lock.

    `wheels`: folder that replaces the package index. `index`: URL of an additional index, instead of the stack's.
    """

    stack: Stack
    python: str
    platform: str
    wheels: Path | None = None
    index: str | None = None


def resolve(target: LockTarget, provided: tuple[str, ...]) -> Locks:
    """Resolve the locks of `target` with uv.

    `provided`: packages in the base image, which the locks must not contain. Raises `NotReadyError` without uv,
    `InferctlError` with the output of uv if there is no solution.
    """
    if util.find_spec("uv") is None:
        raise NotReadyError("uv is not installed", install_hint("lock"))
    # NVIDIA's containers have pre-releases of torch that no index has. Resolve with the release number instead.
    release = re.match(r"\d+(\.\d+)*", target.stack.torch)
    torch_pin = f"torch=={release.group() if release else target.stack.torch}"
    if target.stack.index and target.stack.cuda is None:
        # Without `+cpu`, uv could select the wheel of the same release on PyPI, which includes CUDA.
        torch_pin += "+cpu"
    requirements = server_requirements(target.stack)
    vllm, int8 = [target.stack.vllm] if target.stack.vllm else [], _int8(target.stack)
    embedding = [line for line in declared_requirements("embed") if name_of(line) in _EMBED and not target.stack.vllm]
    everything = _compile([torch_pin, *requirements, *vllm, *int8, *embedding], [], target)
    pins = [f"{name}=={version}" for name, version in versions(everything).items()]
    absent = set(_NOT_ON_CPU) if target.stack.cuda is None else set()

    def closure(*of: str) -> set[str]:
        return set(versions(_compile([torch_pin, *of], pins, target))) - absent

    torch, server = closure(), closure(*requirements)
    engine = closure(*vllm) if vllm else set()
    provides = {normalize(name) for name in provided}
    left_out = set(LEFT_OUT) | provides
    parts = {
        "torch": set() if "torch" in provides else torch - left_out,
        "server": server - torch - left_out,
        "int8": closure(*int8) - torch - server - left_out if int8 else set(),
    }
    # vLLM imports some of the packages that images for embeddings leave out.
    parts["vllm"] = engine - parts["torch"] - parts["server"] - provides
    parts["embed"] = closure(*embedding) - torch - parts["server"] - provides if embedding else set()
    first = header(target.stack.key, target.python, target.platform)
    texts = {name: first + select(everything, names) if names else None for name, names in parts.items()}
    return Locks(texts["torch"], texts["server"] or first, texts["int8"], texts["vllm"], texts["embed"])


def versions(lock: str) -> dict[str, str]:
    """Return the version of each package by normalized name, in the order of the lock."""
    return {
        normalize(m.group(1)): m.group(2)
        for m in re.finditer(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;\\]+)", lock, re.MULTILINE)
    }


def select(lock: str, names: set[str]) -> str:
    """Return the entries of `lock` for `names`, with their hashes, sorted by name."""
    entries = re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE)
    chosen = [
        re.sub(r"\n#.*", "", entry.rstrip())
        for entry in entries
        if (found := versions(entry)) and next(iter(found)) in names
    ]
    return "".join(f"{entry}\n" for entry in sorted(chosen))


def normalize(name: str) -> str:
    """Return a package name in the normalized form of PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared_requirements(extra: str) -> list[str]:
    """Return the core dependencies of inferctl and those of its extra `extra`."""
    found = []
    for line in metadata.requires("inferctl") or []:
        requirement, _, marker = line.partition(";")
        named = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        if named is None or named.group(1) == extra:
            found.append(requirement.strip())
    return found


def server_requirements(stack: Stack) -> list[str]:
    """Return the dependencies of inferctl that a server imports. vLLM tokenizes by itself."""
    found = dict.fromkeys(declared_requirements("serve") + ([] if stack.vllm else declared_requirements("wordpiece")))
    return [line for line in found if normalize(name_of(line)) not in LEFT_OUT]


def name_of(requirement: str) -> str:
    """Return the package name of a requirement: `uvicorn[standard]>=0.34` -> `uvicorn`."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return found.group() if found else requirement


def _compile(requirements: list[str], constraints: list[str], target: LockTarget) -> str:
    """Return the output of `uv pip compile`."""
    if target.platform not in _UV_PLATFORM:
        raise UsageError(
            f"locks for the platform {target.platform} are not supported", f"use one of {', '.join(_UV_PLATFORM)}"
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
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if process.returncode and _UNREACHABLE.search(process.stderr):
        raise NotReadyError(
            f"uv cannot reach a package index:\n{process.stderr.strip()}",
            "check the network, the proxy and the index in the uv configuration, or pass `--wheels DIR`",
        )
    if process.returncode:
        raise InferctlError(
            f"uv found no compatible versions for the stack {target.stack.key}:\n{process.stderr.strip()}",
            "check that the wheel folder has all packages and versions"
            if target.wheels
            else "check the index in the uv configuration",
        )
    return process.stdout
