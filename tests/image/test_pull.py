"""Tests `inferctl pull`: a missing image is distinguished from a registry that does not respond."""

from __future__ import annotations

import uuid

import pytest

from inferctl.core.errors import NotReadyError
from inferctl.image import failures
from tests.http_servers import answering
from tests.processes import inferctl

REFERENCE = "localhost:5000/team/model:main"
# Messages of Engine 26.1 with both image stores, and whether they say that an image is missing.
MESSAGES = [
    (f"manifest for {REFERENCE} not found: manifest unknown: manifest unknown", True),
    ("name unknown: The repository with name 'model' does not exist in the registry", True),
    (f'failed to resolve reference "{REFERENCE}": {REFERENCE}: not found', True),
    ("manifest for localhost:5000/access-denied/timeout-503:main not found: manifest unknown: manifest unknown", True),
    ('Get "http://localhost:5000/v2/": dial tcp 127.0.0.1:5000: connect: connection refused', False),
    ('Get "https://r.example.com/v2/": dial tcp: lookup r.example.com on 127.0.0.53:53: no such host', False),
    ("unknown: <html><body>404 page not found</body></html>", False),
    ("received unexpected HTTP status: 500 Internal Server Error", False),
    ("unauthorized: authentication required", False),
    ('Head "http://localhost:5000/v2/team/model/manifests/main": no basic auth credentials', False),
    ("pull access denied for team/model, repository does not exist or may require 'docker login': denied", False),
    (
        f'failed to resolve reference "{REFERENCE}": pull access denied, repository does not exist or may require '
        "authorization: server message: insufficient_scope: authorization failed",
        False,
    ),
]


@pytest.mark.parametrize(("message", "missing"), MESSAGES)
def test_a_failing_registry_is_not_a_missing_image(message: str, missing: bool) -> None:
    """Words in the name of an image are ignored."""
    name = "localhost:5000/access-denied/timeout-503:main" if "access-denied" in message else REFERENCE
    error = failures.pull_error(message, name)
    assert isinstance(error, failures.MissingImageError) == missing
    assert missing or isinstance(error, NotReadyError)


@pytest.mark.docker
def test_an_image_that_exists_is_pulled_and_its_digest_printed(base_image: str) -> None:
    done = inferctl("pull", "localhost:5000/base:trixie-python3.11", "--if-exists")
    assert (done.returncode, done.stdout.strip()) == (0, base_image)
    assert inferctl("pull", base_image).stdout.strip() == base_image


@pytest.mark.docker
@pytest.mark.parametrize("name", ["base:{}", "none/{}:main"], ids=["no such tag", "no such repository"])
def test_an_image_that_does_not_exist_is_an_error_or_nothing_with_if_exists(base_image: str, name: str) -> None:
    reference = f"localhost:5000/{name.format(uuid.uuid4().hex)}"
    for options, code in (((), 3), (("--if-exists",), 0)):
        done = inferctl("pull", reference, *options, code=code)
        assert (done.stdout, f"{reference} not found" in done.stderr) == ("", True)


@pytest.mark.docker
@pytest.mark.parametrize("status", [401, 404, 503])
def test_a_registry_that_denies_or_fails_is_an_error_also_with_if_exists(engine: None, status: int) -> None:
    with answering(status, www_authenticate='Basic realm="registry"') as host:
        done = inferctl("pull", f"{host}/team/model:main", "--if-exists")
    assert (done.returncode, done.stdout) == (3, ""), done.stderr


@pytest.mark.docker
def test_a_registry_that_is_down_is_an_error_also_with_if_exists(engine: None) -> None:
    with answering(200) as host:
        pass
    done = inferctl("pull", f"{host}/team/model:main", "--if-exists")
    assert (done.returncode, done.stdout) == (3, "")
    assert "connection refused" in done.stderr
