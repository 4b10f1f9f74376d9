"""Rules on overflow: GPUs that are kept alive and empty, by placeholder pods or a CapacityBuffer."""

from __future__ import annotations

from collections.abc import Iterator

from inferctl.manifests.kubernetes.fields import integer, sequence, text
from inferctl.manifests.lint.finding import Hit, rule
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
def _priority(manifests: Manifests) -> Iterator[Hit]:
    for each in manifests.placeholders:
        found = _priority_class(manifests, each)
        if found is not None:
            value = integer(found.data, "value")
            if value is None or not _CUTOFF <= value < 0:
                yield Hit(found, ("value",), f"the placeholder {each.object.name} has priority {value}")
        elif not text(each.spec, "priorityClassName"):
            yield Hit(each.object, each.spec_path, f"the placeholder {each.object.name} has the default priority")


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
def _differs(manifests: Manifests) -> Iterator[Hit]:
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
