"""Tests the compression of the layers that a real engine with the containerd store pushes to a real registry."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from inferctl.image import registry
from inferctl.image.docker import DockerEngine
from inferctl.image.events import Note
from inferctl.image.plan import BuildPlan
from inferctl.image.render import Rendered
from tests.http_servers import Handler, serving
from tests.image import tiny

# In the group of tests/project/test_ci_run.py, which uses the same engine.
pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("ci")]
REGISTRY = "localhost:5000"


@pytest.fixture
def docker(exporting_engine: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DockerEngine]:
    """The engine with the containerd store. Images of the test are removed."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{exporting_engine}")
    monkeypatch.setattr(tiny, "mark", uuid.uuid4().hex)
    yield DockerEngine.connect()
    tiny.remove_images()


def image(base: str) -> Rendered:
    """An image with one layer of 20 MB that is equal in each build."""
    text = random.Random(uuid.UUID(tiny.mark).int).randbytes(10_000_000).hex().encode()
    dockerfile = f"""FROM {base} AS made
RUN --mount=type=bind,source=app,target=/context mkdir -p /layer && cp -R /context /layer/app && \\
    chmod -R u=rwX,go=rX /layer && find /layer -exec touch --no-dereference --date=@315532800 {{}} +
FROM {base}
COPY --link --from=made /layer /
LABEL test={tiny.mark}
USER 10001
"""
    return Rendered(dockerfile, "", {"app/text": text}, {}, (), {}, {"SOURCE_DATE_EPOCH": "1700000000"})


def planned(rendered: Rendered, name: str | None = None, **options: object) -> BuildPlan:
    made = tiny.plan(rendered, name=name or f"{REGISTRY}/inferctl-test/{uuid.uuid4().hex[:12]}:x")
    usual = {"verify": False, "push": True, "network": "host", "provenance": False, "sbom": False}
    return tiny.with_options(made, **{**usual, **options})


def layers(reference: str) -> list[tuple[str, str]]:
    """Return media type and digest of each layer in the registry."""
    found = registry.manifest(reference, "linux/amd64")
    return [(str(layer["mediaType"]), str(layer["digest"])) for layer in found["layers"]]


def methods(reference: str) -> list[str]:
    prefix = "application/vnd.oci.image.layer.v1.tar+"
    assert all(kind.startswith(prefix) for kind, _ in layers(reference)), "CRI-O cannot pull Docker's type with zstd"
    return [kind.removeprefix(prefix) for kind, _ in layers(reference)]


def test_new_layers_have_zstd_in_the_image_and_in_the_cache(docker: DockerEngine, base_image: str) -> None:
    rendered, cache = image(base_image), f"{REGISTRY}/inferctl-test/{uuid.uuid4().hex[:12]}:cache"
    _, pushed = tiny.run(docker, planned(rendered, cache_to=(cache,)))
    # Made again without a cache, equal input has equal layers.
    _, again = tiny.run(docker, planned(rendered, no_cache=True))
    assert layers(again.reference) == layers(pushed.reference)
    assert layers(pushed.reference)[0][1] == layers(base_image)[0][1], "those of the base are shared with other images"
    assert methods(pushed.reference) == ["gzip", "zstd"]
    assert pushed.compressions == ("gzip", "zstd")
    stored = registry._raw_manifest(cache)
    kinds = [str(entry["mediaType"]) for entry in stored.get("layers", stored.get("manifests"))]
    assert sum(kind.endswith("zstd") for kind in kinds) >= 3


class OldRegistry(Handler):
    """A registry that has every blob, and accepts manifests without zstd."""

    protocol_version = "HTTP/1.1"
    # Of its reply to the handshake of TLS, which the engine tries first.
    default_request_version = "HTTP/1.1"
    manifests: dict[str, tuple[str, bytes]]

    def reply(self, *given: Any, **headers: str) -> None:
        with suppress(OSError):
            super().reply(*given, **headers)

    def do_GET(self) -> None:
        if "/manifests/" not in self.path:
            return self.reply(200)
        kind, body = self.manifests.get(self.path.rpartition("/")[2], ("", b""))
        digest = f"sha256:{sha256(body).hexdigest()}"
        return self.reply(200, body, content_type=kind, docker_content_digest=digest) if body else self.reply(404)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        body = self.body()
        if b"zstd" in body:
            problem = {"errors": [{"code": "MANIFEST_INVALID", "message": "manifest invalid"}]}
            return self.reply(400, json.dumps(problem).encode())
        digest = f"sha256:{sha256(body).hexdigest()}"
        for name in (digest, self.path.rpartition("/")[2]):
            self.manifests[name] = (self.headers["content-type"], body)
        return self.reply(201, docker_content_digest=digest)


def test_a_registry_that_rejects_zstd_gets_gzip(docker: DockerEngine, base_image: str) -> None:
    rendered = image(base_image)
    OldRegistry.manifests = {}
    with serving(OldRegistry) as port:
        name = f"localhost:{port}/inferctl-test/old:x"
        events, found = tiny.run(docker, planned(rendered, name=name))
        notes = [event.text for event in events if isinstance(event, Note)]
        assert any("the registry does not accept zstd" in note for note in notes), notes
        assert found.compressions == ("gzip",)
