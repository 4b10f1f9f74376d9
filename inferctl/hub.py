"""Downloads models and reads facts about them from a Hugging Face hub. Models stay in the hub's own cache (`HF_HOME`).

A model in the cache is used without the network. Every failure is an `InferctlError` with one hint.
"""

from __future__ import annotations

import errno
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from inferctl import model
from inferctl.errors import InferctlError, NotReadyError, UsageError
from inferctl.model import ModelFolder
from inferctl.sizes import size

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

# Receives the bytes that are here and the bytes of the whole model.
Progress = Callable[[int, int], None]
# Brings the model `source` at `revision` to this machine, as `fetch` does with a progress of the caller's choice.
Fetch = Callable[[str, str | None], ModelFolder]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_S = 10.0
# No pickles, and no exports for other runtimes: the server loads safetensors only.
_SUFFIXES = model.SUFFIXES - {".gguf"}
_LINE_EVERY_S = 5.0


@dataclass(frozen=True)
class Facts:
    """What a hub says about a model. `files` maps the files that inferctl loads to their bytes.

    `parameters` is None if neither the hub nor the headers of the weights tell.
    """

    commit: str
    config: Mapping[str, Any]
    parameters: int | None
    files: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """Bytes of the files that inferctl loads."""
        return sum(self.files.values())


def fetch(source: str, revision: str | None, progress: Progress) -> ModelFolder:
    """The model `source`: a local folder, a model in the hub's cache, or a download into that cache.

    `progress` is called during a download only. A download that stops keeps its complete files; the next one continues.
    Raises `UsageError` for a model that does not exist or is not usable, `NotReadyError` if the hub does not
    provide it.
    """
    if not model.is_hub_id(source):
        return model.find(source, revision)
    if (folder := cached(source, revision)) is not None:
        return folder
    with _explained(source, revision):
        info = _info(source, revision)
        sizes = _sizes(info)
    if not any(PurePosixPath(name).suffix == ".safetensors" and "/" not in name for name in sizes):
        raise UsageError(
            f"{source} has no *.safetensors weights at the hub",
            "choose a model or a `model.revision` with safetensors weights",
        )
    from huggingface_hub import hf_hub_download

    count = _Count(sum(sizes.values()), progress)
    # One file at a time, so that Ctrl-C ends the download at once. Weights come last: if they are here, the rest is.
    for name in sorted(sizes, key=lambda name: (name.endswith(".safetensors"), name)):
        with _explained(source, revision):
            hf_hub_download(source, name, revision=revision, tqdm_class=count.bar(), etag_timeout=_TIMEOUT_S)
        count.complete(sizes[name])
    return model.find(source, revision)


def cached(source: str, revision: str | None) -> ModelFolder | None:
    """The complete model in the hub's cache; None if it is not there, or only in part."""
    try:
        return model.find(source, revision)
    except UsageError:
        return None


def facts(source: str, revision: str | None) -> Facts:
    """What the hub says about `source`. Downloads its `config.json` into the hub's cache, and no weights.

    Raises `UsageError` for a model that does not exist, `NotReadyError` if the hub does not respond.
    """
    with _explained(source, revision):
        info = _info(source, revision)
        sizes = _sizes(info)
        config = json.loads((small_files(source, revision, ("config.json",)) / "config.json").read_text("utf-8"))
        return Facts(str(info.sha), config if isinstance(config, dict) else {}, _parameters(info), sizes)


def small_files(source: str, revision: str | None, names: tuple[str, ...]) -> Path:
    """Downloads those of `names` that the model has; returns their folder in the hub's cache. The first one must exist.

    Raises like `facts`.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    folder = Path()
    with _explained(source, revision):
        if any(try_to_load_from_cache(source, name, revision=revision) is None for name in names):
            # The client retries a file for minutes where a hub does not respond; this request fails at once.
            _info(source, revision)
        for index, name in enumerate(names):
            try:
                file = hf_hub_download(source, name, revision=revision, etag_timeout=_TIMEOUT_S)
            except EntryNotFoundError:
                if index:
                    continue
                raise
            folder = folder if index else Path(file).parent
    return folder


def commit(source: str, revision: str | None = None) -> str:
    """The commit (40 hex digits) that `revision` of `source` is now; a commit is returned as it is.

    Raises `UsageError` for a model or revision that does not exist, `NotReadyError` if the hub does not respond.
    """
    if revision and _COMMIT.fullmatch(revision):
        return revision
    with _explained(source, revision):
        return str(_info(source, revision).sha)


class Lines:
    """`Progress` as lines of text: one at the start, one every 5 s, one at the end."""

    def __init__(self, source: str, say: Callable[[str], None]) -> None:
        self._source, self._say = source, say
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now < self._next and done < total:
            return
        started = self._next > 0
        self._next = now + _LINE_EVERY_S
        if done >= total:
            self._say(f"downloaded {self._source}: {size(total)}")
        elif not started:
            self._say(f"downloading {self._source}: {size(total)}")
        else:
            self._say(f"downloading {self._source}: {size(done)} of {size(total)} ({done / total:.0%})")


class _Count:
    """Adds up the bytes of all files of a download."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total, self._progress = total, progress
        self._complete = self._file = 0
        progress(0, total)

    def bar(self) -> Any:
        """A class that counts the bytes of one file in the place of a tqdm bar."""
        from tqdm import tqdm

        self._file = 0
        count = self

        class Bar(tqdm):  # type: ignore[misc]
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **{**options, "disable": True})
                count.add(int(options.get("initial") or 0))

            def update(self, n: float | None = 1) -> None:
                count.add(int(n or 0))

        return Bar

    def add(self, number: int) -> None:
        self._file += number
        # The last call is that of `complete`, when everything is in its place.
        self._progress(min(self._complete + self._file, self._total - 1), self._total)

    def complete(self, number: int) -> None:
        self._complete += number
        self._progress(self._complete, self._total)


def _info(source: str, revision: str | None) -> ModelInfo:
    from huggingface_hub import HfApi, logging

    # Its warnings about tokens and retries come between the lines of a command; what matters is raised.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    return HfApi().model_info(source, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)


def _sizes(info: ModelInfo) -> dict[str, int]:
    """The files that inferctl loads -> bytes."""
    found = {one.rfilename: int(one.size or 0) for one in info.siblings or ()}
    return {
        name: size
        for name, size in found.items()
        if (path := PurePosixPath(name)).suffix in _SUFFIXES and model.is_loaded(path)
    }


def _parameters(info: ModelInfo) -> int | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    if info.safetensors is not None and info.safetensors.total:
        return int(info.safetensors.total)
    try:
        return sum(HfApi().get_safetensors_metadata(info.id, revision=info.sha).parameter_count.values())
    except (NotASafetensorsRepoError, SafetensorsParsingError):
        return None


@contextmanager
def _explained(source: str, revision: str | None) -> Iterator[None]:
    """Raise what the hub client raises as an `InferctlError`."""
    try:
        yield
    except InferctlError:
        raise
    except Exception as error:  # noqa: BLE001  # the client raises errors of several libraries
        raise _explain(error, source, revision) from None


def _explain(error: Exception, source: str, revision: str | None) -> InferctlError:
    from huggingface_hub import constants, errors

    chain = list(_chain(error))
    response = next((one.response for one in chain if isinstance(one, errors.HfHubHTTPError)), None)
    status = response.status_code if response is not None else None
    if any(isinstance(one, errors.OfflineModeIsEnabled) for one in chain):
        return NotReadyError(
            f"{source} is neither a folder nor complete in the local hub cache, and HF_HUB_OFFLINE prevents a download",
            "unset HF_HUB_OFFLINE, set HF_HOME to a cache that has the model, or pass `--model DIR`",
        )
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return NotReadyError(
            f"the hub refuses access to {source}",
            f"accept its terms at {constants.ENDPOINT}/{source}, and set HF_TOKEN to a token that may read it",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(
            f"{source} has no revision {revision!r}", "set `model.revision` to a branch, tag or commit of the model"
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return UsageError(f"{source} has no config.json at the hub", "choose a model in Hugging Face layout")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return UsageError(
            f"there is no folder {source}, and the hub has no such model or does not show it without a token",
            "check the spelling; for a private model set HF_TOKEN",
        )
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{source!r} is not a hub id", "give a hub id (org/name) or a local folder")
    for one in chain:
        if isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT):
            return NotReadyError(
                f"the disk is full: {source} does not fit into {constants.HF_HUB_CACHE}",
                "free some space, or set HF_HOME to a folder on a larger disk",
            )
        if isinstance(one, PermissionError) or (isinstance(one, OSError) and one.errno == errno.EROFS):
            return NotReadyError(
                f"the hub cache {constants.HF_HUB_CACHE} is not writable", "set HF_HOME to a folder that is writable"
            )
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return NotReadyError(
        f"{source} is not in the local hub cache, and the hub {constants.ENDPOINT} does not provide it: {said}",
        "check the network, the proxy and HF_ENDPOINT; or pass `--model DIR` with a local folder",
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error` and what caused it."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__
