"""Rules on GPUs: shares that do not encroach on each other, and what fits on them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from inferctl.manifests.kubernetes.fields import as_float, get, mapping, sequence, text
from inferctl.manifests.kubernetes.labels import GKE_ACCELERATOR, GPU_PRODUCT, MIG_STATE
from inferctl.manifests.lint import models
from inferctl.manifests.lint.finding import Hit, rule
from inferctl.manifests.lint.manifests import Manifests, ManifestWorkload, same_namespace

_GPU_TAINT = re.compile(r"gpu|accelerator", re.IGNORECASE)


@rule(
    "visible-devices",
    "warning",
    "neighbors",
    finds="a container that sets NVIDIA_VISIBLE_DEVICES, other than in a DaemonSet",
    consequence="where the device plugin has its default (envvar), the variable replaces the GPUs that it chose, with "
    "or without a limit: the container uses GPUs of other pods",
    fix="remove the variable, and request GPUs with resources.limits",
)
def _visible(manifests: Manifests) -> Iterator[Hit]:
    for workload in manifests.workloads:
        # Exporters and device plugins, which need all GPUs of a node, are DaemonSets.
        for each in workload.all_containers if workload.object.kind != "DaemonSet" else ():
            for index, variable in enumerate(sequence(each.data, "env")):
                value = text(variable, "value")
                if text(variable, "name") == "NVIDIA_VISIBLE_DEVICES" and value not in ("", "void", "none"):
                    what = "all GPUs of the node" if value == "all" else "GPUs by number or name"
                    yield Hit(workload.object, (*each.path, "env", index), f"container {each.name} takes {what}")


@rule(
    "parallel-size",
    "error",
    "placement",
    finds="a server that spreads a model over more GPUs (tensor times pipeline parallel size) than its pods have",
    consequence="the server ends at its start, because it does not find the GPUs",
    fix="request as many GPUs, or lower the parallel size",
)
def _parallel(manifests: Manifests) -> Iterator[Hit]:
    for workload in manifests.model_servers:
        count, wanted = sum(workload.gpus.values()) * workload.group_size, models.devices(workload)
        # With Ray, GPUs are those of other pods too.
        ray = workload.object.kind.startswith("Ray") or any("ray" in each.words for each in workload.containers)
        if count and wanted > count and not ray:
            container = next(each for each in workload.containers if each.gpus)
            what = f"the parallel sizes need {wanted} GPUs, and there {'is 1' if count == 1 else f'are {count}'}"
            yield Hit(workload.object, (*container.path, "resources"), what)


@rule(
    "shared-memory-missing",
    "error",
    "placement",
    finds="a server that spreads a model over several GPUs of a pod, without a volume at /dev/shm",
    consequence="its processes exchange tensors there, and container runtimes give it 64 MiB: the server ends with a "
    "bus error or an error of NCCL",
    fix="mount an emptyDir with medium: Memory and a sizeLimit of some GiB at /dev/shm",
)
def _shared_memory(manifests: Manifests) -> Iterator[Hit]:
    for workload in manifests.model_servers:
        count = models.devices(workload)
        for each in workload.containers:
            mounted = {text(mount, "mountPath").rstrip("/") for mount in sequence(each.data, "volumeMounts")}
            several = count > 1 and sum(each.gpus.values()) > 1
            if several and "/dev/shm" not in mounted and get(workload.spec, "hostIPC") is not True:
                what = f"{each.name} uses {count} GPUs, and mounts nothing at /dev/shm"
                yield Hit(workload.object, (*each.path, "volumeMounts"), what)


@rule(
    "mig-state-missing",
    "error",
    "placement",
    finds="a node label of a MIG slice (single strategy) without nvidia.com/mig.config.state In [success]",
    consequence="the pod can start before the node has made its slices, and takes the whole GPU",
    fix="add nvidia.com/mig.config.state In [success] to the required node affinity",
)
def _mig_state(manifests: Manifests) -> Iterator[Hit]:
    for workload in manifests.workloads:
        labels = workload.node_labels
        slices = [value for value in labels.get(GPU_PRODUCT, ()) if "-MIG-" in value]
        if slices and "nvidia.com/gpu" in workload.gpus and labels.get(MIG_STATE) != {"success"}:
            yield Hit(workload.object, _node_path(workload), f"{GPU_PRODUCT} is {slices[0]} whatever the state of MIG")


def _node_path(workload: ManifestWorkload) -> tuple[str | int, ...]:
    """Return the path of the field that requires node labels."""
    if get(workload.spec, "nodeSelector", GPU_PRODUCT):
        return (*workload.spec_path, "nodeSelector", GPU_PRODUCT)
    return (*workload.spec_path, "affinity", "nodeAffinity")


@rule(
    "gpu-toleration-missing",
    "warning",
    "placement",
    finds="a pod with GPUs that does not tolerate the usual taint of GPU nodes",
    consequence="GPU nodes are tainted to keep other pods away, so the pod stays pending",
    fix="tolerate the taint: {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}",
)
def _toleration(manifests: Manifests) -> Iterator[Hit]:
    for workload in manifests.workloads:
        if workload.object.kind == "PodTemplate" or not any(name.startswith("nvidia.com/") for name in workload.gpus):
            continue
        # GKE adds the toleration itself. Key and value of the taint differ: nvidia.com/gpu, or sku=gpu on Azure.
        if GKE_ACCELERATOR not in workload.node_labels and not any(
            _GPU_TAINT.search(f"{text(each, 'key')} {text(each, 'value')}")
            or (not get(each, "key") and get(each, "operator") == "Exists")
            for each in sequence(workload.spec, "tolerations")
        ):
            path = (*workload.spec_path, "tolerations")
            yield Hit(workload.object, path, "no toleration for the taint nvidia.com/gpu:NoSchedule")


@rule(
    "gpu-quota-low",
    "error",
    "guardrails",
    finds="a ResourceQuota below the GPUs of the highest number of replicas and one rollout",
    consequence="the API server refuses pods just when load is highest or a rollout runs",
    fix="raise the quota, or lower the highest number of replicas",
)
def _quota(manifests: Manifests) -> Iterator[Hit]:
    for quota in manifests.of("ResourceQuota"):
        if get(quota.data, "spec", "scopeSelector") or get(quota.data, "spec", "scopes"):
            continue
        for key, value in mapping(quota.data, "spec", "hard").items():
            name, limit = str(key).removeprefix("requests."), as_float(value)
            if limit is None or not str(key).startswith("requests."):
                continue
            users = [each for each in manifests.workloads if name in each.gpus and same_namespace(quota, each.object)]
            needs = [(manifests.replicas(each)[1] + manifests.surge(each)) * each.gpus[name] for each in users]
            if users and sum(needs) > limit:
                parts = ", ".join(f"{each.object.name} {need}" for each, need in zip(users, needs, strict=True))
                what = f"{name}: {limit:g} allowed, {sum(needs)} needed at most ({parts})"
                yield Hit(quota, ("spec", "hard", key), what)
