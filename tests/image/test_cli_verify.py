"""Tests the command `inferctl verify` on existing images."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from inferctl.image.docker import DockerEngine
from tests.image import tiny
from tests.processes import inferctl

pytestmark = [pytest.mark.docker, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def docker(engine: None) -> Iterator[DockerEngine]:
    yield DockerEngine.connect()
    tiny.remove_images()


def built(docker: DockerEngine, base: str, behaviour: str) -> str:
    made = tiny.with_options(tiny.plan(tiny.rendered(base, behaviour)), verify=False)
    return tiny.run(docker, made)[1].reference


def verify(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    return inferctl("verify", *arguments, cwd=cwd, code=code)


def test_a_valid_image_passes_and_its_id_is_the_output(docker: DockerEngine, base_image: str, tmp_path: Path) -> None:
    name = built(docker, base_image, "works")
    done = verify(name, cwd=tmp_path)
    assert done.stdout.strip() == docker.image(name).id  # type: ignore[union-attr]
    assert "bf16 (native) on tiny cpu, 8 texts, 32 dimensions" in done.stderr
    document = json.loads(verify(name, "--json", cwd=tmp_path).stdout)
    assert document["verified"]["cosine_min"] == pytest.approx(1.0)
    assert tiny.created("ps", "--all") == []


def test_the_scores_of_a_reranker_are_compared(docker: DockerEngine, base_image: str, tmp_path: Path) -> None:
    done = verify(built(docker, base_image, "rerank"), cwd=tmp_path)
    assert "8 texts, scores, relative score difference to fp32 at most 0" in done.stderr


@pytest.mark.parametrize(
    ("behaviour", "output"),
    [
        ("generate", "9 texts, 316 tokens, KL divergence from fp32 at least 0.0009 nats, top-1 agreement 100.0%"),
        ("generate-awq", "9 texts, 325 tokens, not compared with fp32"),
        ("generate-far", "the next tokens differ from the fp32 reference of the same weights: mean KL divergence"),
        ("generate-tokenizer", "the server reads text 1 as other tokens than the tokenizer of the model folder"),
        ("generate-template", "the server reads the chat messages as other tokens"),
        ("generate-silent", "the server does not report log-probabilities of a prompt"),
    ],
)
def test_the_next_tokens_of_a_generation_server_are_compared(
    docker: DockerEngine, base_image: str, tmp_path: Path, behaviour: str, output: str
) -> None:
    code = 0 if behaviour in ("generate", "generate-awq") else 1
    assert output in verify(built(docker, base_image, behaviour), cwd=tmp_path, code=code).stderr


def test_an_image_that_fails_verification_is_kept(docker: DockerEngine, base_image: str, tmp_path: Path) -> None:
    name = built(docker, base_image, "nan")
    done = verify(name, cwd=tmp_path, code=1)
    assert done.stdout == ""
    assert "text 4" in done.stderr and "1 of 32" in done.stderr
    assert docker.image(name) is not None
    assert tiny.created("ps", "--all") == []


def test_an_image_that_cannot_be_verified_is_an_error(docker: DockerEngine, base_image: str, tmp_path: Path) -> None:
    for command in (("verify",), ("serve", "--port", "0", "--image")):
        assert "was not built by inferctl" in inferctl(*command, base_image, cwd=tmp_path, code=2).stderr
    assert "not found" in verify(f"localhost:5000/{uuid.uuid4().hex}:x", cwd=tmp_path, code=3).stderr
    done = verify(built(docker, base_image, "works"), "--model", ".", cwd=tmp_path, code=2)
    assert "contains its own weights" in done.stderr
