"""Tests the rendered Dockerfile on the real engine: missing contexts, and apt with a certificate authority."""

from __future__ import annotations

import ssl
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trustme

from inferctl.config import settings
from inferctl.facts import catalog
from inferctl.image import locks, render
from inferctl.models.weights_folders import weights_folders
from tests.http_servers import Handler, serving

pytestmark = pytest.mark.docker
LOCK = f"nothing==1 --hash=sha256:{'0' * 64}\n"


def rendered(folder: Path, base_image: str, base: catalog.BaseImage, **flags: Any) -> Path:
    """Render the build context for `base` on `base_image`, without the server's own files."""
    given = {"model.source": "org/m", "name": "m", "image.base_image": base_image}
    spec = settings.resolve(None, {}, {**given, **{k.replace("__", "."): v for k, v in flags.items()}}).spec
    known = [replace(each, sha256="0" * 64) for each in weights_folders(spec)]
    found = render.render(spec, base, catalog.stack(base.stack), locks.Locks(LOCK, LOCK), render.Provenance(), known)
    for name, content in {"Dockerfile": found.dockerfile.encode(), **found.files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def build(folder: Path, target: str, *flags: str) -> str:
    """Build `target` and return the error, empty on success."""
    command = ["docker", "buildx", "build", "--no-cache", "--network", "host", "--progress", "plain", *flags]
    command += ["--output", "type=cacheonly", "--target", target, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    return done.stderr if done.returncode else ""


@pytest.mark.parametrize(("target", "context"), [("weights", "model"), ("torch", "wheels")])
def test_a_build_without_its_named_context_fails_with_a_clear_error_and_pulls_nothing(
    base_image: str, tmp_path: Path, target: str, context: str
) -> None:
    (tmp_path / "m").mkdir()
    flags = {"model__weights": "bake", "model__source": str(tmp_path / "m"), "image__wheels": "./wheels"}
    folder = rendered(tmp_path / "context", base_image, catalog.base("cpu"), **flags)
    said = build(folder, target)
    assert f"pass --build-context {context}=DIR" in said
    assert "docker.io" not in said


def test_a_named_context_replaces_the_empty_stage(base_image: str, minilm: Path, tmp_path: Path) -> None:
    flags = {"model__weights": "bake", "model__source": str(minilm)}
    folder = rendered(tmp_path, base_image, catalog.base("cpu"), **flags)
    assert build(folder, "weights", "--build-context", f"model={minilm}") == ""


@pytest.fixture
def mirror() -> Iterator[tuple[int, trustme.CA, list[str]]]:
    """An HTTPS server with its own certificate authority: its port, the authority, and the requested paths."""
    authority, requests = trustme.CA(), []

    class Mirror(Handler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_error(404)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    with serving(Mirror, context) as port:
        yield port, authority, requests


def test_apt_uses_a_mirror_with_a_private_certificate_authority(
    base_image: str, tmp_path: Path, mirror: tuple[int, trustme.CA, list[str]]
) -> None:
    port, authority, requests = mirror
    own = f"inferctl-test/{uuid.uuid4().hex}:x"
    source = (
        f"RUN rm -rf /etc/apt/sources.list* && echo 'deb https://localhost:{port} x main' > /etc/apt/sources.list\n"
    )
    (tmp_path / "Dockerfile").write_text(f"FROM {base_image}\n{source}")
    subprocess.run(["docker", "buildx", "build", "--quiet", "--load", "--tag", own, tmp_path], check=True)
    try:
        base = replace(
            catalog.base("cuda13.0"), python=catalog.PythonInstall("3.12", "/usr/bin/python3.12", ("hello",))
        )
        folder = rendered(tmp_path / "context", own, base)
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        assert "certificate" in build(folder, "python").lower()
        assert requests == []
        build(folder, "python", "--secret", f"id=ca,src={tmp_path / 'ca.pem'}")
        assert "/dists/x/InRelease" in requests
    finally:
        subprocess.run(["docker", "image", "rm", "--force", own], capture_output=True, check=False)


def test_a_base_with_the_interpreter_needs_no_apt(base_image: str, tmp_path: Path) -> None:
    """The network is off, as in an air-gapped build."""
    python = catalog.PythonInstall("3.11", "/usr/local/bin/python3.11", ("hello",))
    folder = rendered(tmp_path, base_image, replace(catalog.base("cuda13.0"), python=python))
    assert build(folder, "installer", "--network", "none") == ""
