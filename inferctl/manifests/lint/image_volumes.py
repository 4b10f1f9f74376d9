"""Rules on weights that Kubernetes mounts from an image (`volumes[].image`)."""

from __future__ import annotations

from collections.abc import Iterator

from inferctl.core.sizes import size
from inferctl.manifests.kubernetes.fields import as_float, get, text
from inferctl.manifests.lint import models
from inferctl.manifests.lint.finding import Hit, LintContext, rule
from inferctl.manifests.lint.manifests import Manifests


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
    "image-volume-pull",
    "warning",
    "life",
    finds="an image volume with pullPolicy Never, or with Always and a digest",
    consequence="a node without the image never pulls it, so its pods do not start",
    fix="set pullPolicy: IfNotPresent",
)
def _pull(manifests: Manifests, _: LintContext) -> Iterator[Hit]:
    for workload in manifests.workloads:
        for path, image in workload.image_volumes:
            reference = text(image, "reference")
            # The default of Kubernetes, also if a digest follows the tag.
            default = "Always" if reference.partition("@")[0].endswith(":latest") else "IfNotPresent"
            policy = get(image, "pullPolicy") or default
            where = (*path, "pullPolicy")
            if policy == "Never":
                yield Hit(workload.object, where, "pullPolicy is Never")
            elif policy == "Always" and "@" in reference:
                asks = "each pod asks the registry for an image that cannot change, and does not start if it is down"
                what = "pullPolicy is Always, and the reference has a digest"
                yield Hit(workload.object, where, what, consequence=asks)


@rule(
    "image-volume-exceeds-disk",
    "warning",
    "placement",
    finds="an image volume with weights (--spec) larger than the disk of a node (--nodes) that its pods can run on",
    consequence="the scheduler does not count images: a pod that lands there waits for a pull that cannot end, unless "
    "the node has its images on another disk",
    fix="give the nodes larger disks, or exclude the small ones by label",
)
def _disk(manifests: Manifests, context: LintContext) -> Iterator[Hit]:
    for workload in manifests.model_servers:
        known = models.facts(workload, context)
        if not workload.image_volumes or known is None or not known.weights_bytes:
            continue
        for node in context.nodes:
            disk = as_float(get(node.data, "status", "allocatable", "ephemeral-storage"))
            usable = workload.runs_on(node) and workload.untolerated(node) is None
            if usable and disk is not None and disk < known.weights_bytes:
                what = f"{size(known.weights_bytes)} of weights, and {node.name} has {size(int(disk))} for all images"
                yield Hit(workload.object, workload.image_volumes[0][0], what)
                break
