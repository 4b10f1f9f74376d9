"""Rules on autoscalers: what they scale on, what they do without data, and what limits them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from inferctl.manifests.kubernetes.fields import as_float, get, integer, mapping, sequence, text
from inferctl.manifests.lint.finding import Hit, rule
from inferctl.manifests.lint.manifests import Manifests, ManifestWorkload
from inferctl.manifests.lint.placement import replicas_path
from inferctl.manifests.manifests_file import FieldPath, Located

_GPU_METRIC = re.compile(
    r"gpu_?utili?[sz]?\w*|duty_cycle|gpu_usage|sm_active|gr_engine_active|nvidia_smi\w*|DCGM_FI_DEV_MEM_COPY", re.I
)
_BACKLOG = re.compile(r"waiting|queue|backlog|pending|in_?flight", re.I)
_NOT_RATE = re.compile(r"queue|waiting|backlog", re.I)
_RATE = re.compile(r"\b(?:rate|irate|increase)\s*\(", re.I)


def _triggers(scaled: Located) -> Iterator[tuple[FieldPath, Any]]:
    for index, trigger in enumerate(sequence(scaled.data, "spec", "triggers")):
        yield ("spec", "triggers", index), trigger


def _metrics(autoscaler: Located) -> list[tuple[FieldPath, str]]:
    """Return the path and the words of each metric of an HPA or a ScaledObject: its query, or its names."""
    if autoscaler.kind == "ScaledObject":
        return [
            ((*path, "metadata", "query"), text(trigger, "metadata", "query") or text(trigger, "type"))
            for path, trigger in _triggers(autoscaler)
        ]
    found: list[tuple[FieldPath, str]] = []
    for index, metric in enumerate(sequence(autoscaler.data, "spec", "metrics")):
        kind = text(metric, "type")
        source = mapping(metric, kind[:1].lower() + kind[1:])
        found.append((("spec", "metrics", index), text(source, "metric", "name") or text(source, "name")))
    return found


@rule(
    "replicas-and-autoscaler",
    "warning",
    "guardrails",
    finds="spec.replicas of a workload that an autoscaler owns",
    consequence="each apply sets the number of replicas back, at peak too",
    fix="remove spec.replicas",
)
def _replicas(manifests: Manifests) -> Iterator[Hit]:
    for workload in manifests.workloads:
        if replicas_path(workload) == ("spec", "replicas") and (found := manifests.autoscalers_of(workload)):
            count = get(workload.object.data, "spec", "replicas")
            what = f"replicas: {count} next to {found[0].kind} {found[0].name}"
            yield Hit(workload.object, ("spec", "replicas"), what)


@rule(
    "keda-replica-limits",
    "warning",
    "guardrails",
    finds="a ScaledObject without minReplicaCount or maxReplicaCount",
    consequence="the defaults are 0, so that the first request after a pause waits for a cold start, and 100, so that "
    "a wrong query can order 100 GPUs",
    fix="set both: the minimum to 0 only if a cold start is acceptable, the maximum to what the budget pays",
)
def _limits(manifests: Manifests) -> Iterator[Hit]:
    for each in manifests.of("ScaledObject"):
        for key in ("minReplicaCount", "maxReplicaCount"):
            if integer(each.data, "spec", key) is None:
                yield Hit(each, ("spec",), f"no {key}")


@rule(
    "keda-no-data-is-zero",
    "warning",
    "guardrails",
    finds='a prometheus trigger without ignoreNullValues: "false"',
    consequence="no data counts as 0: if Prometheus loses the servers at peak, KEDA scales them in",
    fix='set ignoreNullValues: "false" in the metadata of the trigger',
)
def _null_values(manifests: Manifests) -> Iterator[Hit]:
    for each in manifests.of("ScaledObject"):
        for path, trigger in _triggers(each):
            value = get(trigger, "metadata", "ignoreNullValues")
            if get(trigger, "type") == "prometheus" and str(value).lower() != "false":
                yield Hit(each, (*path, "metadata"), f"trigger {path[-1]} ignores missing data")


@rule(
    "keda-fallback",
    "warning",
    "guardrails",
    finds="a ScaledObject on Prometheus without a fallback, or with a static one for several triggers",
    consequence="if Prometheus fails, the number of replicas does not follow the load; a static fallback also "
    "overrides the triggers that still work",
    fix="set fallback: {failureThreshold: 3, replicas: N, behavior: currentReplicasIfHigher}",
)
def _fallback(manifests: Manifests) -> Iterator[Hit]:
    for each in manifests.of("ScaledObject"):
        triggers = [trigger for _, trigger in _triggers(each)]
        fallback = mapping(each.data, "spec", "fallback")
        if not fallback and any(get(trigger, "type") == "prometheus" for trigger in triggers):
            yield Hit(each, ("spec",), "no fallback")
        elif fallback and len(triggers) > 1 and fallback.get("behavior", "static") == "static":
            yield Hit(each, ("spec", "fallback"), f"a static fallback for {len(triggers)} triggers")


@rule(
    "scale-on-gpu-utilization",
    "warning",
    "guardrails",
    finds="an autoscaler on the utilization of the GPU",
    consequence="it shows that a kernel runs, not how much work waits: it is high at half of the capacity, and reads 0 "
    "on MIG slices",
    fix="scale on offered tokens per second over the measured rate, and on queued tokens",
)
def _utilization(manifests: Manifests) -> Iterator[Hit]:
    for each in manifests.autoscalers:
        for path, words in _metrics(each):
            if found := _GPU_METRIC.search(words):
                workload = manifests.target(each)
                mig = workload is not None and any("/mig-" in name for name in workload.gpus)
                what = f"the metric {found[0]} is about the GPU, not about the load"
                yield Hit(each, path, what, level="error" if mig else None)


@rule(
    "cpu-metric-for-gpu",
    "warning",
    "guardrails",
    finds="an autoscaler of a GPU workload on its CPU or memory",
    consequence="CPU and memory of a GPU server hardly follow its load: it scales too late, or never back",
    fix="scale on offered tokens per second over the measured rate, and on queued tokens",
)
def _cpu(manifests: Manifests) -> Iterator[Hit]:
    for each in manifests.autoscalers:
        workload = manifests.target(each)
        if workload is None or not workload.gpus:
            continue
        metrics = _metrics(each)
        if metrics and all(words in ("cpu", "memory") for _, words in metrics):
            yield Hit(each, metrics[0][0], f"{workload.object.name} has a GPU and is scaled on {metrics[0][1]} alone")


@rule(
    "backlog-only",
    "warning",
    "guardrails",
    finds="an autoscaler whose only metric is a queue",
    consequence="an empty queue means the minimum: replicas start and end in turns (71 changes of direction in an hour "
    "of our simulation, 1 with the rate as a second trigger)",
    fix="add the offered rate over the measured rate as a second trigger; the larger one wins",
)
def _backlog(manifests: Manifests) -> Iterator[Hit]:
    for each in manifests.autoscalers:
        metrics = _metrics(each)
        if metrics and all(_BACKLOG.search(words) and not _RATE.search(words) for _, words in metrics):
            queues = [words for _, words in metrics if _NOT_RATE.search(words)]
            if queues:
                yield Hit(each, metrics[0][0], f"the only metric is {_short(queues[0])}")


def _short(words: str) -> str:
    return words if len(words) <= 60 else f"{words[:59]}…"


@rule(
    "pool-limit-low",
    "error",
    "guardrails",
    finds="Karpenter NodePools whose GPU limit is below the highest number of replicas and the surge of rollouts on "
    "their nodes, or that have no limits at all",
    consequence="Karpenter starts no more nodes, and replicas stay pending at peak or in a rollout",
    fix="raise spec.limits of the NodePool, or lower the highest number of replicas",
)
def _pool_limits(manifests: Manifests) -> Iterator[Hit]:
    pools = [each for each in manifests.of("NodePool") if each.api_version.startswith("karpenter.sh/")]
    servers = [each for each in manifests.model_servers if any(_may_start(pool, each) for pool in pools)]
    names = {name for each in servers for name in each.gpus}
    for name in sorted(names):
        limits = [as_float(get(pool.data, "spec", "limits", name)) for pool in pools]
        known = [limit for limit in limits if limit is not None]
        needs = sum((manifests.replicas(each)[1] + manifests.surge(each)) * each.gpus.get(name, 0) for each in servers)
        # A pool without a limit for this GPU can start any number.
        if pools and len(known) == len(limits) and needs > sum(known):
            what = f"{name}: {sum(known):g} allowed by the NodePools, {needs} needed by all replicas and rollouts"
            yield Hit(pools[0], ("spec", "limits", name), what)
    for pool in pools:
        if not mapping(pool.data, "spec", "limits"):
            consequence = "a wrong autoscaler or a loop of failing pods can order nodes without end"
            fix = "set spec.limits, for GPUs too: {nvidia.com/gpu: 8}"
            yield Hit(pool, ("spec",), "no spec.limits", level="warning", consequence=consequence, fix=fix)


def _may_start(pool: Located, server: ManifestWorkload) -> bool:
    """Return whether nodes of a NodePool can have the labels that the pods of a server require."""
    labels = mapping(pool.data, "spec", "template", "metadata", "labels")
    return all(str(labels[key]) in allowed for key, allowed in server.node_labels.items() if key in labels)


@rule(
    "scale-down-window",
    "warning",
    "guardrails",
    finds="an autoscaler that scales down in less than a minute",
    consequence="a pause in the traffic ends replicas whose cold start takes minutes; the next request waits for them",
    fix="set behavior.scaleDown.stabilizationWindowSeconds to 300 or more (the default), at least one cold start",
)
def _window(manifests: Manifests) -> Iterator[Hit]:
    for each in manifests.autoscalers:
        prefix: FieldPath = ("spec",)
        if each.kind == "ScaledObject":
            prefix = ("spec", "advanced", "horizontalPodAutoscalerConfig")
        path = (*prefix, "behavior", "scaleDown", "stabilizationWindowSeconds")
        window = get(each.data, *path)
        if isinstance(window, int) and window < 60:
            yield Hit(each, path, f"the window is {window} s")
