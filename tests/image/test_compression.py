"""Tests which compression a build chooses, and the command line that it gets."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from inferctl.image import buildx, failures

CLASSIC = buildx.Builder((0, 13, 1), "default", "docker", (), False)
CONTAINERD = replace(CLASSIC, containerd_store=True)
CONTAINER = replace(CLASSIC, driver="docker-container")


def test_the_builder_and_the_engine_decide() -> None:
    methods: list[tuple[buildx.Builder, str, buildx.Compression | None]] = [
        (CONTAINERD, "26.1.5+dfsg1", "zstd"),
        (CONTAINER, "23.0.0", "zstd"),
        (CONTAINER, "20.10.25", "gzip"),
        (CONTAINER, "dev", "gzip"),
        (CLASSIC, "28", None),
    ]
    for builder, engine, expected in methods:
        assert buildx.choose_compression(builder, engine) == expected


def test_a_cache_keeps_the_compression_that_it_names() -> None:
    """`test_compression_builds.py` reads those of the image and of other caches from a registry."""
    named = "type=registry,ref=r/c:x,compression=gzip"
    request = buildx.BuildRequest(Path("/c"), cache_to=(named, "type=gha"), compression="zstd")
    command = buildx.command(request, Path("/m.json"))
    assert [after for option, after in itertools.pairwise(command) if option == "--cache-to"] == [named, "type=gha"]


def test_a_rejection_of_the_format_differs_from_other_failures() -> None:
    put = "failed to push r/x:1: unexpected status from PUT request to http://r/v2/x/manifests/1: 400 Bad Request"
    rejects = {
        put: True,
        "failed commit on ref: manifest invalid: manifest invalid": True,
        "MANIFEST_INVALID: unknown media type application/vnd.oci.image.layer.v1.tar+zstd": True,
        "405 Method Not Allowed: Invalid parameter: UnsupportedImageType": True,
        "unexpected status: 503 Service Unavailable": False,
        "unexpected status: 429 Too Many Requests: unsupported rate": False,
        "pull access denied, insufficient_scope: authorization failed": False,
        "no space left on device": False,
    }
    assert {message: failures.rejects_zstd(message) for message in rejects} == rejects


@pytest.mark.parametrize(
    "message",
    [  # Docker Engine 20.10 (aws/amazon-ecs-agent#4179), containerd 1.6 (containerd/containerd#9859)
        "failed to register layer: Error processing tar file(exit status 1): archive/tar: invalid tar header",
        "failed to get stream processor for application/vnd.docker.image.rootfs.diff.tar.zstd: no processor for "
        "media-type: unknown",
    ],
)
def test_an_engine_that_is_too_old_for_zstd_gets_a_hint(message: str) -> None:
    error = failures.pull_error(message, "registry.example.com/x:1")
    assert "Docker Engine 23" in (error.hint or "")
