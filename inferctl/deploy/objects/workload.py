"""The Deployment of a flavor: one server container, its settings, probes, volumes and nodes."""

from __future__ import annotations

import math
from typing import Any

from inferctl.config.spec import DEFAULT_PORT
from inferctl.deploy.figure import Noted
from inferctl.deploy.objects import access, metering, relay, sharing
from inferctl.deploy.objects.containers import container_security, empty, pod_base, reserve_disk, spread
from inferctl.deploy.objects.metadata import HTTP_PORT, SERVER, Object, labels_of, metadata
from inferctl.deploy.plan import FlavorPlan, GpuResource, ModelPlan, Placement
from inferctl.image.render import CACHE_PATH
from inferctl.manifests import label_keys
from inferctl.manifests.label_keys import TASK
from inferctl.models import image_source
from inferctl.models.model import IMAGE_FOLDER
from inferctl.models.weights_folders import downloads, weights_folders

_MIB = 1024 * 1024
_LEAST_DOWNLOAD_GIB = 50


def deployment(model: ModelPlan, flavor: FlavorPlan, namespace: str) -> Object:
    """Return the Deployment of `flavor`, without replicas: the autoscaler or the patch of a cluster sets them.

    Its GPU resource and node labels are those of NVIDIA's device plugin, which the patch of a cluster can replace.
    """
    labels = labels_of(model.name, SERVER, flavor.label)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(flavor.name, namespace, labels, capacity_annotations(model, flavor)),
        "spec": {
            "revisionHistoryLimit": 3,
            "progressDeadlineSeconds": _progress_deadline(flavor),
            "strategy": {"type": "RollingUpdate", "rollingUpdate": _rollout(flavor.surge)},
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {
                    # The name of the container that `kubectl logs` and `kubectl exec` use.
                    "annotations": {"kubectl.kubernetes.io/default-container": SERVER},
                    "labels": {**labels, "app.kubernetes.io/part-of": "inferctl", TASK: model.task},
                },
                "spec": pod(model, flavor),
            },
        },
    }


def capacity_annotations(model: ModelPlan, flavor: FlavorPlan) -> dict[str, str | Noted]:
    """Return the annotations that say what a replica can do, for `inferctl deploy --preview`."""
    found: dict[str, str | Noted] = {
        label_keys.PREFERENCE: str([each.name for each in model.flavors].index(flavor.name) + 1),
        label_keys.LOAD: Noted(f"{flavor.load_s.value:g}", flavor.load_s.note),
    }
    if flavor.rate:
        found[label_keys.RATE] = Noted(f"{flavor.rate.tokens_per_second:.10g}", flavor.rate.origin)
        found[label_keys.UTILIZATION] = Noted(f"{model.spec.deploy.utilization:g}", "spec deploy.utilization")
    return found


def pod(model: ModelPlan, flavor: FlavorPlan) -> Object:
    """Return the pod spec of a server, for the Pod Security level `restricted`."""
    sidecars = relay.sidecars(model.spec)
    found = {
        **pod_base(model.name, grace_s=flavor.grace_s.noted),
        **spread(labels_of(model.name, SERVER, flavor.label)),
        **_affinity(model, flavor.resource),
        **({"initContainers": sidecars} if sidecars else {}),
        "containers": [container(model, flavor)],
        "volumes": [volume for volume, _ in _volumes(model)],
    }
    return reserve_disk(found)


def container(model: ModelPlan, flavor: FlavorPlan) -> Object:
    """Return the server container of `flavor`."""
    resources = {**cpu_and_memory(flavor), **sharing.limits(flavor.resource)}
    return {
        "name": SERVER,
        "image": flavor.image,
        "imagePullPolicy": "IfNotPresent",
        "env": [{"name": name, "value": value} for name, value in environment(model, flavor).items()],
        "ports": [{"name": HTTP_PORT, "containerPort": port(model), "protocol": "TCP"}],
        # Equal requests and limits: the server is not throttled by neighbors, and is evicted last.
        "resources": {"requests": resources, "limits": dict(resources)},
        "securityContext": container_security(),
        "startupProbe": {
            **_probe("/readyz"),
            "periodSeconds": flavor.startup_period_s.noted,
            "failureThreshold": flavor.startup_failures.noted,
        },
        # /livez stays 200 during a drain and under full load, so that neither restarts the container.
        "livenessProbe": {**_probe("/livez"), "periodSeconds": 10, "failureThreshold": 6},
        "readinessProbe": {**_probe("/readyz"), "periodSeconds": 5, "failureThreshold": 2},
        "lifecycle": {"preStop": {"sleep": {"seconds": flavor.pre_stop_s.noted}}},
        "volumeMounts": [mount for _, mount in _volumes(model)],
    }


def environment(model: ModelPlan, flavor: FlavorPlan) -> dict[str, str | Noted]:
    """Return the settings of the server that differ from those in its image."""
    spec = model.spec
    drain = Noted(f"{flavor.drain_s.value:g}", flavor.drain_s.note)
    found: dict[str, str | Noted] = {
        "INFERCTL_SERVE_PRECISION": flavor.precision,
        "INFERCTL_SERVE_DRAIN_SECONDS": drain,
    }
    if any(each.volume and each.path == IMAGE_FOLDER for each in weights_folders(spec)):
        # Not by the `subPath` of the mount, which containerd ignores before 2.2: the whole image would be at /model.
        found["INFERCTL_MODEL_SOURCE"] = f"{IMAGE_FOLDER}/{image_source.FOLDER}"
    found |= access.environment(spec)
    if model.key_servers:
        found["INFERCTL_ACCESS_REPLICAS"] = Noted(f"{model.key_servers.value:g}", model.key_servers.note)
    return found | metering.environment(spec)


def port(model: ModelPlan) -> int:
    """Return the port that the server in the image listens on."""
    return model.spec.serve.port or DEFAULT_PORT


def in_cluster(model: ModelPlan, flavor: FlavorPlan, placed: Placement, namespace: str) -> Object | None:
    """Return the patch of the Deployment for one cluster; None if nothing differs there.

    It has the GPU resource and the node labels of the cluster, its rollouts, and the replicas if no autoscaler sets
    them.
    """
    spec: Object = {}
    if placed.replicas is not None:
        spec["replicas"] = placed.replicas.noted
    if placed.surge != flavor.surge:
        spec["strategy"] = {"rollingUpdate": _rollout(placed.surge)}
    if placed.resource != flavor.resource and placed.resource is not None:
        changed: dict[str, Any] = sharing.limits(placed.resource)
        if flavor.resource and flavor.resource.name != placed.resource.name:
            changed = {flavor.resource.name: None, **changed}
        container = {"name": SERVER, "resources": {"requests": changed, "limits": dict(changed)}}
        spec["template"] = {"spec": {**sharing.placement(placed.resource), "containers": [container]}}
    if not spec:
        return None
    name = {"name": flavor.name, "namespace": namespace}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": name, "spec": spec}


def _affinity(model: ModelPlan, resource: GpuResource | None) -> Object:
    found = sharing.placement(resource)
    # Preferred, not required: two halves of one GPU may run two servers.
    apart = {
        "weight": 50,
        "podAffinityTerm": {
            "topologyKey": "kubernetes.io/hostname",
            "labelSelector": {"matchLabels": labels_of(model.name, SERVER)},
        },
    }
    preferred = {"preferredDuringSchedulingIgnoredDuringExecution": [apart]}
    return {**found, "affinity": {**found.get("affinity", {}), "podAntiAffinity": preferred}}


def _rollout(surge: int) -> Object:
    """Return how many pods may be missing or added during a rollout. A surge needs a free GPU."""
    return {"maxSurge": surge, "maxUnavailable": 0 if surge else 1}


def _progress_deadline(flavor: FlavorPlan) -> Noted:
    probes = flavor.startup_period_s.value * flavor.startup_failures.value
    seconds = max(600, 60 * math.ceil((flavor.cold_start_s.value + probes) / 60))
    return Noted(
        seconds, "at least cold start + startup probes; otherwise a rollout counts as failed while nodes start"
    )


def cpu_and_memory(flavor: FlavorPlan) -> Object:
    memory, cpu = flavor.memory_bytes, flavor.cpu
    cores = f"{math.ceil(cpu.value * 1000)}m" if cpu.value != int(cpu.value) else str(int(cpu.value))
    return {
        "cpu": Noted(cores, cpu.note),
        "memory": Noted(f"{math.ceil(memory.value / _MIB)}Mi", memory.note),
    }


def _probe(path: str) -> Object:
    return {"httpGet": {"path": path, "port": HTTP_PORT}, "timeoutSeconds": 3}


def _download_limit(model: ModelPlan) -> str:
    """Return the size limit of the folder for downloaded weights. Above it, the pod is evicted."""
    return f"{max(_LEAST_DOWNLOAD_GIB, math.ceil(1.2 * model.weights_bytes / 1024**3))}Gi"


def _volumes(model: ModelPlan) -> list[tuple[Object, Object]]:
    """Return the volumes of a server, each with its mount."""
    spec = model.spec
    generate = "generate" in model.tasks
    found = [empty("tmp", "/tmp", "10Gi" if generate else "1Gi")]  # vLLM writes compiled kernels
    if generate:
        # Processes of vLLM exchange tensors here. The engine's default of 64 MiB is too small.
        found.append(empty("shm", "/dev/shm", f"{spec.serve.gpus}Gi", medium="Memory"))
    folders = weights_folders(spec)
    if downloads(spec):
        found.append(empty("model-cache", CACHE_PATH, _download_limit(model)))
    for each in (one for one in folders if one.weights == "mount"):
        claim = {"persistentVolumeClaim": {"claimName": spec.deploy.weights.pvc, "readOnly": True}}
        image = {"image": {"reference": each.volume, "pullPolicy": "IfNotPresent"}}
        mount = {"name": each.stage, "mountPath": each.mount, "readOnly": True}
        found.append(({"name": each.stage, **(image if each.volume else claim)}, mount))
    return found + access.volumes(spec) + metering.volumes(spec)
