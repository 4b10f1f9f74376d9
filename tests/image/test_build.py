"""Tests builds of small images on the real engine. A failed build leaves no tag, no container and no image."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inferctl.core.errors import InferctlError, NotReadyError
from inferctl.facts import catalog
from inferctl.image import build, publish, registry
from inferctl.image.docker import DockerEngine
from inferctl.image.events import Event, Note, Phase, StepLog
from inferctl.image.from_spec import task_of
from inferctl.image.records import ContainerOptions, ImageInfo
from inferctl.image.running_container import exit_error
from inferctl.models.model import ModelFolder
from tests.http_servers import answering
from tests.image import tiny
from tests.image.tiny import run
from tests.processes import inferctl, start

pytestmark = pytest.mark.docker
REGISTRY = "localhost:5000"


@pytest.fixture
def docker(engine: None) -> Iterator[DockerEngine]:
    yield DockerEngine.connect()


@pytest.fixture(autouse=True)
def _nothing_left_behind(engine: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tiny, "mark", uuid.uuid4().hex)
    yield
    try:
        assert tiny.created("ps", "--all") == []
    finally:
        tiny.remove_images()


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_an_image_is_built_verified_and_tagged(docker: DockerEngine, base_image: str) -> None:
    made = tiny.plan(tiny.rendered(base_image))
    events, built = run(docker, made)
    (verified,) = built.verified
    assert (verified.precision, verified.texts, verified.dimensions) == ("bf16", 8, 32)
    assert verified.cosine_min == pytest.approx(1.0)
    assert [event.name for event in events if isinstance(event, Phase)] == ["build", "verify", "tag"]
    found = docker.image(made.reference)
    assert found is not None
    assert found.id == built.image
    assert built.digest is None


@pytest.mark.parametrize("task", ["generate", "auto"])
def test_an_image_of_vllm_for_gpus_is_not_verified_without_a_gpu(
    docker: DockerEngine, base_image: str, tmp_path: Path, task: str
) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    made = tiny.plan(tiny.rendered(base_image))
    model = made.spec.model.model_copy(update={"task": task, "source": str(tmp_path)})
    gpu_stack = catalog.stack(catalog.base("cuda13.0").stack)
    spec = made.spec.model_copy(update={"model": model})
    made = replace(made, spec=spec, stack=gpu_stack, tasks={"tiny": task_of(spec, ModelFolder(tmp_path))})
    without_gpu = replace(docker.info(), runtimes=(), cdi_gpu=False)
    with pytest.raises(NotReadyError, match="cannot verify this image here: vLLM for GPUs does not run on a CPU"):
        for _ in build.run(made, docker, without_gpu):
            pass
    assert docker.image(made.reference) is None


def test_only_the_expected_image_is_tagged(docker: DockerEngine, base_image: str) -> None:
    made = tiny.with_options(tiny.plan(tiny.rendered(base_image)), verify=False)
    _, measured = run(docker, made)
    second = f"{made.reference}-second"
    again = replace(made, references=(second,), options=replace(made.options, expected=measured.image))
    _, built = run(docker, again)
    assert built.image == measured.image
    changed = replace(again, rendered=tiny.rendered(base_image, behaviour="nan"), references=(f"{second}-changed",))
    with pytest.raises(InferctlError, match="--expect"):
        run(docker, changed)
    assert docker.image(changed.reference) is None


def test_an_optional_cache_export_is_skipped_if_the_builder_cannot_do_it(docker: DockerEngine, base_image: str) -> None:
    name = f"{REGISTRY}/inferctl-test/{uuid.uuid4().hex[:12]}:cache"
    target = f"type=registry,ref={name},mode=max"
    made = tiny.with_options(tiny.plan(tiny.rendered(base_image)), verify=False)
    with pytest.raises(NotReadyError, match="cannot export a build cache"):
        run(docker, tiny.with_options(made, cache_to=(target,)))
    events, _ = run(docker, tiny.with_options(made, cache_to=(f"{target},ignore-error=true",), cache_from=(name,)))
    assert [event for event in events if isinstance(event, Note) and "cache" in event.text]


def test_the_pushed_image_is_the_verified_one(docker: DockerEngine, base_image: str) -> None:
    name = f"{REGISTRY}/inferctl-test/{uuid.uuid4().hex[:12]}:x"
    events, built = run(docker, tiny.with_options(tiny.plan(tiny.rendered(base_image), name=name), push=True))
    assert built.digest is not None and built.compressed is not None
    assert built.digest.startswith(name.removesuffix(":x") + "@sha256:")
    assert 0 < built.compressed < built.size
    notes = [event.text for event in events if isinstance(event, Note)]
    assert any("no provenance" in note for note in notes) is not docker.info().containerd_store
    assert docker.info().containerd_store or any(": Pushed" in note or ": Mounted from" in note for note in notes)


def test_every_name_of_an_image_is_tagged_and_pushed_under_one_digest(docker: DockerEngine, base_image: str) -> None:
    one, other = (f"{REGISTRY}/inferctl-test/{uuid.uuid4().hex[:12]}" for _ in range(2))
    names = (f"{one}:first", f"{one}:second", f"{other}:x")
    made = replace(tiny.plan(tiny.rendered(base_image)), references=names)
    _, built = run(docker, tiny.with_options(made, push=True, verify=False))
    assert [digest.partition("@")[0] for digest in built.digests] == [one, one, other]
    assert len({digest.partition("@")[2] for digest in built.digests}) == 1
    for name in names:
        assert docker.image(name).id == built.image  # type: ignore[union-attr]
        assert registry.manifest(name, docker.info().platform)["config"]["digest"] == built.image


def test_if_the_push_of_one_name_fails_all_names_keep_their_image(docker: DockerEngine, base_image: str) -> None:
    name = f"{REGISTRY}/inferctl-test/{uuid.uuid4().hex[:12]}:x"
    _, before = run(docker, tiny.with_options(tiny.plan(tiny.rendered(base_image), name=name), verify=False))
    refused = f"127.0.0.1:1/inferctl-test/{uuid.uuid4().hex[:12]}:x"
    made = replace(tiny.plan(tiny.rendered(base_image, "nan")), references=(name, refused))
    with pytest.raises(InferctlError):
        run(docker, tiny.with_options(made, push=True, verify=False))
    assert docker.image(name).id == before.image  # type: ignore[union-attr]
    assert docker.image(refused) is None


@pytest.mark.parametrize(
    ("behaviour", "what"),
    [
        ("far", r"the vector of text 6 differs from the fp32 reference .* required 0.999"),
        ("rerank-short", "the server returned 7 scores for 8 texts"),
        ("swapped", "other weights"),
        ("refuses", "/v1/embeddings returned 422: .*no thanks"),
        ("dies", r"(?s)ended with exit code 1 .*there is no such model"),
    ],
)
def test_an_image_that_fails_verification_is_not_tagged(
    docker: DockerEngine, base_image: str, behaviour: str, what: str
) -> None:
    made = tiny.plan(tiny.rendered(base_image, behaviour))
    with pytest.raises(InferctlError, match=what) as caught:
        run(docker, made)
    assert caught.value.message.startswith("verification failed: ")
    assert caught.value.exit_code == 1
    assert docker.image(made.reference) is None
    assert tiny.created("images") == []


def test_weights_that_only_their_owner_can_read_are_an_error(
    docker: DockerEngine, base_image: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "config.json").chmod(0o600)
    made = tiny.plan(tiny.rendered(base_image, "forbidden"))
    mounting = made.spec.model.model_copy(update={"weights": "mount"})
    made = replace(made, folders={"tiny": tmp_path}, spec=made.spec.model_copy(update={"model": mounting}))
    with pytest.raises(InferctlError, match="cannot read its weights") as caught:
        run(docker, made)
    assert "chmod -R a+rX" in (caught.value.hint or "")


def test_an_image_that_is_never_ready_fails_with_its_log(docker: DockerEngine, base_image: str) -> None:
    made = tiny.with_options(tiny.plan(tiny.rendered(base_image, "slow")), ready_seconds=8.0)
    with pytest.raises(InferctlError, match=r"(?s)not ready within 8 s.*tiny server: slow") as caught:
        run(docker, made)
    assert "--ready-timeout" in (caught.value.hint or "")


def test_after_a_failed_verification_the_tag_keeps_its_image(docker: DockerEngine, base_image: str) -> None:
    good = tiny.plan(tiny.rendered(base_image))
    _, built = run(docker, good)
    with pytest.raises(InferctlError):
        run(docker, tiny.plan(tiny.rendered(base_image, "nan"), name=good.reference))
    found = docker.image(good.reference)
    assert found is not None
    assert found.id == built.image


def test_an_image_that_runs_as_root_is_rejected(docker: DockerEngine, base_image: str) -> None:
    with pytest.raises(InferctlError, match="runs as root"):
        run(docker, tiny.plan(tiny.rendered(base_image, user="root")))


def test_the_platform_of_the_spec_is_used(docker: DockerEngine, base_image: str) -> None:
    made = tiny.plan(tiny.rendered(base_image))
    image = made.spec.image.model_copy(update={"platform": "linux/s390x"})
    with pytest.raises(NotReadyError, match="linux/s390x"):
        run(docker, replace(made, spec=made.spec.model_copy(update={"image": image})))
    assert tiny.created("images") == []


@pytest.mark.parametrize(
    ("line", "what", "hint", "code"),
    [
        ("RUN echo reading the lock; exit 7", r"(?s)failed in \[2/.*reading the lock", "inferctl render", 1),
        ("RUN dd if=/dev/zero of=/dev/full bs=1k count=1", "disk is full", "docker builder prune", 3),
    ],
)
def test_a_step_that_fails(docker: DockerEngine, base_image: str, line: str, what: str, hint: str, code: int) -> None:
    made = tiny.plan(replace(tiny.rendered(base_image), dockerfile=f"FROM {base_image}\n{line}\n"))
    with pytest.raises(InferctlError, match=what) as caught:
        run(docker, made)
    assert hint in (caught.value.hint or "")
    assert caught.value.exit_code == code


def test_closing_a_build_stops_it_and_tags_nothing(docker: DockerEngine, base_image: str) -> None:
    marker = uuid.uuid4().hex
    made = tiny.plan(tiny.rendered(base_image, extra=f"RUN echo {marker} && sleep 600"))
    going = build.run(made, docker, docker.info())
    for event in going:
        if isinstance(event, StepLog) and marker in event.text:
            break
    going.close()
    assert f"echo {marker}" not in _output("ps", "-eo", "args")
    assert docker.image(made.reference) is None


def test_an_engine_that_crashes_during_a_build_is_an_error(
    docker: DockerEngine, base_image: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    adapter = getattr(docker._api, "_custom_adapter", None)
    if not hasattr(adapter, "socket_path"):
        pytest.skip("the engine is not at a unix socket")
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(tmp_path / "dead.sock"))
    made = tiny.plan(tiny.rendered(base_image))
    going = build.run(made, docker, docker.info())
    with pytest.raises(NotReadyError, match="is down: connection refused"):
        for event in going:
            if isinstance(event, Phase) and event.name == "verify":
                # From here on, connections are refused.
                monkeypatch.setattr(adapter, "socket_path", str(tmp_path / "dead.sock"))
                adapter.pools.clear()


INDEX = {
    "schemaVersion": 2,
    "mediaType": "application/vnd.oci.image.index.v1+json",
    "manifests": [
        {
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": f"sha256:{'0' * 64}",
            "size": 1,
            "platform": {"os": "linux", "architecture": "s390x"},
        }
    ],
}
IMAGE = ImageInfo("sha256:0", (), (), 0, "linux/amd64", "1", {}, (), (), {}, ())


def confirm(host: str, digest: str) -> list[Event]:
    return list(publish._confirm(f"{host}/inferctl-test/x@{digest}", IMAGE, f"sha256:{'1' * 64}"))


def test_another_image_in_the_registry_is_an_error_and_an_unreachable_registry_a_note(engine: None) -> None:
    body = json.dumps(INDEX).encode()
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    headers = {"content_type": str(INDEX["mediaType"]), "docker_content_digest": digest}
    with answering(200, body, **headers) as host, pytest.raises(InferctlError, match="has no image for linux/amd64"):
        confirm(host, digest)
    gone = b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}'
    with answering(404, gone) as host, pytest.raises(NotReadyError, match="not found"):
        confirm(host, digest)
    (note,) = confirm("localhost:1", digest)
    assert isinstance(note, Note)
    assert "not compared with the verified image" in note.text


BLOB = {"digest": f"sha256:{'0' * 64}", "size": 1}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"layers": {}, "config": BLOB},
        {"layers": [BLOB, 1], "config": BLOB},
        {"layers": [{"size": 1}], "config": BLOB},
        {"layers": [BLOB | {"size": "1"}], "config": BLOB},
        {"layers": [BLOB]},
        {"manifests": 1},
        {"manifests": [1, {"platform": "linux"}, {"platform": {"os": "linux", "architecture": "amd64"}}]},
    ],
)
def test_a_manifest_that_is_not_one_of_an_image_is_an_error(engine: None, body: dict[str, Any]) -> None:
    content = json.dumps(
        {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json"} | body
    ).encode()
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    headers = {"content_type": "application/vnd.oci.image.manifest.v1+json", "docker_content_digest": digest}
    with answering(200, content, **headers) as host, pytest.raises(InferctlError):
        registry.manifest(f"{host}/inferctl-test/x@{digest}", "linux/amd64")


def test_a_push_without_login_fails_and_removes_the_tag(docker: DockerEngine, base_image: str) -> None:
    body = b'{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}'
    with answering(401, body, www_authenticate='Basic realm="private"') as host:
        made = tiny.with_options(
            tiny.plan(tiny.rendered(base_image), name=f"{host}/inferctl-test/private:x"), push=True, verify=False
        )
        with pytest.raises(NotReadyError, match="no basic auth credentials") as caught:
            run(docker, made)
    assert f"docker login {host}" in (caught.value.hint or "")
    assert docker.image(made.reference) is None


def test_a_port_in_use_is_an_error(docker: DockerEngine, base_image: str) -> None:
    _, built = run(docker, tiny.with_options(tiny.plan(tiny.rendered(base_image)), verify=False))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(NotReadyError) as caught:
            docker.start(
                built.image, ContainerOptions(port=8080, host_port=port, labels={"io.inferctl.role": "verify"})
            )
    # An engine without a working bridge reports that first.
    assert f"port {port} is already in use" in caught.value.message or "bridge network" in caught.value.message


def test_a_container_that_runs_out_of_memory_is_an_error(docker: DockerEngine, base_image: str) -> None:
    _, built = run(docker, tiny.with_options(tiny.plan(tiny.rendered(base_image, "hungry")), verify=False))
    options = ContainerOptions(network="none", labels={"io.inferctl.role": "verify"}, memory_bytes=100_000_000)
    with docker.start(built.image, options) as container:
        assert container.wait(60) == 137
        error = exit_error(container)
    assert isinstance(error, NotReadyError)
    assert "ran out of memory" in error.message


def test_an_image_is_served_until_it_receives_a_signal(docker: DockerEngine, base_image: str, tmp_path: Path) -> None:
    _, built = run(docker, tiny.plan(tiny.rendered(base_image)))
    server = start(tmp_path, "--image", built.reference)
    try:
        assert server.get("/info").json()["name"] == "tiny"
    finally:
        server.stop(seconds=90)
    assert "tiny server: works" in server.log.read_text()
    assert _output("docker", "ps", "--all", "--quiet", "--filter", f"ancestor={built.image}") == ""


def test_a_server_container_that_exits_ends_with_its_log_and_exit_code(docker: DockerEngine, base_image: str) -> None:
    made = tiny.with_options(tiny.plan(tiny.rendered(base_image, "dies")), verify=False)
    _, built = run(docker, made)
    done = inferctl("serve", "--image", built.reference, "--port", "0", code=1)
    assert "ended with exit code 1" in done.stderr
    assert "there is no such model" in done.stderr
    assert "hint: see the log above\n" in done.stderr


def test_a_build_warns_that_the_image_in_the_registry_has_another_space(docker: DockerEngine, base_image: str) -> None:
    name = f"{REGISTRY}/inferctl-test/{uuid.uuid4().hex[:12]}:x"
    found = []
    for space in ("dense_1", "dense_1", "dense_2"):
        made = tiny.plan(tiny.rendered(base_image, extra=f"LABEL io.inferctl.model.space={space}"), name=name)
        found.append(run(docker, tiny.with_options(made, verify=False, push=True))[1])
    assert [[each.topic for each in built.findings] for built in found] == [[], [], ["space"]]
    assert str(found[1].digest) in str(found[2].findings[0].hint)
