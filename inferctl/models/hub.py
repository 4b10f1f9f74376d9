"""Downloads models from a Hugging Face hub into the hub's cache (`HF_HOME`) and reads facts about them.

A model in the cache needs no network. Every failure is an `InferctlError` with one hint.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from inferctl.config.spec import Adapter as AdapterSource
from inferctl.core.errors import InferctlError, NotReadyError, UsageError
from inferctl.core.sizes import size
from inferctl.models import adapter, convert
from inferctl.models import model as model_folder
from inferctl.models.adapter import Adapter
from inferctl.models.model import ModelFolder, UnconvertedError

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

# Called with the downloaded bytes and the total bytes of the model.
Progress = Callable[[int, int], None]
# Returns the local folder of a model (source, revision) and downloads it if needed: `fetch` with a bound progress.
Fetch = Callable[[str, str | None], ModelFolder]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_S = 10.0
# No exports for other runtimes. Pickles only where there are no safetensors.
_SUFFIXES = model_folder.SUFFIXES - {".gguf"}
_LINE_EVERY_S = 5.0
_MAX_CONFIGURATION_BYTES = 1_000_000


@dataclass(frozen=True)
class HubModel:
    """Facts about a model on a hub. `files` maps the files that inferctl loads to their bytes.

    `parameters` is None if neither the hub nor the headers of the weights contain the number. `library_type` is that of
    `ModelFolder`.
    """

    commit: str
    config: Mapping[str, Any]
    parameters: int | None
    files: Mapping[str, int]
    library_type: str | None = None

    @property
    def bytes(self) -> int:
        """Total size in bytes of the files that inferctl loads."""
        return sum(self.files.values())

    @property
    def has_modules(self) -> bool:
        """Whether it has the `modules.json` of sentence-transformers, so it is an embedding model."""
        return "modules.json" in self.files

    @property
    def pickled(self) -> bool:
        """Whether some of its weights are pickles, which `fetch` converts."""
        return any(map(_is_pickle, self.files))

    @property
    def weights_bytes(self) -> int:
        """Size in bytes of the weights, without a second copy of the weights of a sharded model.

        Those of static embeddings can be in the folder of their module.
        """
        sharded = "model.safetensors.index.json" in self.files
        return sum(
            size_bytes
            for name, size_bytes in self.files.items()
            if name.endswith((".safetensors", ".bin"))
            and _may_be_of_model(name, self.files)
            and not (sharded and name.startswith("consolidated"))
        )


def fetch(
    source: str, revision: str | None, progress: Progress, convert_progress: Progress = lambda *_: None
) -> ModelFolder:
    """Return the model `source`: a local folder, or a model in the hub's cache, downloaded if it is not there.

    A hub model without safetensors or `tokenizer.json` is converted, next to its snapshot in the cache. `progress` is
    called during a download only, `convert_progress` during a conversion. An interrupted download keeps its complete
    files, and the next one continues with the others. Raises `UsageError` for a model that does not exist or cannot be
    used, `NotReadyError` if the hub does not provide it.
    """
    if not model_folder.is_hub_id(source):
        return model_folder.find(source, revision)
    if (folder := cached(source, revision)) is not None:
        return folder
    snapshot = download(source, revision, progress)
    found = ModelFolder(snapshot)
    if not convert.needed(found) or (_generates(found) and not found.pickled):
        return model_folder.find(source, revision)
    target = snapshot.parent.parent / model_folder.CONVERTED / snapshot.name
    return convert.convert(snapshot, target, convert_progress)


def fetch_adapters(
    wanted: Iterable[AdapterSource], base: ModelFolder, progress: Callable[[str], Progress]
) -> tuple[Adapter, ...]:
    """Return the adapters of a spec on the model `base`. `progress(source)`: of a download. Raises what `fetch` does."""
    found = []
    for each in wanted:
        cached = model_folder.snapshot(each.source, each.revision)
        if model_folder.is_hub_id(each.source) and not (cached and (cached / adapter.WEIGHTS).is_file()):
            download(each.source, each.revision, progress(each.source))
        found.append(adapter.read(each.name, adapter.find(each.source, each.revision), base))
    return tuple(found)


def _generates(folder: ModelFolder) -> bool:
    """Return whether a model is generative. vLLM reads tokenizers of other formats, too."""
    return not folder.has_modules and folder.architecture.endswith(model_folder.GENERATIVE)


def download(source: str, revision: str | None, progress: Progress) -> Path:
    """Return the snapshot of a hub model in the hub's cache, with pickles where there are no safetensors.

    If the hub does not respond, a complete snapshot with pickles is sufficient. Raises the same errors as `fetch`.
    """
    try:
        with _translate_errors(source, revision):
            info = _info(source, revision)
            sizes = _sizes(info)
    except NotReadyError:
        try:
            return model_folder.find(source, revision).path
        except UnconvertedError as found:
            return found.folder
        except UsageError:
            pass
        raise
    if not any(_is_weights(name) and _may_be_of_model(name, sizes) for name in sizes):
        raise UsageError(
            f"{source} has no weights on the hub that can be served: neither *.safetensors nor pytorch_model.bin",
            "choose a model or a `model.revision` with safetensors weights",
        )
    from huggingface_hub import hf_hub_download

    counter = _ByteCounter(sum(sizes.values()), progress)
    root = None
    # One file at a time, so that Ctrl-C ends the download at once. Weights last: a cache with weights is complete.
    for name in sorted(sizes, key=lambda name: (_is_weights(name), name)):
        with _translate_errors(source, revision):
            file = hf_hub_download(source, name, revision=revision, tqdm_class=counter.bar(), etag_timeout=_TIMEOUT_S)
        root = root or Path(file).parents[name.count("/")]
        counter.complete(sizes[name])
    assert root
    return root


def cached(source: str, revision: str | None) -> ModelFolder | None:
    """Return the model in the hub's cache; None if it is missing or incomplete."""
    try:
        return model_folder.find(source, revision)
    except UsageError:
        return None


def facts(source: str, revision: str | None) -> HubModel:
    """Return the facts about `source` on the hub. Downloads two small files into the hub's cache, but no weights.

    Raises `UsageError` for a model that does not exist, `NotReadyError` if the hub does not respond.
    """
    with _translate_errors(source, revision):
        info = _info(source, revision)
        sizes = _sizes(info)
        first = "config.json" if "config.json" in sizes or "modules.json" not in sizes else "modules.json"
        names = (first, *({model_folder.LIBRARY_FILE, "modules.json"} & sizes.keys() - {first}))
        folder = ModelFolder(small_files(source, revision, names))
        found = HubModel(str(info.sha), folder.config, _parameters(info), sizes, folder.library_type)
        return found if found.parameters or not found.pickled else replace(found, parameters=_parameters_of(found))


def configuration(source: str, revision: str | None, found: HubModel) -> Path:
    """Download the small files of a model that say how it is used, and return their folder in the hub's cache.

    Raises the same errors as `facts`.
    """
    names = [
        name
        for name, size_bytes in found.files.items()
        if name.endswith((".json", ".jinja"))  # chat templates too
        and not name.endswith((".index.json", "tokenizer.json", "vocab.json"))
        and size_bytes <= _MAX_CONFIGURATION_BYTES
    ]
    # The first one is required, and says where the folder is.
    return small_files(source, revision, tuple(sorted(names, key=lambda name: ("/" in name, name != "config.json"))))


def small_files(source: str, revision: str | None, names: tuple[str, ...]) -> Path:
    """Download the files `names` of a model and return their folder in the hub's cache.

    Only the first file is required. Raises the same errors as `facts`.
    """
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    folder = Path()
    with _translate_errors(source, revision):
        if any(try_to_load_from_cache(source, name, revision=revision) is None for name in names):
            # If the hub does not respond, the client retries a file for minutes. This request fails at once.
            _info(source, revision)
        for index, name in enumerate(names):
            if index and try_to_load_from_cache(source, name, revision=revision) is _CACHED_NO_EXIST:
                continue  # if the hub does not respond, the client would retry an absent file for half a minute
            try:
                file = hf_hub_download(source, name, revision=revision, etag_timeout=_TIMEOUT_S)
            except EntryNotFoundError:
                if index:
                    continue
                raise
            folder = folder if index else Path(file).parent
    return folder


def commit(source: str, revision: str | None = None) -> str:
    """Return the current commit (40 hex digits) of `revision` of `source`. A commit is returned unchanged.

    Raises `UsageError` for a model or revision that does not exist, `NotReadyError` if the hub does not respond.
    """
    if revision and _COMMIT.fullmatch(revision):
        return revision
    with _translate_errors(source, revision):
        return str(_info(source, revision).sha)


class Lines:
    """A `Progress` that logs lines of text: one at the start, one every 5 s, one at the end."""

    def __init__(self, source: str, log: Callable[[str], None], verb: str = "download") -> None:
        self._source, self._log, self._verb = source, log, verb
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now < self._next and done < total:
            return
        started = self._next > 0
        self._next = now + _LINE_EVERY_S
        if done >= total:
            self._log(f"{self._verb}ed {self._source}: {size(total)}")
        elif not started:
            self._log(f"{self._verb}ing {self._source}: {size(total)}")
        else:
            self._log(f"{self._verb}ing {self._source}: {size(done)} of {size(total)} ({done / total:.0%})")


class _ByteCounter:
    """Adds the bytes of all files of a download and calls `progress`."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total, self._progress = total, progress
        self._complete = self._file = 0
        progress(0, total)

    def bar(self) -> Any:
        """Return a class that replaces the tqdm bar of one file and counts its bytes."""
        from tqdm import tqdm

        self._file = 0
        counter = self

        class Bar(tqdm):  # type: ignore[misc]
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **{**options, "disable": True})
                counter.add(int(options.get("initial") or 0))

            def update(self, n: float | None = 1) -> None:
                counter.add(int(n or 0))

        return Bar

    def add(self, number: int) -> None:
        self._file += number
        # Only `complete` reports the total, after the last file is in the cache.
        self._progress(min(self._complete + self._file, self._total - 1), self._total)

    def complete(self, number: int) -> None:
        self._complete += number
        self._progress(self._complete, self._total)


def _info(source: str, revision: str | None) -> ModelInfo:
    from huggingface_hub import HfApi, logging

    # The client logs warnings about tokens and retries between the output of a command. It raises all errors.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    return HfApi().model_info(source, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)


def _sizes(info: ModelInfo) -> dict[str, int]:
    """Return the bytes of each file that inferctl loads, by name."""
    found = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
    safe = {PurePosixPath(name).parent for name in found if name.endswith(".safetensors")}
    return {
        name: bytes_
        for name, bytes_ in found.items()
        if model_folder.is_loaded(path := PurePosixPath(name))
        and (path.suffix in _SUFFIXES or (_is_pickle(name) and path.parent not in safe))
    }


def _is_pickle(name: str) -> bool:
    """Return whether a file has weights as a pickle: of the model or one of its modules."""
    return (
        re.fullmatch(r"(?:[^/]+/)?pytorch_model(?:-\d+-of-\d+)?\.bin|(?:sparse|colbert)_linear\.pt", name) is not None
    )


def _may_be_of_model(name: str, files: Collection[str]) -> bool:
    """Return whether weights may be those of the model itself: without config.json, it is a module's folder."""
    return "/" not in name or "config.json" not in files


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") or _is_pickle(name)


def _parameters(info: ModelInfo) -> int | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    if info.safetensors is not None and info.safetensors.total:
        return int(info.safetensors.total)
    try:
        return sum(HfApi().get_safetensors_metadata(info.id, revision=info.sha).parameter_count.values())
    except (NotASafetensorsRepoError, SafetensorsParsingError):
        return None


def _parameters_of(found: HubModel) -> int:
    """Return the number of parameters of pickles, estimated from their size and the number format of the model."""
    number_format = found.config.get("dtype") or found.config.get("torch_dtype")
    return found.weights_bytes // (2 if number_format in ("float16", "bfloat16") else 4)


@contextmanager
def _translate_errors(source: str, revision: str | None) -> Iterator[None]:
    """Convert an error of the hub client to an `InferctlError`."""
    try:
        yield
    except InferctlError:
        raise
    except Exception as error:  # noqa: BLE001  # the client raises errors of several libraries
        raise _translate(error, source, revision) from None


def _translate(error: Exception, source: str, revision: str | None) -> InferctlError:
    from huggingface_hub import constants, errors

    chain = list(_chain(error))
    response = next((cause.response for cause in chain if isinstance(cause, errors.HfHubHTTPError)), None)
    status = response.status_code if response is not None else None
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in chain):
        return NotReadyError(
            f"model {source} is not a folder and not in the local hub cache; HF_HUB_OFFLINE prevents a download",
            "unset HF_HUB_OFFLINE, set HF_HOME to a cache that has the model, or pass `--model DIR`",
        )
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return NotReadyError(
            f"the hub denies access to {source}",
            f"accept its terms at {constants.ENDPOINT}/{source}, and set HF_TOKEN to a token that may read it",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(
            f"{source} has no revision {revision!r}", "set `model.revision` to a branch, tag or commit of the model"
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return UsageError(f"{source} has no config.json on the hub", "choose a model in Hugging Face layout")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return UsageError(
            f"model {source} not found: it is not a local folder, and the hub has no public model of this name",
            "check the spelling; for a private model, set HF_TOKEN",
        )
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{source!r} is not a hub id", "pass a hub id (org/name) or a local folder")
    for cause in chain:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return NotReadyError(
                f"the disk is full: {source} does not fit into {constants.HF_HUB_CACHE}",
                "free disk space, or set HF_HOME to a folder on a larger disk",
            )
        if isinstance(cause, PermissionError) or (isinstance(cause, OSError) and cause.errno == errno.EROFS):
            return NotReadyError(
                f"the hub cache {constants.HF_HUB_CACHE} is not writable", "set HF_HOME to a writable folder"
            )
    message = (str(error).strip() or type(error).__name__).splitlines()[0]
    # A number of the system says nothing to the reader: `[Errno -2] Name or service not known`.
    message = re.sub(r"\[Errno -?\d+\] ", "", message)
    return NotReadyError(
        f"{source} is not in the local hub cache, and the hub {constants.ENDPOINT} does not provide it: {message}",
        "check the network, the proxy and HF_ENDPOINT, or pass `--model DIR` with a local folder",
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and its causes."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__
