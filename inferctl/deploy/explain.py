"""The arithmetic of a deployment as rows and as the JSON document of `inferctl deploy --json`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from inferctl.config.spec import Spec
from inferctl.core.sizes import size
from inferctl.deploy.clusters import Cluster
from inferctl.deploy.figure import Figure, shown
from inferctl.deploy.plan import DeploymentPlan, FlavorPlan, ModelPlan, Placement
from inferctl.manifests import versions
from inferctl.models.weights_folders import WeightsFolder, weights_folders

SCHEMA = "inferctl.deploy/1"


def rows(model: ModelPlan, clusters: Sequence[Cluster]) -> Iterator[tuple[str, Figure]]:
    """Yield every figure of a model with its scope: the model, a flavor, or a flavor in a cluster."""
    if model.traffic:
        traffic = model.traffic
        for figure in (traffic.tokens_per_request, traffic.base, traffic.peak, traffic.slope):
            yield model.name, figure
    if model.key_servers:
        yield model.name, model.key_servers
    for each in weights_folders(model.spec):
        yield each.name if each.base or model.spec.models else model.name, weights(model.spec, each)
    for flavor in model.flavors:
        for figure in flavor_figures(flavor):
            yield flavor.name, figure
        for cluster in clusters:
            for figure in placement_figures(flavor.at(cluster)):
                yield f"{flavor.name} in {cluster.name}", figure


def weights(spec: Spec, folder: WeightsFolder) -> Figure:
    """Return how the weights of a model or an adapter reach a pod, and what this needs."""
    if image := folder.volume:
        source = (
            f"image volumes are on by default from Kubernetes 1.{versions.FEATURES['image-volume'].since}; for an "
            "older cluster, set deploy.weights.pvc, or model.weights: bake"
        )
        return Figure("weights", 1, "image volume", image, source)
    if claim := folder.weights == "mount" and spec.deploy.weights.pvc:
        source = "spec deploy.weights.pvc; for pods on several nodes, ReadOnlyMany or ReadWriteMany"
        return Figure("weights", 1, "claim", claim, source)
    if folder.weights == "bake":
        return Figure("weights", 1, "layer of the image", "", "spec model.weights: bake")
    return Figure("weights", 1, "download", folder.source, "spec model.weights: download; by each pod at its start")


def flavor_figures(flavor: FlavorPlan) -> list[Figure]:
    """Return the figures of a flavor that are the same in all clusters."""
    found = []
    if flavor.rate:
        kind = "measured" if flavor.rate.measured else "assumed"
        found.append(Figure(f"rate, {kind}", flavor.rate.tokens_per_second, "tokens/s", "", flavor.rate.source))
    if memory := _gpu_memory(flavor):
        found.append(memory)
    return [
        *found,
        flavor.load_s,
        flavor.cold_start_s,
        flavor.startup_failures,
        flavor.drain_s,
        flavor.grace_s,
        flavor.memory_bytes,
        flavor.cpu,
    ]


def placement_figures(placed: Placement) -> list[Figure]:
    """Return the figures of a flavor in one cluster."""
    if placed.replicas and not placed.max_replicas.value:
        return [placed.replicas]
    found = [placed.at_base, placed.at_peak, placed.min_replicas, placed.max_replicas, placed.replicas]
    found.append(placed.overflow)
    return [figure for figure in found if figure is not None]


def document(plan: DeploymentPlan) -> dict[str, Any]:
    """Return the document of `--json` (docs/deploy.md describes its keys)."""
    return {
        "schema": SCHEMA,
        "namespace": plan.namespace,
        "clusters": [cluster.model_dump(mode="json") for cluster in plan.clusters],
        "models": [_model(model, plan.clusters) for model in plan.models],
        "warnings": plan.all_warnings,
    }


def _model(model: ModelPlan, clusters: Sequence[Cluster]) -> dict[str, Any]:
    traffic = model.traffic
    return {
        "name": model.name,
        "task": model.task,
        "traffic": traffic
        and [figure.as_dict() for figure in (traffic.tokens_per_request, traffic.base, traffic.peak, traffic.slope)],
        "key_servers": model.key_servers and model.key_servers.as_dict(),
        "weights": weights(model.spec, weights_folders(model.spec)[0]).as_dict(),
        "flavors": [_flavor(flavor, clusters) for flavor in model.flavors],
        "warnings": list(model.warnings),
    }


def _flavor(flavor: FlavorPlan, clusters: Sequence[Cluster]) -> dict[str, Any]:
    rate = flavor.rate
    return {
        "name": flavor.name,
        "hardware": flavor.hardware.key,
        "precision": flavor.precision,
        "image": flavor.image,
        "sharing": flavor.sharing,
        "shared_by": flavor.shared_by,
        "rate": rate
        and {"tokens_per_second": rate.tokens_per_second, "measured": rate.measured, "source": rate.source},
        "figures": [figure.as_dict() for figure in flavor_figures(flavor)],
        "clusters": [
            {
                "name": cluster.name,
                "resource": (resource := flavor.at(cluster).resource)
                and {"name": resource.name, "count": resource.count, "labels": dict(resource.labels)},
                "figures": [figure.as_dict() for figure in placement_figures(flavor.at(cluster))],
            }
            for cluster in clusters
        ],
    }


def _gpu_memory(flavor: FlavorPlan) -> Figure | None:
    """Return the memory that the model needs on its part of the GPU, with the arithmetic of `inferctl check`."""
    need, available = flavor.fit.memory, flavor.fit.memory_bytes
    if need is None or available is None:
        return None
    parts = [need.weights, need.activations, need.overhead]
    formula = " + ".join(size(part, 1) for part in parts)
    source = f"estimated: weights, activations and overhead, of {size(available, 1)}"
    if flavor.shared_by > 1:
        source += f" (1/{flavor.shared_by} of the GPU)"
    if flavor.fit.capacity:
        sequences = flavor.fit.capacity.sequences
        source += f"; the rest holds the KV cache of {shown(sequences)} sequences"
    return Figure("GPU memory", need.total, "bytes", formula, source)
