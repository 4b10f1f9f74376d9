"""A rule on the images of servers, and on weights that Kubernetes mounts from an image (`volumes[].image`)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from inferctl.manifests.kubernetes.fields import text
from inferctl.manifests.lint.finding import Hit, rule
from inferctl.manifests.lint.manifests import Manifests

# Of the images of vLLM, text-generation-inference, SGLang, llama.cpp and Ollama.
_MOVES = re.compile(r"(?:[\w.]+-)?(?:latest|nightly)(?:-.*)?|main|master|dev|stable|server(?:-[a-z]+)?")


@rule(
    "image-unpinned",
    "warning",
    "life",
    finds="a model server with an image without a tag or digest, or with a tag that moves, such as latest; an image "
    "volume without a digest",
    consequence="a pod that starts later can run another version of the engine, with other options and other results",
    fix="write name@sha256:..., or the tag of a release",
)
def _floating(manifests: Manifests) -> Iterator[Hit]:
    for workload in manifests.model_servers:
        for each in workload.containers:
            tag = each.image.rpartition("/")[2].partition(":")[2]
            if each.image and "@" not in each.image and (not tag or _MOVES.fullmatch(tag)):
                yield Hit(workload.object, (*each.path, "image"), f"{each.image} is another image after each release")
    for workload in manifests.workloads:
        for path, image in workload.image_volumes:
            reference = text(image, "reference")
            if reference and "@" not in reference:
                yield Hit(
                    workload.object,
                    (*path, "reference"),
                    f"{reference} has no digest",
                    consequence="a tag can be moved: then pods of one workload serve different weights, by when they "
                    "started (pullPolicy Always) or by what their node has (IfNotPresent)",
                    fix="write name@sha256:... as the reference",
                )
