"""Rules on the images of servers, and on weights that Kubernetes mounts from an image (`volumes[].image`)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from inferctl.manifests.kubernetes.fields import get, sequence, text
from inferctl.manifests.lint.finding import Hit, LintContext, rule
from inferctl.manifests.lint.manifests import Manifests
from inferctl.manifests.manifests_file import Located

# Of the images of vLLM, text-generation-inference, SGLang, llama.cpp and Ollama.
_MOVES = re.compile(r"(?:[\w.]+-)?(?:latest|nightly)(?:-.*)?|main|master|dev|stable|server(?:-[a-z]+)?")


@rule(
    "image-volume-unpinned",
    "warning",
    "life",
    finds="an image volume whose reference has no digest",
    consequence="a tag can be moved: then pods of one workload serve different weights, by when they started "
    "(pullPolicy Always) or by what their node has (IfNotPresent)",
    fix="write name@sha256:... as the reference",
)
def _unpinned(manifests: Manifests, _: LintContext) -> Iterator[Hit]:
    for workload in manifests.workloads:
        for path, image in workload.image_volumes:
            reference = text(image, "reference")
            if reference and "@" not in reference:
                yield Hit(workload.object, (*path, "reference"), f"{reference} has no digest")


@rule(
    "image-volume-subpath",
    "warning",
    "placement",
    finds="a mount with subPath of an image volume, unless all described nodes (--nodes) have a runtime that knows it",
    consequence="containerd before 2.2 ignores the subPath and mounts the whole image, so the server finds no model at "
    "its path",
    fix="mount the image without subPath, and name the folder in it in the path of the model",
)
def _sub_path(manifests: Manifests, context: LintContext) -> Iterator[Hit]:
    for workload in manifests.workloads:
        nodes = [node for node in context.nodes if workload.runs_on(node)]
        if nodes and all(_knows_sub_path(node) for node in nodes):
            continue
        images = {get(workload.object.data, *path[:-1], "name") for path, _ in workload.image_volumes}
        for each in workload.all_containers:
            for index, mount in enumerate(sequence(each.data, "volumeMounts")):
                key = next((key for key in ("subPath", "subPathExpr") if text(mount, key)), None)
                if key and get(mount, "name") in images:
                    what = f"{text(mount, 'mountPath')} is {key} {text(mount, key)} of an image"
                    yield Hit(workload.object, (*each.path, "volumeMounts", index, key), what)


def _knows_sub_path(node: Located) -> bool:
    """Return whether the container runtime of a node is containerd 2.2 or newer, or CRI-O."""
    runtime = text(node.data, "status", "nodeInfo", "containerRuntimeVersion")
    found = re.match(r"containerd://v?(\d+)\.(\d+)", runtime)
    return runtime.startswith("cri-o://") or (found is not None and (int(found[1]), int(found[2])) >= (2, 2))


@rule(
    "image-unpinned",
    "warning",
    "life",
    finds="a model server with an image without a tag or digest, or with a tag that moves, such as latest",
    consequence="a pod that starts later can run another version of the engine, with other options and other results",
    fix="write name@sha256:..., or the tag of a release",
)
def _floating(manifests: Manifests, _: LintContext) -> Iterator[Hit]:
    for workload in manifests.model_servers:
        for each in workload.containers:
            tag = each.image.rpartition("/")[2].partition(":")[2]
            if each.image and "@" not in each.image and (not tag or _MOVES.fullmatch(tag)):
                yield Hit(workload.object, (*each.path, "image"), f"{each.image} is another image after each release")
