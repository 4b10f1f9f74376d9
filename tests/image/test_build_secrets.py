"""Tests builds with a private package index and certificate authority: the image contains no trace of the secrets."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import io
import json
import ssl
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trustme
import yaml

from inferctl.config import settings
from inferctl.facts import catalog
from inferctl.image import locks, render
from tests.http_servers import Handler, serving
from tests.processes import execute, inferctl

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(300)]

USER, PASSWORD = "builder", "s3cret-token-0451"


class Index(Handler, http.server.SimpleHTTPRequestHandler):
    """A package index (simple repository API) with a password, for a folder of `<project>/<wheel>`."""

    def do_GET(self) -> None:
        expected = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") != expected:
            self.reply(401, www_authenticate='Basic realm="index"')
        else:
            super().do_GET()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def private_wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small private packages, one for each closure."""
    folder = tmp_path_factory.mktemp("index")
    for name in ("private-torch", "private-server"):
        module = name.replace("-", "_")
        source = tmp_path_factory.mktemp(module)
        (source / f"{module}.py").write_text(f"NAME = {name!r}\n")
        (source / "pyproject.toml").write_text(
            '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
            f'[project]\nname = "{name}"\nversion = "1.0"\n'
            f'[tool.hatch.build.targets.wheel]\ninclude = ["{module}.py"]\n'
        )
        target = folder / name
        target.mkdir()
        code = f"from hatchling.build import build_wheel; build_wheel({str(target)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def index_port(authority: trustme.CA, private_wheels: Path) -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    with serving(functools.partial(Index, directory=str(private_wheels)), context) as port:
        yield port


@pytest.fixture(scope="module")
def spec_file(base_image: str, private_wheels: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private")
    for lock, name in (("torch", "private-torch"), ("server", "private-server")):
        (wheel,) = (private_wheels / name).glob("*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        (folder / f"{lock}.txt").write_text(f"{name}==1.0 --hash=sha256:{digest}\n")
    image = {
        "base": "cpu",
        "base_image": base_image,
        "locks": str(folder),
        "repository": "localhost:5000/private/model",
    }
    spec = {"name": "private", "model": {"source": str(minilm)}, "image": image}
    (folder / "inferctl.yaml").write_text(yaml.safe_dump(spec))
    return folder / "inferctl.yaml"


def build(spec_file: Path, *flags: str | Path) -> subprocess.CompletedProcess[str]:
    options = ("--spec", spec_file, "--no-verify", "--network", "host", "--json")
    return inferctl("build", *options, *flags, stdin=subprocess.DEVNULL, timeout=None)


def test_build_secrets_give_access_and_are_not_in_the_image(
    spec_file: Path, index_port: int, authority: trustme.CA, tmp_path: Path
) -> None:
    pip_conf, ca = tmp_path / "pip.conf", tmp_path / "ca.pem"
    pip_conf.write_text(f"[global]\nindex-url = https://{USER}:{PASSWORD}@localhost:{index_port}/\n")
    authority.cert_pem.write_to_path(str(ca))
    done = build(spec_file, "--pip-conf", pip_conf, "--ca", ca)
    assert done.returncode == 0, done.stderr
    built = json.loads(done.stdout)
    archive = tmp_path / "image.tar"
    subprocess.run(["docker", "save", "--output", str(archive), built["image"]], check=True)
    certificate = ca.read_bytes().splitlines()[1]
    names: list[str] = []
    with tarfile.open(archive) as image:
        for member in image.getmembers():
            content = image.extractfile(member)
            if content is None:
                continue
            data = content.read()
            assert PASSWORD.encode() not in data, member.name
            assert certificate not in data, member.name
            if data[257:262] == b"ustar":
                with tarfile.open(fileobj=io.BytesIO(data)) as layer:
                    names += layer.getnames()
    subprocess.run(["docker", "image", "rm", "--force", built["image"]], capture_output=True, check=False)
    assert "opt/inferctl/torch/private_torch.py" in names
    assert "opt/inferctl/dependencies/private_server.py" in names
    assert not [name for name in names if name.endswith("pip.conf") or "run/secrets" in name]
    assert PASSWORD not in done.stdout + done.stderr


def test_the_torch_closure_uses_the_index_of_its_stack_by_default(
    base_image: str, private_wheels: Path, tmp_path: Path
) -> None:
    """An index without a password replaces the PyTorch index of the stack."""
    (wheel,) = (private_wheels / "private-torch").glob("*.whl")
    lock = f"private-torch==1.0 --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"
    wanted = {"model.source": "org/m", "image.base": "cpu", "image.base_image": base_image}
    spec = settings.resolve(None, {}, wanted).spec
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / "torch.txt").write_text(lock)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(private_wheels))
    with serving(handler) as port:
        stack = replace(catalog.stack("torch2.13-cpu"), index=f"http://127.0.0.1:{port}/")
        made = render.render(spec, catalog.base("cpu"), stack, locks.Locks(torch=lock, server=""), render.Provenance())
        (tmp_path / "Dockerfile").write_text(made.dockerfile)
        command = ["docker", "buildx", "build", "--network", "host", "--target", "torch", "--quiet", str(tmp_path)]
        done = execute(*command, code=0)
    subprocess.run(["docker", "image", "rm", "--force", done.stdout.strip()], capture_output=True, check=False)


def test_a_build_without_the_certificate_authority_fails_and_names_the_option(
    spec_file: Path, index_port: int, tmp_path: Path
) -> None:
    pip_conf = tmp_path / "pip.conf"
    pip_conf.write_text(f"[global]\nindex-url = https://{USER}:{PASSWORD}@localhost:{index_port}/\nretries = 0\n")
    # Another name, so that BuildKit cannot use the cache of the successful build.
    text = spec_file.with_name("server.txt").read_text()
    spec_file.with_name("server.txt").write_text(text + "# again\n")
    done = build(spec_file, "--pip-conf", pip_conf)
    assert done.returncode in (1, 3)
    assert "certificate" in done.stderr.lower()
    assert "--ca" in done.stderr
    assert PASSWORD not in done.stdout + done.stderr
