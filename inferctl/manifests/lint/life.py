"""Rules on the life of a pod: start, probes, rollout, eviction, drain."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from inferctl.manifests import label_keys
from inferctl.manifests.kubernetes.fields import as_float, get, integer, mapping, sequence, text
from inferctl.manifests.lint import models
from inferctl.manifests.lint.finding import Hit, rule
from inferctl.manifests.lint.manifests import ManifestContainer, Manifests, ManifestWorkload, same_namespace

_DRAIN_WORDS = ("--drain-seconds", "--shutdown-timeout", "--timeout-graceful-shutdown", "--exit-timeout-secs")
_DRAIN_VARIABLES = ("INFERCTL_SERVE_DRAIN_SECONDS",)
# A server that loads a model needs longer than this on most hardware. Measured load times replace it.
_SHORT_START_S = 60


@rule(
    "grace-too-short",
    "error",
    "life",
    finds="a termination grace period below the preStop hook and the drain together, or of 0 for a model server",
    consequence="the kubelet kills the server while it still works on requests",
    fix="set terminationGracePeriodSeconds to preStop + drain + a margin of some seconds",
)
def _grace(manifests: Manifests) -> Iterator[Hit]:
    for workload in manifests.workloads:
        if workload.object.kind in ("Job", "CronJob"):
            continue  # its clients are in the pod, such as in our bench Jobs, and end with it
        grace = integer(workload.spec, "terminationGracePeriodSeconds", default=30)
        path = (*workload.spec_path, "terminationGracePeriodSeconds")
        if grace == 0 and workload.is_model_server:
            yield Hit(workload.object, path, "with a grace period of 0 s, the server is killed at once")
            continue
        for each in workload.containers:
            sleep, drain = _pre_stop(each), _drain(each)
            # A hook that takes all of the period leaves nothing for the server; without one, only a drain counts.
            if sleep + drain > grace or (sleep and sleep >= grace):
                parts = f"preStop {sleep:g} s + drain {drain:g} s"
                yield Hit(workload.object, path, f"{parts} of {each.name} exceed the grace period of {grace} s")


def _pre_stop(container: ManifestContainer) -> float:
    """Return the seconds that the preStop hook sleeps; 0 if it does not, or if that is unknown."""
    hook = mapping(container.data, "lifecycle", "preStop")
    if (seconds := integer(hook, "sleep", "seconds")) is not None:
        return seconds
    words = " ".join(map(str, sequence(hook, "exec", "command")))
    found = re.search(r"\bsleep (\d{1,6})\b", words)
    return float(found[1]) if found else 0.0


def _drain(container: ManifestContainer) -> float:
    """Return the seconds that the server may take after SIGTERM by its own options; 0 if it does not say."""
    found = models.values(container, _DRAIN_WORDS, _DRAIN_VARIABLES)
    return _number(found[0]) if found else 0.0


def _number(value: Any) -> float:
    try:
        return max(0.0, min(float(value), 1e9))
    except (TypeError, ValueError):
        return 0.0


def _window(probe: Any) -> int:
    """Return the seconds after which a probe that always fails has failed, from the start of the container."""
    period, failures = integer(probe, "periodSeconds"), integer(probe, "failureThreshold")
    return (integer(probe, "initialDelaySeconds") or 0) + (10 if period is None else period) * (
        3 if failures is None else failures
    )


@rule(
    "startup-too-short",
    "error",
    "life",
    finds="a startupProbe (or, without one, a livenessProbe) that ends before the model can be loaded",
    consequence="the kubelet kills the server while it loads, again and again",
    fix="set startupProbe.failureThreshold x periodSeconds to twice the measured load time",
)
def _startup(manifests: Manifests) -> Iterator[Hit]:
    for workload in manifests.model_servers:
        load = as_float(get(workload.object.data, "metadata", "annotations", label_keys.LOAD))
        for each in workload.containers:
            startup, liveness = mapping(each.data, "startupProbe"), mapping(each.data, "livenessProbe")
            if not (each.gpus or load) or (not each.gpus and not _has_probe(each)):
                continue
            key, window = ("startupProbe", _window(startup)) if startup else ("livenessProbe", _window(liveness))
            if not (startup or liveness):
                continue
            if load is not None and window < load:
                what = f"the {key} of {each.name} allows {window} s, and its load takes {load:g} s"
                yield Hit(workload.object, (*each.path, key), what)
            elif load is None and window < _SHORT_START_S:
                what = f"the {key} of {each.name} allows {window} s to load a model"
                yield Hit(workload.object, (*each.path, key), what, level="warning")


def _has_probe(container: ManifestContainer) -> bool:
    return bool(mapping(container.data, "startupProbe") or mapping(container.data, "livenessProbe"))


@rule(
    "surge-needs-gpu",
    "warning",
    "life",
    finds="a rollout that starts an additional GPU pod (maxSurge) without overflow, unless the minimum is one replica "
    "and maxSurge is set",
    consequence="if no GPU is free, the rollout waits for one and stops there; maxSurge is 25% by default, rounded up",
    fix="set maxSurge: 0 and maxUnavailable: 1, or keep overflow for this kind of GPU",
)
def _surge(manifests: Manifests) -> Iterator[Hit]:
    for workload in manifests.model_servers:
        surge = manifests.surge(workload)
        if not (workload.gpus and surge) or _has_overflow(manifests, workload):
            continue
        least, most = manifests.replicas(workload)
        explicit = get(workload.object.data, "spec", "strategy", "rollingUpdate", "maxSurge") is not None
        if explicit and least < 2:
            continue  # the only rollout without an outage
        path = ("spec", "strategy") if get(workload.object.data, "spec", "strategy") else ("spec",)
        default = "" if explicit else " (default maxSurge)"
        what = f"at {most} replicas, a rollout starts {surge} more GPU pod{'' if surge == 1 else 's'}{default}"
        yield Hit(workload.object, path, what)


def _has_overflow(manifests: Manifests, workload: ManifestWorkload) -> bool:
    """Return whether placeholders or a CapacityBuffer keep a GPU of the same kind free."""
    buffers = (manifests.buffer_target(each) for each in manifests.of("CapacityBuffer"))
    kept = [*manifests.placeholders, *(each for each in buffers if each is not None)]
    return any(each.gpus == workload.gpus and each.node_labels == workload.node_labels for each in kept)


@rule(
    "empty-dir-unbounded",
    "warning",
    "life",
    finds="an emptyDir without sizeLimit",
    consequence="it can fill the disk of the node, or its memory with medium: Memory, and then other pods are evicted",
    fix="set emptyDir.sizeLimit; medium: Memory counts toward the memory limit of the container",
)
def _empty_dir(manifests: Manifests) -> Iterator[Hit]:
    for workload in manifests.workloads:
        for index, volume in enumerate(sequence(workload.spec, "volumes")):
            path, name = (*workload.spec_path, "volumes", index), text(volume, "name")
            size, in_memory = get(volume, "emptyDir", "sizeLimit"), get(volume, "emptyDir", "medium") == "Memory"
            # A volume without a source is an emptyDir.
            if isinstance(volume, dict) and not size and ("emptyDir" in volume or volume.keys() <= {"name"}):
                yield Hit(workload.object, path, f"emptyDir {name}{' in memory' if in_memory else ''} has no sizeLimit")


@rule(
    "service-links",
    "error",
    "life",
    finds="vLLM in the namespace of a Service named vllm",
    consequence="Kubernetes sets VLLM_PORT=tcp://... in its pods; vLLM reads it as its own setting and does not start",
    fix="set enableServiceLinks: false, or rename the Service",
)
def _links(manifests: Manifests) -> Iterator[Hit]:
    for workload in manifests.model_servers:
        words = " ".join(f"{each.image} {' '.join(each.words)}" for each in workload.containers)
        for service in manifests.of("Service"):
            if (
                service.name == "vllm"
                # A headless Service has no address to tell.
                and get(service.data, "spec", "clusterIP") != "None"
                and "vllm" in words
                and same_namespace(service, workload.object)
                and (get(workload.spec, "enableServiceLinks") is not False)
            ):
                path = (*workload.spec_path, "enableServiceLinks")
                yield Hit(workload.object, path, "the Service vllm sets VLLM_PORT in the pods")
