"""Tests the errors for messages of buildx, engines and pip. The messages are from real runs, with other host names."""

from __future__ import annotations

import re

import pytest

from inferctl.config.spec import IMAGE_NAME
from inferctl.core.errors import InferctlError
from inferctl.image import failures
from inferctl.image.image_name import familiar, host_of, normalized

BASE = (
    "ERROR: failed to solve: r.example.com/cuda:12.8: failed to resolve source metadata for r.example.com/cuda:12.8: "
)
ASKED = f'{BASE}failed to do request: Head "https://r.example.com/v2/cuda/manifests/12.8": dial tcp'
STEP = 'ERROR: failed to solve: process "pip" did not complete successfully: exit code: '


@pytest.mark.parametrize(
    ("text", "log", "message", "hint", "code"),
    [
        (f"{BASE}r.example.com/cuda:12.8: not found", "", "image r.example.com/cuda:12.8 not found", "base_image", 3),
        (f"{BASE}manifest unknown", "", "not found", "six months", 3),
        (f"{ASKED}: lookup r.example.com: no such host", "", "r.example.com is unreachable", "network and proxy", 3),
        (f"{ASKED} 10.0.0.1:443: connect: connection refused", "", "connection refused", "mirror", 3),
        (f"{BASE}pull access denied, repository does not exist", "", "denied access", "docker login r.example.com", 3),
        (f"{STEP}1", "OSError: [Errno 28] No space left on device", "disk is full", "docker builder prune", 3),
        (f"{STEP}1", "[Errno -3] Temporary failure in name resolution", "in [torch 1/1] RUN pip", "--network host", 3),
        (f"{STEP}1", "SSLError(SSLCertVerificationError(1, 'certificate verify failed'))", "failed in", "--ca FILE", 3),
        (f"{STEP}1", "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM", "failed in", "inferctl lock", 1),
        (f"{STEP}1", "ERROR: No matching distribution found for torch==2.99", "failed in", "torch==2.99", 1),
        (f"{STEP}137", "", "failed in", "memory", 3),
        (
            "ERROR: failed to solve: dockerfile parse error on line 1: unknown instruction: FRM",
            *("", "unknown instruction: FRM", "inferctl render", 1),
        ),
        (
            "ERROR: failed to solve: failed to create endpoint x on network bridge: "
            "adding interface veth0 to bridge docker0 failed",
            *("", "bridge network", "--network host", 3),
        ),
    ],
)
def test_a_failed_build_has_a_hint(text: str, log: str, message: str, hint: str, code: int) -> None:
    step = "[torch 1/1] RUN pip" if "process" in text else None
    error: InferctlError = failures.build_error(text, step, log.splitlines())
    assert message in error.message
    assert hint in (error.hint or "")
    assert error.exit_code == code


def test_the_last_lines_of_the_step_are_in_the_message() -> None:
    error = failures.build_error("ERROR: x", "[2/2] RUN make", [f"line {n}" for n in range(30)])
    assert "  | line 29" in error.message
    assert "line 5\n" not in error.message


def test_the_registry_of_a_reference() -> None:
    hosts = {
        "localhost:5000/a/b:c": "localhost:5000",
        "localhost/a": "localhost",
        "r.example.com/a@sha256:0": "r.example.com",
        "org/name:tag": "docker.io",
        "name:tag": "docker.io",
    }
    assert {reference: host_of(reference) for reference in hosts} == hosts


def test_transient_failures_differ_from_permanent_ones() -> None:
    transient = {
        "net/http: TLS handshake timeout": True,
        "EOF": True,
        'Get "http://r.example.com/v2/": context deadline exceeded': True,
        "unauthorized: 503": False,
        "write: no space left on device: EOF": False,
        "received unexpected HTTP status: 200 OK": False,
    }
    assert {message: failures.transient(message) for message in transient} == transient


@pytest.mark.parametrize(
    ("message", "push", "pull"),
    [
        ("invalid character '<' looking for beginning of value", "login page", "login page"),
        ("received unexpected HTTP status: 200 OK", "login page", "login page"),
        ("unexpected status from POST request to http://r.example.com:443/v2/x: 302 Found", "login page", "login page"),
        # The page of a proxy: the status says more.
        ("error parsing HTTP 413 response body: invalid character '<': \"<html>\"", "docker push", "reachable"),
        ("error parsing HTTP 403 response body: invalid character '<': \"<html>\"", "docker login", "docker login"),
        ("unexpected status from GET request to http://r.example.com/v2/x: 502 Bad Gateway", "up, reach", "reachable"),
        ("ResourceExhausted: grpc: received message larger than max (6003879 vs. 4194304)", "docker push", "labels"),
    ],
)
def test_the_hint_fits_what_is_wrong_with_a_registry(message: str, push: str, pull: str) -> None:
    reference = "r.example.com/team/x:1"
    assert push in (failures.push_error(message, reference).hint or "")
    assert pull in (failures.pull_error(message, reference).hint or "")


@pytest.mark.parametrize(("reference", "named"), [("minilm:1", False), ("docker.io/a/b:1", True), ("r.io/b:1", True)])
def test_a_name_without_a_registry_gets_a_hint(reference: str, named: bool) -> None:
    message = "dial tcp: lookup registry-1.docker.io: no such host"
    for error in (failures.push_error(message, reference), failures.pull_error(message, reference)):
        assert ("name the registry" not in (error.hint or "")) == named


@pytest.mark.parametrize(
    ("name", "full", "short"),
    [
        ("minilm", "docker.io/library/minilm", "minilm"),
        ("myorg/minilm:1", "docker.io/myorg/minilm:1", "myorg/minilm:1"),
        ("docker.io/library/minilm", "docker.io/library/minilm", "minilm"),
        ("index.docker.io/myorg/minilm", "docker.io/myorg/minilm", "myorg/minilm"),
        ("localhost/minilm", "localhost/minilm", "localhost/minilm"),
        ("host:5000/minilm@sha256:0", "host:5000/minilm@sha256:0", "host:5000/minilm@sha256:0"),
        ("ghcr.io/library/minilm", "ghcr.io/library/minilm", "ghcr.io/library/minilm"),
    ],
)
def test_a_name_has_a_full_form_and_one_that_the_engine_lists(name: str, full: str, short: str) -> None:
    assert (normalized(name), familiar(name)) == (full, short)
    assert (normalized(short), familiar(full)) == (full, short)


def test_invalid_image_names_are_rejected() -> None:
    for name in ("minilm", "myorg/minilm", "localhost/x", "localhost:5000/x", "host:5000/a/b", "a.b/c"):
        assert re.fullmatch(IMAGE_NAME, name), name
    for name in ("MyOrg/minilm", "myorg/MiniLM", "-/x", ":5000/x", "a..b/c", "a/b/", "https://a.b/c"):
        assert not re.fullmatch(IMAGE_NAME, name), name
