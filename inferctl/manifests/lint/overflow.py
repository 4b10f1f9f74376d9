"""Rules on overflow: GPUs that are kept alive and empty, by placeholder pods or a CapacityBuffer."""

from __future__ import annotations

from collections.abc import Iterator

from inferctl.manifests.kubernetes.fields import get, integer, mapping, sequence, text
from inferctl.manifests.lint.finding import Hit, LintContext, rule
from inferctl.manifests.lint.manifests import Manifests, ManifestWorkload, same_namespace
from inferctl.manifests.manifests_file import Located

# Cluster Autoscaler's default of --expendable-pods-priority-cutoff.
_CUTOFF = -10


def _priority_class(manifests: Manifests, workload: ManifestWorkload) -> Located | None:
    name = text(workload.spec, "priorityClassName")
    return next((each for each in manifests.of("PriorityClass") if name and each.name == name), None)


@rule(
    "placeholder-priority",
    "error",
    "overflow",
    finds="placeholder pods with a priority below -10, or of 0 or more",
    consequence="Cluster Autoscaler ignores pods below -10 (--expendable-pods-priority-cutoff): it starts no node for "
    "them. Pods of priority 0 or more are never displaced by a model server",
    fix="use a PriorityClass with a value from -10 to -1",
)
def _priority(manifests: Manifests, _: LintContext) -> Iterator[Hit]:
    for each in manifests.placeholders:
        found = _priority_class(manifests, each)
        if found is not None:
            value = integer(found.data, "value")
            if value is None or not _CUTOFF <= value < 0:
                yield Hit(found, ("value",), f"the placeholder {each.object.name} has priority {value}")
        elif not text(each.spec, "priorityClassName"):
            yield Hit(each.object, each.spec_path, f"the placeholder {each.object.name} has the default priority")


@rule(
    "placeholder-preempts",
    "warning",
    "overflow",
    finds="a PriorityClass of placeholders without preemptionPolicy: Never",
    consequence="a placeholder may evict pods of even lower priority instead of waiting for a new node",
    fix="set preemptionPolicy: Never in the PriorityClass",
)
def _preempts(manifests: Manifests, _: LintContext) -> Iterator[Hit]:
    for each in manifests.placeholders:
        found = _priority_class(manifests, each)
        if found is not None and get(found.data, "preemptionPolicy") != "Never":
            yield Hit(found, ("preemptionPolicy",), f"the placeholder {each.object.name} may preempt")


@rule(
    "placeholder-differs",
    "error",
    "overflow",
    finds="placeholder pods whose GPU, node labels or tolerations differ from those of every model server, or that "
    "request less CPU or memory",
    consequence="the place that they hold is not one where a model server fits, so it does not help in a spike",
    fix="copy resources (GPU; CPU and memory of all containers), nodeSelector, node affinity and tolerations from the "
    "model server",
)
def _differs(manifests: Manifests, _: LintContext) -> Iterator[Hit]:
    for each in manifests.placeholders:
        servers = [server for server in manifests.model_servers if same_namespace(each.object, server.object)]
        differences = [_difference(each, server) for server in servers]
        if not differences or any(found is None for found in differences):
            continue
        # The closest server: the one that agrees in most fields.
        field, what = max((found for found in differences if found), key=lambda found: _FIELDS.index(found[0]))
        path = (*each.spec_path, *(("containers", 0, "resources") if field == "resources" else (field,)))
        yield Hit(each.object, path, what)


_FIELDS = ("resources", "affinity", "tolerations")


def _difference(placeholder: ManifestWorkload, server: ManifestWorkload) -> tuple[str, str] | None:
    """Return the first field in which a placeholder differs from a model server, and how; None if it does not."""
    if placeholder.gpus != server.gpus:
        return "resources", f"it requests {_shown(placeholder)}, {server.object.name} {_shown(server)}"
    for name in ("cpu", "memory"):
        ours, theirs = placeholder.request(name), server.request(name)
        if ours < theirs:
            return "resources", f"it requests {ours:g} of {name}, all containers of {server.object.name} {theirs:g}"
    if placeholder.node_labels != server.node_labels:
        labels, wanted = placeholder.node_labels, server.node_labels
        differing = sorted(key for key in {*labels, *wanted} if labels.get(key) != wanted.get(key))
        return "affinity", f"it requires other node labels than {server.object.name}: {', '.join(differing)}"
    for toleration in sequence(server.spec, "tolerations"):
        if toleration not in sequence(placeholder.spec, "tolerations"):
            return "tolerations", f"it lacks the toleration of {text(toleration, 'key')} that {server.object.name} has"
    return None


def _shown(workload: ManifestWorkload) -> str:
    return ", ".join(f"{name}: {count}" for name, count in workload.gpus.items()) or "no GPU"


def _buffers(manifests: Manifests) -> list[Located]:
    return manifests.of("CapacityBuffer")


@rule(
    "buffer-and-placeholders",
    "warning",
    "overflow",
    finds="a CapacityBuffer and placeholder pods for one kind of GPU",
    consequence="the overflow is kept twice, and paid twice",
    fix="keep the CapacityBuffer where the autoscaler knows it, else the placeholders",
)
def _buffer_and_placeholders(manifests: Manifests, _: LintContext) -> Iterator[Hit]:
    for buffer in _buffers(manifests):
        target = buffer_target(manifests, buffer)
        for each in manifests.placeholders:
            if target is not None and each.gpus == target.gpus and same_namespace(buffer, each.object):
                yield Hit(buffer, ("spec",), f"{each.object.name} keeps the same GPUs free")


def buffer_target(manifests: Manifests, buffer: Located) -> ManifestWorkload | None:
    """Return the workload or pod template that a CapacityBuffer keeps room for; None if it is not among the objects."""
    for key, kind in (("scalableRef", ""), ("podTemplateRef", "PodTemplate")):
        reference = mapping(buffer.data, "spec", key)
        if reference and (found := manifests.named(buffer, kind or text(reference, "kind"), reference.get("name"))):
            return found
    return None


@rule(
    "buffer-reference",
    "error",
    "overflow",
    finds="a CapacityBuffer without exactly one of scalableRef and podTemplateRef, or with a target that is missing",
    consequence="schema and rules of the API accept it, but the autoscaler keeps nothing free",
    fix="set scalableRef to the Deployment, or podTemplateRef to a PodTemplate",
)
def _reference(manifests: Manifests, _: LintContext) -> Iterator[Hit]:
    for buffer in _buffers(manifests):
        set_ = [key for key in ("scalableRef", "podTemplateRef") if get(buffer.data, "spec", key)]
        if len(set_) != 1:
            yield Hit(buffer, ("spec",), f"it has {' and '.join(set_) or 'neither scalableRef nor podTemplateRef'}")
        elif buffer_target(manifests, buffer) is None and any(
            same_namespace(buffer, each.object) for each in manifests.model_servers
        ):
            name = get(buffer.data, "spec", set_[0], "name")
            what = f"{set_[0]} names {name}, which is not among these manifests"
            yield Hit(buffer, ("spec", set_[0]), what, level="warning")


@rule(
    "buffer-size",
    "warning",
    "overflow",
    finds="a CapacityBuffer with both replicas and percentage, with percentage but no scalableRef, or without a size",
    consequence="Cluster Autoscaler takes the larger of both, Karpenter the smaller: the size depends on the cloud",
    fix="set replicas or percentage (percentage only with scalableRef), not both",
)
def _size(manifests: Manifests, _: LintContext) -> Iterator[Hit]:
    for buffer in _buffers(manifests):
        spec = mapping(buffer.data, "spec")
        if "replicas" in spec and "percentage" in spec:
            yield Hit(buffer, ("spec", "percentage"), "it has both replicas and percentage")
        elif "percentage" in spec and "scalableRef" not in spec:
            yield Hit(buffer, ("spec", "percentage"), "percentage of what? There is no scalableRef")
        elif not {"replicas", "percentage", "limits"} & spec.keys():
            yield Hit(buffer, ("spec",), "it has no replicas, percentage or limits")


@rule(
    "buffer-version",
    "error",
    "versions",
    finds="a CapacityBuffer of a version that the autoscaler does not know",
    consequence="the API server refuses the object, or no controller acts on it",
    fix="v1beta1 from Kubernetes 1.35 and for Karpenter, v1alpha1 only for Cluster Autoscaler of 1.34",
)
def _version(manifests: Manifests, context: LintContext) -> Iterator[Hit]:
    karpenter = any(each.api_version.startswith("karpenter.sh/") for each in manifests.of("NodePool"))
    for buffer in _buffers(manifests):
        version = buffer.api_version.rpartition("/")[2]
        path = ("apiVersion",)
        if version not in ("v1alpha1", "v1beta1"):
            yield Hit(buffer, path, f"there is no version {version}")
        elif karpenter:
            if version == "v1alpha1":
                yield Hit(buffer, path, "Karpenter knows only v1beta1, and there is a NodePool of Karpenter")
        elif context.minor < 34:
            yield Hit(buffer, path, f"Cluster Autoscaler of 1.{context.minor} does not know CapacityBuffer")
        elif version == "v1beta1" and context.minor < 35:
            yield Hit(buffer, path, f"Cluster Autoscaler of 1.{context.minor} does not know v1beta1")
        elif version == "v1alpha1" and context.minor >= 35:
            yield Hit(buffer, path, f"v1alpha1 is deprecated from 1.35 (this is 1.{context.minor})", level="warning")
