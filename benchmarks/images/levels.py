"""Measure what compressing a layer costs: seconds, CPU seconds and bytes for gzip and for each level of zstd.

    benchmarks/images/levels.py FOLDER --engine-pid PID [--repeats N] [--levels 1,3,7,11] [--builder NAME]

FOLDER holds the files of one layer, such as /opt/inferctl/torch of an image. The builder must be able to write OCI
archives; PID is that of the process that compresses (dockerd or buildkitd). Each build copies FOLDER anew, so that no
earlier blob is reused. The rows are measured in turn and printed as medians. Seconds include reading the files from the
snapshot, hashing, and writing the archive. The last column is pure decompression, by `gzip -d` and `zstd -d`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

DECOMPRESS = {"+gzip": ["gzip", "-dc"], "+zstd": ["zstd", "-dc", "-q"]}


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process and its descendants, with those that ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    threads = Path(f"/proc/{pid}/task").glob("*/children")  # each thread has its own children
    children = [child for thread in threads for child in thread.read_text().split()]
    # Fields 14 to 17 of proc(5): user and system time, of the process and of ended children, in ticks of 10 ms.
    return sum(map(int, fields[11:15])) / 100 + sum(cpu_seconds(int(child)) for child in children)


def measure(folder: Path, fields: str, pid: int, builder: list[str], work: Path) -> tuple[float, float, int, float]:
    """Return seconds and CPU seconds of one build, the bytes of the layer, and the CPU seconds to decompress it."""
    archive = work / "image.tar"
    command = ["docker", "buildx", "build", *builder, "--no-cache", "--provenance=false", "--progress=quiet"]
    command += ["--build-context", f"layer={folder}", "--output", f"type=oci,dest={archive},{fields}", str(work)]
    cpu, start = cpu_seconds(pid), time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds, cpu = time.monotonic() - start, cpu_seconds(pid) - cpu
    with tarfile.open(archive) as opened:

        def read(digest: str) -> bytes:
            member = opened.extractfile(f"blobs/{digest.replace(':', '/')}")
            assert member is not None
            return member.read()

        index = opened.extractfile("index.json")
        assert index is not None
        (entry,) = json.load(index)["manifests"]
        (layer,) = json.loads(read(entry["digest"]))["layers"]
        blob = work / "blob"
        blob.write_bytes(read(layer["digest"]))
    archive.unlink()
    decompress = DECOMPRESS[layer["mediaType"][-5:]]
    timed = ["bash", "-c", 'TIMEFORMAT="%U %S"; time "$@" > /dev/null', "-", *decompress, str(blob)]
    spent = subprocess.run(timed, check=True, capture_output=True, text=True).stderr.split()
    return seconds, cpu, int(layer["size"]), sum(map(float, spent))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engine-pid", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    # BuildKit knows four levels of zstd: 0-2, 3-6, 7-8, 9-22 (https://github.com/docker/docs/issues/23757).
    parser.add_argument("--levels", default="1,3,7,11")
    parser.add_argument("--builder")
    given = parser.parse_args()
    rows = {f"zstd {level}": f"compression=zstd,compression-level={level}" for level in given.levels.split(",")}
    rows = {"gzip": "compression=gzip", **rows}
    builder = ["--builder", given.builder] if given.builder else []
    found: dict[str, list[tuple[float, float, int, float]]] = {name: [] for name in rows}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "Dockerfile").write_text("FROM scratch\nCOPY --from=layer . /\n")
        measure(given.folder, "compression=zstd", given.engine_pid, builder, work)  # sends the files to the builder
        for _ in range(given.repeats):
            for row, fields in rows.items():
                found[row].append(measure(given.folder, fields, given.engine_pid, builder, work))
    print("| compression | seconds | CPU seconds | bytes | CPU seconds to decompress |\n|---|---|---|---|---|")
    for row, runs in found.items():
        seconds, cpu, size, unpack = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"| {row} | {seconds:.1f} | {cpu:.1f} | {size / 1e6:.1f} MB | {unpack:.2f} |")


if __name__ == "__main__":
    main()
