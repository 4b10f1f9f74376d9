"""The Python environments of the check, and the wheels for a GPU machine without a network.

    python benchmarks/gpu_check/stacks.py FOLDER [--python 3.12] [--limit MIB] [--without NAME,...]

downloads what inferctl needs beside torch and the libraries of CUDA. `machine` is the Python that runs the check, with
the packages that it lacks from such a folder. `locked` is the stack of the images. `newest` has the newest torch.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "base-images" / "locks" / "torch2.13-cu130"
EXTRAS = ("serve", "bench", "gpu")
INSTALL_S = 600.0  # of one call of pip, which downloads 3 GB
# Left out first if the wheels are too large: bitsandbytes is only for int8, and a machine with torch has the others.
_DISPENSABLE = ("bitsandbytes", "numpy", "transformers", "tokenizers", "hf-xet", "safetensors", "regex")
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


def download(folder: Path, python: str, limit_bytes: int | None, without: set[str]) -> list[Path]:
    """Download the wheels into `folder`, and return them. Leaves out dispensable ones above the limit.

    Raises `CannotInstallError` if pip fails, or what remains is too large.
    """
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
    for name in _DISPENSABLE:
        if limit_bytes and total(wheels) > limit_bytes:
            for wheel in [wheel for wheel in wheels if name_of(wheel.name.replace("-", " ", 1)) == name]:
                print(f"left out  {wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
                wheel.unlink()
                wheels.remove(wheel)
    if limit_bytes and total(wheels) > limit_bytes:
        raise CannotInstallError(f"the wheels have {total(wheels) / 1e6:.1f} MB: leave out more with --without")
    return wheels


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
        extras = (*EXTRAS, "int8") if any(wheels.glob("bitsandbytes-*")) else EXTRAS
        _pip(
            "--python",
            str(python),
            "install",
            "--quiet",
            "--no-index",
            "--find-links",
            str(wheels),
            *requirements(extras),
        )
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
    parser.add_argument("--limit", type=float, help="leave out what is dispensable above so many MiB")
    parser.add_argument("--without", default="", help="names of packages that the GPU machine has")
    options = parser.parse_args()
    limit = int(options.limit * (1 << 20)) if options.limit else None
    try:
        wheels = download(options.folder, options.python, limit, {name_of(n) for n in options.without.split(",") if n})
    except CannotInstallError as error:
        sys.exit(f"error: {error}")
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 1e6:8.1f} MB  {wheel.name}")
    print(f"{total(wheels) / 1e6:8.1f} MB  in {len(wheels)} wheels for Python {options.python}: {options.folder}")


if __name__ == "__main__":
    main()
