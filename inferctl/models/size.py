"""Finds a spec's model and its size: in its folder, a cache, on the hub or in a registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from inferctl.config.spec import Serve, Spec
from inferctl.core.errors import NotReadyError
from inferctl.models import hub, image_source
from inferctl.models import model as model_folder
from inferctl.models.adapter import Adapter, Slots
from inferctl.models.fit import ModelSize, UnknownSize
from inferctl.models.hub import HubModel
from inferctl.models.model import ModelFolder

_UNKNOWN = UnknownSize("the size of the model is unknown", "pass `--model DIR` with a local copy of the model")


def locate(spec: Spec, image_facts: Callable[[str], HubModel]) -> ModelFolder | HubModel | UnknownSize:
    """Return the model's folder, or what its hub or registry says; why it is not known if that does not respond.

    `image_facts`: `facts` in `image/model_image.py`. Raises `UsageError` for a model that does not exist or is not
    usable.
    """
    source, revision = spec.model.source, spec.model.revision
    in_image = image_source.is_image(source)
    if not in_image and not model_folder.is_hub_id(source):
        return model_folder.find(source)
    if folder := hub.cached(source, revision):
        return folder
    try:
        return image_facts(source) if in_image else hub.facts(source, revision)
    except NotReadyError as error:
        return UnknownSize(error.message, error.hint or _UNKNOWN.hint)


def size_of(
    found: ModelFolder | HubModel | UnknownSize, adapters: Sequence[Adapter] = (), serve: Serve | None = None
) -> ModelSize | UnknownSize:
    """Return the size of the model that `locate` found, with vLLM's slots for the `adapters` and spare ones on it."""
    if isinstance(found, UnknownSize):
        return found
    if found.parameters is None:
        return _UNKNOWN
    spare = (serve.spare, serve.spare_rank) if serve else (0, 1)
    kinds = ("cpu", "cuda") if adapters or spare[0] else ()
    numbers = {
        kind: Slots.of(adapters, kind, *spare).numbers(found) for kind in kinds if isinstance(found, ModelFolder)
    }
    return ModelSize(
        found.parameters, found.config, found.weights_bytes, found.has_modules, found.library_type, numbers
    )
