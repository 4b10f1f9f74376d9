"""The Python environments of the check, and the wheels for a GPU machine without a network.

    python benchmarks/gpu_check/stacks.py FOLDER [--python 3.12] [--limit MIB] [--without NAME,...]

downloads what inferctl needs beside torch and the libraries of CUDA. With --limit, this checkout and the wheels have
at most so many MiB together: what a machine with torch usually has is left out as far as necessary. `machine` is the
Python that runs the check, with the packages that it lacks from such a folder. `locked` is the stack of the images. `newest` has the newest torch.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import zipfile
from pathlib import Path

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "base-images" / "locks" / "torch2.13-cu130"
EXTRAS = ("serve", "wordpiece", "bench", "gpu")
CUDA = "130"  # of the libraries of bitsandbytes that remain in its wheel
INSTALL_S = 600.0  # of one call of pip, which downloads 3 GB
# Left out, in this order, if the wheels are too large. A machine with torch usually has them.
_DISPENSABLE = ("numpy", "transformers", "tokenizers", "hf-xet", "safetensors", "regex")
# Prints the version of each package that is named; null if it is not installed.
_VERSIONS = """import json, sys
from importlib.metadata import distributions
found = {(d.metadata["Name"] or "").lower().replace("_", "-"): d.version for d in distributions()}
print(json.dumps({name: found.get(name) for name in sys.argv[1:]}))
"""
_NEVER = re.compile(r"(torch|triton|nvidia-(?!ml-py).*|cuda-.*)$")


class CannotInstallError(Exception):
    """The environment cannot be made. The message has the reason."""


def requirements(extras: tuple[str, ...] = EXTRAS) -> list[str]:
    """Return what pyproject.toml requires for serving and measuring, without torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [*project["dependencies"], *(each for extra in extras for each in project["optional-dependencies"][extra])]
    return [each for each in dict.fromkeys(found) if not _NEVER.match(name_of(each))]


def name_of(requirement: str) -> str:
    """Return the normalized name of a requirement or of a wheel's file."""
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[; ]", requirement, maxsplit=1)[0]).lower()


def check(python: Path) -> str:
    """Return the version of torch of a Python. Raises `CannotInstallError` for what it lacks, in place of each step."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["serve"], *(r for r in extras["bench"] if name_of(r) == "psutil")]
    versions = json.loads(_run(str(python), "-c", _VERSIONS, *map(name_of, needed)))
    missing = [requirement for requirement in needed if not _satisfies(versions[name_of(requirement)], requirement)]
    if missing:
        raise CannotInstallError(
            f"{python} lacks {', '.join(missing)}. Where there is a network, run `make gpu-wheels`, "
            "and pass the folder with --wheels"
        )
    return str(versions["torch"])


def _satisfies(version: str | None, requirement: str) -> bool:
    least = re.search(r">=([\d.]+)", requirement)
    numbers = [[int(n) for n in re.findall(r"\d+", text)[:3]] for text in (version or "", least[1] if least else "")]
    return version is not None and numbers[0] >= numbers[1]


def shipped_torch() -> str:
    """Return the version of torch in the images."""
    return re.findall(r"^torch==([\d.]+)", (LOCK / "torch.txt").read_text(encoding="utf-8"), re.MULTILINE)[0]


def download(folder: Path, python: str, limit_bytes: int | None, without: set[str]) -> list[Path]:
    """Download the wheels into `folder`, and return them. Leaves out dispensable ones above the limit.

    Raises `CannotInstallError` if pip fails, or what remains is too large.
    """
    files = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        capture_output=True, text=True, check=False,
    ).stdout.split("\0")  # fmt: skip
    checkout = sum(file.stat().st_size for name in files if name and (file := ROOT / name).is_file())
    print(f"{checkout / MIB:8.1f} MiB  this checkout, without ignored files")
    platform = ["--python-version", python, "--only-binary", ":all:", "--implementation", "cp"]
    for tag in (*(f"manylinux_2_{minor}" for minor in range(28, 16, -1)), "manylinux2014"):
        platform += ["--platform", f"{tag}_x86_64"]
    with tempfile.TemporaryDirectory() as target:
        report = _pip(
            "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", "--target", target, *platform,
            *requirements(),
        )  # fmt: skip
    exact = [f"{each['metadata']['name']}=={each['metadata']['version']}" for each in json.loads(report)["install"]]
    wanted = [each for each in exact if not _NEVER.match(name_of(each)) and name_of(each) not in without]
    wanted += [] if "bitsandbytes" in without else requirements(("int8",))[-1:]
    folder.mkdir(parents=True, exist_ok=True)
    _pip("download", "--quiet", "--no-deps", "--dest", str(folder), *platform, *wanted)
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        if _package(wheel) == "bitsandbytes":
            _remove_libraries(wheel)
    for name in _DISPENSABLE:
        if limit_bytes and checkout + total(wheels) > limit_bytes:
            for wheel in [wheel for wheel in wheels if _package(wheel) == name]:
                print(f"{wheel.stat().st_size / MIB:8.1f} MiB  left out, the machine must have it: {wheel.name}")
                wheel.unlink()
                wheels.remove(wheel)
    if limit_bytes and checkout + total(wheels) > limit_bytes:
        largest = sorted(wheels, key=lambda wheel: -wheel.stat().st_size)[:5]
        sizes = ", ".join(f"{_package(wheel)} {wheel.stat().st_size / MIB:.1f}" for wheel in largest)
        raise CannotInstallError(
            f"the checkout has {checkout / MIB:.1f} MiB and the wheels {total(wheels) / MIB:.1f}, above the limit of "
            f"{limit_bytes / MIB:g}; the largest are {sizes}. Leave out with --without what the machine has"
        )
    return wheels


def _package(wheel: Path) -> str:
    return name_of(wheel.name.replace("-", " ", 1))


def _remove_libraries(wheel: Path) -> None:
    """Remove the libraries of other devices and versions of CUDA, which are nine tenths of bitsandbytes."""
    slim = wheel.with_suffix(".tmp")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            if not name.endswith(".so") or name.endswith((f"_cuda{CUDA}.so", "_cpu.so")):
                target.writestr(name, source.read(name))
    slim.replace(wheel)


def total(wheels: list[Path]) -> int:
    return sum(wheel.stat().st_size for wheel in wheels)


def python_of(stack: str, folder: Path, wheels: Path | None) -> Path:
    """Return the Python of a stack, and create its environment in `folder`. Raises `CannotInstallError`."""
    environment = folder / f"venv-{stack}"
    python = environment / "bin" / "python"
    if stack == "machine":
        if wheels is None:
            return Path(sys.executable)
        _run(sys.executable, "-m", "venv", "--without-pip", "--clear", str(environment))
        # Also if this Python is in a virtual environment, of which `--system-site-packages` would skip the packages.
        site = next((environment / "lib").glob("python*/site-packages"))
        paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *_site_packages()}
        (site / "machine.pth").write_text("".join(f"{path}\n" for path in sorted(paths)))
        brought = {_package(wheel) for wheel in wheels.glob("*.whl")}
        wanted = [each for each in requirements((*EXTRAS, "int8")) if name_of(each) in brought]
        _pip("--python", str(python), "install", "--quiet", "--no-index", "--find-links", str(wheels), *wanted)
        return python
    interpreter = shutil.which("python3.12") if stack == "locked" else sys.executable
    if interpreter is None:
        raise CannotInstallError("the lock is for Python 3.12, and python3.12 is not on PATH")
    _run(interpreter, "-m", "venv", "--clear", str(environment))
    install = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    if stack == "locked":
        locks = [f"--requirement={LOCK / name}" for name in ("torch.txt", "server.txt", "int8.txt")]
        _run(*install, "--require-hashes", "--no-deps", *locks)
        # What the image lacks: the load generator and the command line. They must not change what it has.
        frozen = environment / "locked.txt"
        frozen.write_text(_run(str(python), "-m", "pip", "freeze"))
        _run(*install, "--constraint", str(frozen), *requirements())
    else:
        _run(*install, "--upgrade", "torch", *requirements((*EXTRAS, "int8")))
    return python


def _site_packages() -> list[str]:
    return [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]


def _pip(*arguments: str) -> str:
    return _run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)


def _run(*command: str) -> str:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_S)
    except subprocess.TimeoutExpired:
        raise CannotInstallError(f"`{' '.join(command[:5])} ...` took longer than {INSTALL_S:.0f} s") from None
    if ran.returncode:
        lines = [line for line in ran.stderr.splitlines() if line.strip()] or [f"exit code {ran.returncode}"]
        raise CannotInstallError(next((line for line in reversed(lines) if "ERROR" in line), lines[-1]).strip())
    return ran.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}", help="of the GPU machine")
    parser.add_argument(
        "--limit", type=float, help="MiB of checkout and wheels: leave out what is dispensable above it"
    )
    parser.add_argument("--without", default="", help="names of packages that the GPU machine has")
    options = parser.parse_args()
    limit = int(options.limit * MIB) if options.limit else None
    try:
        wheels = download(options.folder, options.python, limit, {name_of(n) for n in options.without.split(",") if n})
    except CannotInstallError as error:
        sys.exit(f"error: {error}")
    for wheel in wheels:
        print(f"{wheel.stat().st_size / MIB:8.1f} MiB  {wheel.name}")
    print(f"{total(wheels) / MIB:8.1f} MiB  in {len(wheels)} wheels for Python {options.python}: {options.folder}")


if __name__ == "__main__":
    main()
