"""Lists the folders with weights that a server reads: where an image has each, and how it gets there."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

from inferctl.config.spec import Adapter, Model, Spec
from inferctl.config.spec_types import Weights
from inferctl.models import adapter, image_source
from inferctl.models import model as model_folder
from inferctl.models.adapter import AdapterFolder
from inferctl.models.model import IMAGE_FOLDER, ModelFolder, is_hub_id


@dataclass(frozen=True)
class WeightsFolder:
    """The weights of the name `name`: a model, or an adapter on the model `base`.

    `path`: their folder in the image of the server. `mount`: the path of their volume, whose folder `model` has them if
    it is an image. `volume`: the image that pods mount, None if they do not. `stage`: the stage and the context of a
    build that has them. `task`, `sha256`, `space`, `bytes`: None if unknown; only weights to bake have a sha256, and
    the names of the spaces of an embedding model.
    """

    name: str
    source: str
    revision: str | None
    weights: Weights
    path: str
    mount: str
    stage: str
    base: str | None = None
    volume: str | None = None
    task: str | None = None
    sha256: str | None = None
    space: str | None = None
    bytes: int | None = None


def find(folder: WeightsFolder) -> ModelFolder:
    """Return the local folder of a model or an adapter, or that in a cache. Raises `UsageError` if there is none."""
    if folder.base is None:
        return model_folder.find(folder.source, folder.revision)
    return AdapterFolder(adapter.find(folder.source, folder.revision))


def downloads(spec: Spec) -> bool:
    """Return whether a container downloads weights when it starts."""
    return any(each.weights == "download" for each in weights_folders(spec))


def weights_folders(spec: Spec) -> list[WeightsFolder]:
    """Return the folders of all models of `spec`, each followed by those of its adapters.

    Adapters are mounted, baked or downloaded as their model. Of a model that is downloaded, those that are not on a hub
    are baked.
    """
    found: list[WeightsFolder] = []

    def add(name: str, of: Model | Adapter, weights: Weights, mount: str, base: str | None = None) -> None:
        only, in_image = mount == IMAGE_FOLDER, weights == "mount" and image_source.is_image(of.source)
        # The path of the only model is a setting (INFERCTL_MODEL_SOURCE), which manifests change.
        path = f"{mount}/{image_source.FOLDER}" if in_image and not only else mount
        # The claim of a spec has the weights of one model.
        volume = image_source.reference(of.source) if in_image and not (only and spec.deploy.weights.pvc) else None
        stage = "model" if only else f"model-{len(found)}"
        found.append(WeightsFolder(name, of.source, of.revision, weights, path, mount, stage, base, volume))

    for each in spec.each():
        weights = each.model.weights
        add(each.name, each.model, weights, f"/models/{each.name}" if spec.models else IMAGE_FOLDER)
        for of in each.model.adapters:
            local = weights == "download" and not is_hub_id(of.source)
            # The name may have slashes, and a mount path of Kubernetes no colon.
            add(of.name, of, "bake" if local else weights, f"/adapters/{quote(of.name, safe='')}", each.name)
    return found
