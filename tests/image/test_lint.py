"""Each lint finds the fault it is for, says the reason and the fix, and stays silent without it."""

from __future__ import annotations

import datetime
import io
import tarfile
from collections.abc import Iterator
from dataclasses import replace

import pytest

from inferctl import catalog
from inferctl.image import layers, lint
from inferctl.spec import Spec

TODAY = datetime.date(2026, 1, 1)
COMMIT = "0" * 40
CLEAN = "FROM x\nENV PYTHONPATH=/a HOME=/tmp TOKENIZERS_PARALLELISM=false\nUSER 10001\n"
PINNED = replace(catalog.base("cuda12.8"), digest="sha256:" + "0" * 64)
STACK = catalog.stack("torch2.10-cu128")


def spec(**sections: dict[str, str]) -> Spec:
    return Spec.model_validate({"name": "m", "model": {"source": "org/name", "revision": COMMIT}, **sections})


def codes(found: list[lint.Finding]) -> list[tuple[str, str]]:
    for finding in found:
        assert finding.reason
        assert finding.fix
    return [(finding.code, finding.level) for finding in found]


def plan(
    what: Spec, base: catalog.BaseImage = PINNED, dockerfile: str = CLEAN, *, hub: bool = True
) -> list[tuple[str, str]]:
    return codes(lint.plan(what, base, STACK, dockerfile, TODAY, hub_model=hub))


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert plan(spec()) == []
    assert (
        lint.built({"PATH": "/bin", "TOKENIZERS_PARALLELISM": "false"}, "10001:10001", layers.Waste(10, 10**9, ()))
        == []
    )


def test_a_base_with_the_libraries_of_the_wheels_ships_cuda_twice() -> None:
    assert plan(spec(), replace(PINNED, ships=("cudart", "cublas", "cudnn"))) == [("cuda-twice", "warning")]


def test_a_base_that_brings_torch_does_not_ship_cuda_twice() -> None:
    assert plan(spec(), replace(PINNED, ships=("cublas",), provides=("torch",))) == []


def test_a_base_without_digest_floats_and_a_pinned_mirror_does_not() -> None:
    floating = replace(PINNED, digest=None)
    assert plan(spec(), floating) == [("floating-base", "warning")]
    mirrored = spec(image={"base_image": f"r.example.com/cuda@sha256:{'1' * 64}"})
    assert plan(mirrored, floating) == []


@pytest.mark.parametrize(("weights", "level"), [("bake", "error"), ("download", "error"), ("mount", "warning")])
@pytest.mark.parametrize("revision", [None, "main", "v1.0"])
def test_a_hub_model_without_a_commit_floats(weights: str, level: str, revision: str | None) -> None:
    model = {"source": "org/name", "weights": weights, **({"revision": revision} if revision else {})}
    assert plan(spec(model=model)) == [("floating-model", level)]


def test_a_local_folder_does_not_float() -> None:
    assert plan(spec(model={"source": "org/name"}), hub=False) == []


@pytest.mark.parametrize(("end", "found"), [("2025-12-31", True), ("2026-03-01", True), ("2027-01-01", False)])
def test_the_end_of_life_of_a_base_is_told_in_time(end: str, found: bool) -> None:
    base = replace(PINNED, end_of_life=datetime.date.fromisoformat(end))
    assert plan(spec(), base) == ([("base-end-of-life", "warning")] if found else [])


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
def test_secrets_in_the_dockerfile_stop_the_build(line: str) -> None:
    assert set(plan(spec(), dockerfile=f"{CLEAN}{line}\n")) == {("secret-in-image", "error")}


def test_secrets_in_the_environment_of_the_image_stop_it() -> None:
    found = lint.built({"HF_TOKEN": "x", "EMPTY_TOKEN": ""}, "10001", None)
    assert codes(found) == [("secret-in-image", "error")]
    assert "HF_TOKEN" in found[0].message


@pytest.mark.parametrize("user", ["", "0", "root", "root:root", "0:0"])
def test_root_stops_it(user: str) -> None:
    assert codes(lint.built({}, user, None)) == [("runs-as-root", "error")]


def tar(files: dict[str, int], compressed: bool = False) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz" if compressed else "w") as archive:
        for name, length in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = length
            archive.addfile(entry, io.BytesIO(b"x" * length))
    return out.getvalue()


def saved(*contents: bytes) -> Iterator[bytes]:
    """An archive as `docker save` writes it: blobs first, the manifest that orders them last; in chunks of odd length."""
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


@pytest.mark.parametrize("compressed", [False, True])
def test_files_overwritten_or_deleted_by_a_later_layer_are_waste(compressed: bool) -> None:
    bottom = tar(
        {"app/model.bin": 2_000_000, "app/kept": 10, "tmp/cache/a": 300_000, "tmp/cache/b": 200_000}, compressed
    )
    top = tar({"app/model.bin": 2_000_000, "tmp/.wh.cache": 0, "app/new": 5}, compressed)
    waste = layers.analyse(saved(bottom, top))
    assert waste.bytes == 2_500_000
    assert waste.total == 4_500_015
    assert [(file.path, file.how, file.layer) for file in waste.files] == [
        ("/app/model.bin", "overwritten", 0),
        ("/tmp/cache/a", "deleted", 0),
        ("/tmp/cache/b", "deleted", 0),
    ]
    found = lint.built({}, "10001", waste)
    assert codes(found) == [("wasted-bytes", "warning")]
    assert "/app/model.bin (2.0 MB, overwritten)" in found[0].reason


def test_an_opaque_folder_hides_all_that_was_in_it_but_not_what_comes_with_it() -> None:
    waste = layers.overlay([{"d/a": 7, "d/s/b": 5, "e": 1}, {"d/.wh..wh..opq": 0, "d/a": 3}])
    assert waste.bytes == 12
    assert waste.total == 16


def test_a_file_written_once_more_counts_once_for_each_hidden_copy() -> None:
    assert layers.overlay([{"a": 4}, {"a": 4}, {".wh.a": 0}]).bytes == 8
