"""Tests that each lint finds its problem and reports nothing without it."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator

import pytest

from inferctl.image import layers, lint
from inferctl.models.fit import Finding

if sys.version_info >= (3, 14):
    import tarfile
else:
    from backports.zstd import tarfile

CLEAN = "FROM x\nENV PYTHONPATH=/a HOME=/tmp TOKENIZERS_PARALLELISM=false\nUSER 10001\n"


def codes(found: Iterable[Finding]) -> list[tuple[str, str]]:
    told = list(found)
    for finding in told:
        assert finding.why
        assert finding.hint
    return [(finding.topic, finding.level) for finding in told]


def test_a_valid_image_has_no_findings() -> None:
    assert codes(lint.secrets_in_dockerfile(CLEAN)) == []
    assert (
        lint.check_built_image(
            {"PATH": "/bin", "TOKENIZERS_PARALLELISM": "false"}, "10001:10001", layers.Waste(10, 10**9, ())
        )
        == []
    )


@pytest.mark.parametrize(
    "line",
    [
        "ARG HF_TOKEN",
        "ARG PIP_PASSWORD=x",
        "ENV API_KEY=abc PATH=/x",
        "ENV A=1 \\\n    AWS_SECRET_ACCESS_KEY=x",
        "ENV PIP_INDEX_URL=https://user:pass@index.example.com/simple",
        "LABEL note=hf_abcdefghijklmnopqrstuvwxyz",
    ],
)
def test_secrets_in_the_dockerfile_are_errors(line: str) -> None:
    assert set(codes(lint.secrets_in_dockerfile(f"{CLEAN}{line}\n"))) == {("secret-in-image", "error")}


def test_secrets_in_the_environment_of_the_image_are_errors() -> None:
    found = lint.check_built_image({"HF_TOKEN": "x", "EMPTY_TOKEN": ""}, "10001", None)
    assert codes(found) == [("secret-in-image", "error")]
    assert "HF_TOKEN" in found[0].what


@pytest.mark.parametrize("user", ["", "0", "root", "root:root", "0:0"])
def test_an_image_that_runs_as_root_is_an_error(user: str) -> None:
    assert codes(lint.check_built_image({}, user, None)) == [("runs-as-root", "error")]


def tar(files: dict[str, int], compression: str = "") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{compression}") as archive:
        for name, length in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = length
            archive.addfile(entry, io.BytesIO(b"x" * length))
    return out.getvalue()


def saved(*contents: bytes) -> Iterator[bytes]:
    """Yield an archive as from `docker save`, with the manifest after the blobs, in chunks of odd length."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for number, content in enumerate(contents):
            entry = tarfile.TarInfo(f"blobs/sha256/{9 - number}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        names = ",".join(f'"blobs/sha256/{9 - number}"' for number in range(len(contents)))
        manifest = f'[{{"Layers":[{names}]}}]'.encode()
        entry = tarfile.TarInfo("manifest.json")
        entry.size = len(manifest)
        archive.addfile(entry, io.BytesIO(manifest))
    data = out.getvalue()
    return (data[at : at + 4097] for at in range(0, len(data), 4097))


@pytest.mark.parametrize("compression", ["", "gz", "zst"])
def test_files_overwritten_or_deleted_by_a_later_layer_are_waste(compression: str) -> None:
    bottom = tar(
        {
            "app/model.bin": 2_000_000,
            "app/kept": 10,
            "tmp/cache/a": 300_000,
            "tmp/cache/b": 200_000,
            "tmp/cache.kept": 10,
        },
        compression,
    )
    top = tar({"app/model.bin": 2_000_000, "tmp/.wh.cache": 0, "app/new": 5}, compression)
    waste = layers.analyze(saved(bottom, top))
    assert waste.bytes == 2_500_000
    assert waste.total == 4_500_025
    assert [(file.path, file.how, file.layer) for file in waste.files] == [
        ("/app/model.bin", "overwritten", 0),
        ("/tmp/cache/a", "deleted", 0),
        ("/tmp/cache/b", "deleted", 0),
    ]
    found = lint.check_built_image({}, "10001", waste)
    assert codes(found) == [("wasted-bytes", "warn")]
    assert "/app/model.bin (2.0 MB, overwritten)" in found[0].why


def test_an_opaque_folder_hides_files_of_lower_layers_only() -> None:
    waste = layers.overlay([{"d/a": 7, "d/s/b": 5, "e": 1}, {"d/.wh..wh..opq": 0, "d/a": 3}])
    assert waste.bytes == 12
    assert waste.total == 16


def test_each_hidden_copy_of_a_file_counts() -> None:
    assert layers.overlay([{"a": 4}, {"a": 4}, {".wh.a": 0}]).bytes == 8
