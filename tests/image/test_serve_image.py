"""Tests `inferctl serve --image`: the options of the container, and options that are not allowed."""

from __future__ import annotations

import json
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inferctl import cli
from inferctl.config.spec import Access, Spec
from inferctl.core.errors import UsageError
from inferctl.image import serve_image
from inferctl.image.records import ImageInfo
from inferctl.image.serve_image import Address
from inferctl.models import image_source
from inferctl.models.model import ModelFolder
from inferctl.models.weights_folders import WeightsFolder
from inferctl.serve.edge import access, listener
from tests.image import sharded, tiny
from tests.processes import inferctl, start

HERE = Address("127.0.0.1", 0)
NAMES = {"a": "mount", "b": "bake"}


def image(weights: str | None) -> ImageInfo:
    labels = {"io.inferctl.model.weights": weights} if weights else {}
    return ImageInfo("sha256:0", (), (), 0, "linux/amd64", "1", {}, ("python",), ("serve", "--x"), labels, ())


def spec_of(source: str) -> Spec:
    return Spec.model_validate({"name": "m", "model": {"source": source}})


def test_options_override_those_of_the_image() -> None:
    made = serve_image.options(image("bake"), {}, HERE, False, ("--precision", "bf16"))
    told = ("--published", "127.0.0.1:0", "--image-reference", "sha256:0")
    assert made.command == ("serve", "--x", *told, "--precision", "bf16")


def test_an_image_that_mounts_its_weights_requires_a_model() -> None:
    with pytest.raises(UsageError, match="this image mounts its weights") as caught:
        serve_image.weights(image("mount"), None)
    assert caught.value.hint == "pass `--model DIR`"


@pytest.mark.parametrize(("weights", "verb"), [("bake", "contains"), ("download", "downloads")])
def test_an_image_with_weights_rejects_a_model_option_but_not_a_model_in_the_spec(weights: str, verb: str) -> None:
    with pytest.raises(UsageError, match=f"this image {verb} its own weights"):
        serve_image.weights(image(weights), spec_of("./m"), replaces_model=True)
    assert serve_image.weights(image(weights), spec_of("./m")) == {}


def test_each_name_of_an_image_gets_its_own_mount() -> None:
    names = [{"name": name, "weights": weights, "path": f"/models/{name}"} for name, weights in NAMES.items()]
    several = replace(image(None), labels={"io.inferctl.names": json.dumps(names)})
    specs = [{"name": name, "model": {"source": f"/data/{name}"}} for name in NAMES]

    def fetch(folder: WeightsFolder) -> ModelFolder:
        return ModelFolder(Path(folder.source))

    spec = Spec.model_validate({"name": "x", "models": specs[::-1]})
    assert serve_image.weights(several, spec, fetch) == {"/models/a": Path("/data/a")}
    with pytest.raises(UsageError, match="mounts the weights of a, which the spec lacks"):
        serve_image.weights(several, Spec.model_validate({"name": "x", "models": specs[1:]}), fetch)
    with pytest.raises(UsageError, match="wrong label"):
        serve_image.folders_of(replace(several, labels={"io.inferctl.names": "[{}]"}))


def test_an_image_without_a_weights_label_gets_the_model_of_the_command_line(tmp_path: Path) -> None:
    assert serve_image.weights(image(None), spec_of("./of-the-spec")) == {}
    with pytest.raises(UsageError, match=r"model folder .* not found"):
        serve_image.weights(image(None), spec_of(f"{tmp_path}/none"), replaces_model=True)


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """`refused(...)` runs `inferctl serve --image a:b` without an engine, and returns its exit code and error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none")

    def run(*arguments: str) -> tuple[int, str]:
        return cli.run(["serve", "--image", "a:b", *arguments]), capsys.readouterr().err

    return run


def test_an_invalid_spec_variable_is_an_error_but_no_spec_is_not(
    refused: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, told = refused()
    assert code == 3 and "Docker Engine not found" in told
    monkeypatch.setenv("INFERCTL_SPEC", "nowhere.yaml")
    code, told = refused()
    assert code == 2 and "spec file nowhere.yaml not found" in told


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--precision", "fp9", "'fp9' is not one of"),
        ("--image-reference", "c:d", "`--image-reference` is not allowed with `--image`"),  # internal
    ],
)
def test_invalid_settings_and_internal_options_are_rejected_without_an_engine(
    refused: Callable[..., tuple[int, str]], option: str, value: str, message: str
) -> None:
    code, told = refused(option, value)
    assert code == 2 and message in told


class Stoppable:
    """A container whose server ends with 0 when it is stopped. A signal arrives while the command waits for it."""

    id = "0" * 64

    def __init__(self, sent: int) -> None:
        self.sent, self.stopped = sent, False

    def follow(self) -> Iterator[str]:
        yield "ready"

    def wait(self, _: float) -> int | None:
        if not self.stopped:
            cli._terminate(self.sent, None)
        return 0

    def stop(self, _: int) -> None:
        self.stopped = True


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_stop_has_the_exit_code_of_a_server_and_the_command_prints_no_address(sent: int, code: int) -> None:
    lines: list[str] = []
    made: Any = Stoppable(sent)
    assert serve_image._run_to_end(made, replace(HERE, port=8080), lines.append, None, 30) == code
    assert made.stopped
    assert not any("http" in line for line in lines)


@pytest.mark.parametrize(
    ("listens", "published", "url", "reached"),
    [
        ("0.0.0.0", "127.0.0.1:8099", "http://127.0.0.1:8099", "127.0.0.1"),
        ("0.0.0.0", "0.0.0.0:8099", "http://127.0.0.1:8099", "0.0.0.0"),
        ("0.0.0.0", "10.1.2.3:1", "http://10.1.2.3:1", "10.1.2.3"),
        ("0.0.0.0", "::1:8099", "http://[::1]:8099", "::1"),
        ("127.0.0.1", None, "http://127.0.0.1:{}", "127.0.0.1"),
        ("0.0.0.0", None, "http://127.0.0.1:{}", "0.0.0.0"),
    ],
)
def test_a_server_names_the_address_at_which_clients_reach_it(
    listens: str, published: str | None, url: str, reached: str
) -> None:
    with listener.listen(listens, 0) as socket:
        found = listener.reached_at(socket, listens, published)
        assert found == (url.format(socket.getsockname()[1]), reached)
    warned = [line for line in access.warnings(Access(), found[1]) if "everyone who reaches it" in line]
    assert bool(warned) == (reached not in ("127.0.0.1", "::1"))


@pytest.fixture(params=["bake"])
def named(base_image: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A tiny image with a unique name. The parameter is where its weights are."""
    made = tiny.rendered(base_image)
    made = replace(made, dockerfile=made.dockerfile.replace("weights=bake", f"weights={request.param}"))
    name = f"inferctl-test/{uuid.uuid4().hex}:x"
    tiny.build(made, name, tmp_path / "context")
    yield name
    subprocess.run(["docker", "image", "rm", "--force", name], capture_output=True, check=False)


@pytest.mark.docker
@pytest.mark.parametrize("named", ["mount"], indirect=True)
def test_the_container_gets_a_model_image_from_the_cache(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = sharded.write(tmp_path / "model", run=uuid.uuid4().hex)
    name = f"localhost:5000/inferctl-tests/{uuid.uuid4().hex}:x"
    source = inferctl("model", "push", folder, name, code=0).stdout.strip()
    server = start(tmp_path, "--image", named, "--model", source)
    try:
        (container,) = _docker("ps", "-q", "--filter", f"ancestor={named}").split()
        card = _docker("exec", container, tiny.PYTHON, "-c", "print(open('/model/README.md').read(), end='')")
        assert card == sharded.CARD
        mounts = json.loads(_docker("inspect", container))[0]["Mounts"]
        assert [(each["Type"], each["RW"]) for each in mounts if each["Destination"] == "/model"] == [("bind", False)]
        assert image_source.cached(source)
    finally:
        assert server.stop(seconds=90) == 0
        subprocess.run(["docker", "image", "rm", source.removeprefix("oci://")], capture_output=True, check=False)


@pytest.mark.docker
def test_the_container_gets_the_options_of_the_command_line(named: str, tmp_path: Path) -> None:
    (tmp_path / "inferctl.yaml").write_text("name: m\nmodel: {source: org/m}\nserve: {max_batch_tokens: 128}\n")
    flags = ["--precision", "bf16", "--name", "other", "--max-queue-tokens", "99999"]
    flags += ["--device", "cpu", "--engine", "echo", "--no-truncate"]
    server = start(tmp_path, "--image", named, *flags)
    try:
        found: list[Any] = json.loads(_docker("inspect", *_docker("ps", "-q", "--filter", f"ancestor={named}").split()))
    finally:
        server.stop(seconds=90)
    told = found[0]["Args"]
    pairs = [["--precision", "bf16"], ["--name", "other"], ["--max-queue-tokens", "99999"], ["--device", "cpu"]]
    assert all(told[told.index(option) + 1] == value for option, value in [*pairs, ["--engine", "echo"]])
    assert "--no-truncate" in told
    assert len(told[told.index("--image-reference") + 2 :]) == len(flags)
    assert "--max-batch-tokens" not in told


def _docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True).stdout


def test_the_folder_of_the_key_file_is_mounted(tmp_path: Path) -> None:
    keys = tmp_path / "keys" / "k.json"
    keys.parent.mkdir()
    keys.write_text("{}")
    made = serve_image.options(image("bake"), {}, HERE, False, keys=keys)
    assert made.mounts == {"/keys": str(keys.parent)}
    assert made.environment and made.environment["INFERCTL_ACCESS_KEYS"] == "/keys/k.json"
    keys.chmod(0o600)
    with pytest.raises(UsageError, match="user of the container cannot read"):
        serve_image.check_readable(keys)
    keys.chmod(0o644)
    keys.parent.chmod(0o755)
    serve_image.check_readable(keys)
    with pytest.raises(UsageError, match="cannot be read: no such file"):
        serve_image.check_readable(tmp_path / "none.json")
