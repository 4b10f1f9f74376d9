"""Reads the size of a spec's model: from its folder, the cache, or the hub."""

from __future__ import annotations

from inferctl.config.spec import Spec
from inferctl.core.errors import NotReadyError
from inferctl.models import hub, model
from inferctl.models.fit import ModelSize, UnknownSize


def model_size(spec: Spec, ask: bool) -> ModelSize | UnknownSize:
    """Return the model's size from its folder, the hub's cache or, with `ask`, the hub.

    Raises `UsageError` for a folder or a hub model that does not exist or is not usable.
    """
    source, revision = spec.model.source, spec.model.revision
    folder = hub.cached(source, revision) if model.is_hub_id(source) else model.find(source)
    if folder is not None:
        weights_bytes = sum(file.stat().st_size for file in folder.weight_files)
        return ModelSize(folder.parameters, folder.config, weights_bytes, folder.has_modules, folder.library_type)
    unknown = UnknownSize("the size of the model is unknown", "pass `--model DIR` with a local copy of the model")
    if not ask:
        return unknown
    try:
        facts = hub.facts(source, revision)
    except NotReadyError as error:
        return UnknownSize(error.message, error.hint or unknown.hint)
    if facts.parameters is None:
        return unknown
    return ModelSize(facts.parameters, facts.config, facts.weights_bytes, facts.has_modules, facts.library_type)
