"""Tests how a verification starts the server of an image: the options of the container, and the weights to mount."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from inferctl.config.spec import Spec
from inferctl.core.errors import UsageError
from inferctl.image import server_container
from inferctl.image.records import ImageInfo
from inferctl.image.server_container import Address
from inferctl.models.model import ModelFolder
from inferctl.models.weights_folders import WeightsFolder

HERE = Address("127.0.0.1", 0)
NAMES = {"a": "mount", "b": "bake"}


def image(weights: str | None) -> ImageInfo:
    labels = {"io.inferctl.model.weights": weights} if weights else {}
    return ImageInfo("sha256:0", (), (), 0, "linux/amd64", "1", {}, ("python",), ("serve", "--x"), labels, ())


def spec_of(source: str) -> Spec:
    return Spec.model_validate({"name": "m", "model": {"source": source}})


def test_on_the_network_of_the_host_the_server_listens_at_the_given_address() -> None:
    made = server_container.options(image("bake"), {}, HERE, False, {"INFERCTL_SERVE_PORT": "1", "X": "y"})
    assert (made.command, made.network, made.host_port) == (("serve", "--x"), None, 0)
    assert made.environment == {"INFERCTL_SERVE_PORT": "1", "X": "y"}
    there = replace(HERE, port=8099, network="host")
    made = server_container.options(image("bake"), {}, there, False)
    assert made.command == ("serve", "--x", "--host", "127.0.0.1", "--port", "8099")
    assert made.environment == {"INFERCTL_SERVE_PORT": "8099"}


def test_an_image_that_mounts_its_weights_requires_a_model() -> None:
    with pytest.raises(UsageError, match="this image mounts its weights") as caught:
        server_container.weights(image("mount"), None)
    assert caught.value.hint == "pass `--model DIR`"


@pytest.mark.parametrize(("weights", "verb"), [("bake", "contains"), ("download", "downloads")])
def test_an_image_with_weights_rejects_a_model_option_but_not_a_model_in_the_spec(weights: str, verb: str) -> None:
    with pytest.raises(UsageError, match=f"this image {verb} its own weights"):
        server_container.weights(image(weights), spec_of("./m"), replaces_model=True)
    assert server_container.weights(image(weights), spec_of("./m")) == {}


def test_each_name_of_an_image_gets_its_own_mount() -> None:
    names = [{"name": name, "weights": weights, "path": f"/models/{name}"} for name, weights in NAMES.items()]
    several = replace(image(None), labels={"io.inferctl.names": json.dumps(names)})
    specs = [{"name": name, "model": {"source": f"/data/{name}"}} for name in NAMES]

    def fetch(folder: WeightsFolder) -> ModelFolder:
        return ModelFolder(Path(folder.source))

    spec = Spec.model_validate({"name": "x", "models": specs[::-1]})
    assert server_container.weights(several, spec, fetch) == {"/models/a": Path("/data/a")}
    with pytest.raises(UsageError, match="mounts the weights of a, which the spec lacks"):
        server_container.weights(several, Spec.model_validate({"name": "x", "models": specs[1:]}), fetch)
    with pytest.raises(UsageError, match="wrong label"):
        server_container.folders_of(replace(several, labels={"io.inferctl.names": "[{}]"}))


def test_an_image_without_a_weights_label_gets_the_model_of_the_command_line(tmp_path: Path) -> None:
    assert server_container.weights(image(None), spec_of("./of-the-spec")) == {}
    with pytest.raises(UsageError, match=r"model folder .* not found"):
        server_container.weights(image(None), spec_of(f"{tmp_path}/none"), replaces_model=True)
