"""Renders the image of a spec, with facts of the catalog, its locks, and the commit of the repository it is in."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import inferctl
from inferctl.config.settings import Resolved
from inferctl.config.spec import Spec
from inferctl.core.errors import UsageError
from inferctl.facts import catalog
from inferctl.facts.catalog import BaseImage
from inferctl.image import locks, model_image, render
from inferctl.image.model_image import ModelImage
from inferctl.image.render import Provenance, Rendered
from inferctl.models import adapter
from inferctl.models.fit import Finding
from inferctl.models.image_source import is_image
from inferctl.models.model import ModelFolder, is_hub_id, resolve_task
from inferctl.models.weights_folders import WeightsFolder, find, weights_folders


def rendered_image(resolved: Resolved) -> Rendered:
    """Return the image of the spec, rendered with the facts of the catalog and the locks."""
    spec = resolved.spec
    base = catalog.base(spec.image.base)
    stack = catalog.stack(base.stack)
    package_locks = _locks(spec, base)
    provenance = _provenance(Path(resolved.file or ".").resolve().parent)
    return render.render(spec, base, stack, package_locks, provenance, *_known(spec))


def _locks(spec: Spec, base: BaseImage) -> locks.Locks:
    int8 = any(each.serve.precision == "int8" for each in spec.each())
    return locks.load(base, Path(spec.image.locks) if spec.image.locks else None, int8=int8, embed=spec.image.embed)


def _known(spec: Spec) -> tuple[list[WeightsFolder], dict[str, ModelImage]]:
    """Return the folders of the weights with what is known about them, and the model images to bake.

    Raises `UsageError` if the base image cannot serve a task, or an adapter does not fit its model.
    """
    models, found, images = {each.name: each for each in spec.each()}, [], {}
    local = {each.name: local_folder(each) for each in weights_folders(spec)}
    for each in weights_folders(spec):
        folder, task, size, sha256, space = local[each.name], None, None, None, ""
        if each.base is None:
            check_model_task(models[each.name], folder)
            task = task_of(models[each.name], folder)
        elif folder and (base := local[each.base]):
            adapter.read(each.name, folder.path, base)
        if each.weights == "bake" and is_image(each.source):
            image = images[each.name] = model_image.inspect(each.source)
            size, sha256 = image.bytes, image.sha256
            space = image.space if each.base is None and models[each.name].serve.max_input_tokens is None else ""
        elif folder:
            size = folder.bytes
            if each.weights == "bake" and not is_hub_id(each.source):
                sha256 = folder.digest
                if task == "embed":
                    space = model_image.space_names(folder, models[each.name].serve.max_input_tokens)
        found.append(replace(each, task=task, sha256=sha256, bytes=size, space=space or None))
    return found, images


def missing_files(spec: Spec, base: BaseImage) -> Iterator[Finding]:
    """Yield an error for each file or folder of the spec that is absent or not usable."""
    if spec.image.locks:
        try:
            _locks(spec, base)
        except UsageError as error:
            why = "`inferctl build` installs what the locks list"
            yield Finding("error", "locks", f"image.locks: {error.message}", why, error.hint)
    if spec.image.wheels and not any(Path(spec.image.wheels).glob("*.whl")):
        why = "`inferctl build` installs from this folder only"
        hint = "for each lock: `pip download --dest DIR --no-deps --require-hashes -r LOCK` (docs/build.md)"
        yield Finding("error", "wheels", f"image.wheels: {spec.image.wheels} has no wheels", why, hint)


def local_folder(each: WeightsFolder) -> ModelFolder | None:
    """Return the folder of a model or an adapter, or its snapshot in a cache; None if it is not on this machine."""
    try:
        return find(each)
    except UsageError:
        return None


def task_of(spec: Spec, folder: ModelFolder | None) -> str:
    """Return the task of a spec with one model, for `auto` that of `folder`. It stays `auto` without a folder."""
    if spec.model.task == "auto" and folder is not None:
        return resolve_task("auto", folder, spec.model.source)
    return spec.model.task


def check_model_task(spec: Spec, folder: ModelFolder | None) -> None:
    """Raise `UsageError` if images on the base of the spec cannot serve its task. `auto` is accepted."""
    base = catalog.base(spec.image.base)
    catalog.check_task(task_of(spec, folder), base, catalog.stack(base.stack))


def _provenance(folder: Path) -> Provenance:
    """Return the commit and remote of the repository of the spec. The fields are None without a repository."""

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return result.stdout.strip() or None if result.returncode == 0 else None

    revision = git("rev-parse", "HEAD")
    if revision and git("status", "--porcelain", "--untracked-files=no"):
        revision += "-dirty"
    url = git("config", "--get", "remote.origin.url")
    return Provenance(
        source=public_url(url) if url else None,
        revision=revision,
        created=git("log", "-1", "--format=%cI"),
        version=inferctl.__version__,
        epoch=_epoch(git("log", "-1", "--format=%ct")),
    )


def _epoch(commit: str | None) -> int:
    """Return the creation time of the image: SOURCE_DATE_EPOCH, the time of the commit, or the start of today (UTC)."""
    for seconds in (os.environ.get("SOURCE_DATE_EPOCH"), commit):
        if seconds and seconds.isdecimal():
            return int(seconds)
    return int(time.time()) // 86_400 * 86_400


def public_url(remote: str) -> str | None:
    """Return scheme, host and path of a git remote, without credentials; None for a local folder.

    `git@host:team/repo` becomes `https://host/team/repo`. User, password, query and fragment are left out.
    """
    short = re.fullmatch(r"(?:[^@/]+@)?([A-Za-z0-9.-]+):(?!/)(.+)", remote)
    if short and "://" not in remote:
        return f"https://{short.group(1)}/{short.group(2)}"
    try:
        parts = urlsplit(remote)
        port = f":{parts.port}" if parts.port and parts.scheme != "ssh" else ""
    except ValueError:
        return None
    if parts.scheme not in ("http", "https", "ssh") or not parts.hostname:
        return None
    return f"{'https' if parts.scheme == 'ssh' else parts.scheme}://{parts.hostname}{port}{parts.path}"
