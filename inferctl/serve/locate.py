"""Where the weights are: a folder, the local hub cache, or downloaded first when the spec says so."""

from __future__ import annotations

from collections.abc import Callable

from inferctl import model
from inferctl.errors import NotReadyError, UsageError
from inferctl.model import ModelFolder
from inferctl.spec import Spec

# Everything that decides what the model computes; no pickles, no exports for other runtimes.
_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def locate(spec: Spec, say: Callable[[str], None]) -> ModelFolder:
    """The model folder of a spec. With `weights: download` a hub model that is not in the local cache is fetched first.

    Raises `UsageError` when it is not there, `NotReadyError` when it cannot be fetched.
    """
    source, revision = spec.model.source, spec.model.revision
    try:
        return model.find(source, revision)
    except UsageError:
        if spec.model.weights != "download" or source.startswith((".", "/", "~")):
            raise
    from huggingface_hub import snapshot_download

    say(f"downloading {source}" + (f" at {revision}" if revision else ""))
    try:
        snapshot_download(source, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=["onnx/*", "openvino/*"])
    except Exception as error:  # noqa: BLE001  # the hub client raises errors of many libraries; all of them mean the same here
        raise NotReadyError(
            f"{source} cannot be downloaded: {str(error).splitlines()[0]}",
            "check the network and HF_ENDPOINT, HF_TOKEN for a gated model; or mount the weights",
        ) from None
    return model.find(source, revision)
