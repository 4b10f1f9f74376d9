"""The files of a deployment, for kustomize: `base/`, one component for each capability, one overlay for each cluster.

    base/                  what is the same everywhere: servers, Services, budgets, network policies
    components/NAME/       a capability that an overlay includes: monitoring, metering
    overlays/CLUSTER/      one cluster: its replicas, GPU resource and node labels, quota, overflow
    bench/CLUSTER/         bench Jobs, which run before the rest is deployed: each flavor once, in its first cluster
    embed/CLUSTER/         the Job of `--embed`, on the first flavor that the cluster can have; written alone

`kubectl apply -k overlays/CLUSTER` installs all that belongs to one cluster.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

from inferctl.core.errors import UsageError
from inferctl.deploy import cluster_limits, endpoints, manifest
from inferctl.deploy.clusters import Cluster
from inferctl.deploy.objects import (
    access,
    bench,
    broker,
    embed,
    metering,
    policy,
    scaling,
    service,
    workload,
)
from inferctl.deploy.objects.metadata import BENCH, EMBED, PART_OF, SERVER, Object, labels_of
from inferctl.deploy.observe import objects as observe
from inferctl.deploy.plan import DeploymentPlan, FlavorPlan, ModelPlan
from inferctl.manifests import versions
from inferctl.manifests.label_keys import COMPONENT
from inferctl.models.weights_folders import downloads, weights_folders

_KUSTOMIZE = "kustomize.config.k8s.io"
_FILE = "kustomization.yaml"
# All files are in these; those of earlier versions also in the last three.
FOLDERS = ("base", "components", "overlays", "bench", "first", "gpu-operator", "monitoring")
# Files of a folder that are not of one model, so no model may have the name of one.
_OTHER_FILES = ("kustomization", "namespace", "network")

# `inferctl bench` accepts no longer name of a server. It is in the name of the receipt.
LONGEST_BENCH = 40
_LONGEST_LABEL = 63
# Kind and component (None: of any) of an object -> most characters of its name, and why.
_LONGEST: Mapping[tuple[str, str | None], tuple[int, str]] = {
    ("Deployment", SERVER): (46, "names of its pods have a hash of the template and one of the pod, in 63 characters"),
    ("Job", BENCH): (LONGEST_BENCH, "`inferctl bench` accepts no longer name (deploy.bench)"),
    ("Job", EMBED): (51, "the host names of its pods are `embed-NAME-INDEX`, in 63 characters"),
    ("Service", None): (_LONGEST_LABEL, "it is a DNS label"),
}


@dataclass
class Folder:
    """One kustomization: files with objects, files with patches of objects of others, and objects to delete.

    `config_maps`: those that kustomize makes of files, which have the names of their keys. `other`: files for which
    there is no object.
    """

    resources: dict[str, list[Object]] = field(default_factory=dict)
    patches: dict[str, list[Object]] = field(default_factory=dict)
    config_maps: dict[str, Object] = field(default_factory=dict)
    other: dict[str, str] = field(default_factory=dict)
    deleted: list[Object] = field(default_factory=list)
    bases: list[str] = field(default_factory=list)
    components: list[str] = field(default_factory=list)

    def objects_of(self, model: ModelPlan) -> list[Object]:
        """Return the objects that are only for one model."""
        name = _file_of(model)
        return [*self.resources.get(name, []), *(each for key, each in self.config_maps.items() if key == name)]

    def without(self, omitted: Container[str]) -> Folder:
        """Return the folder without the objects whose kind, or kind and name, are in `omitted`."""
        kept = {
            file: [
                each
                for each in objects
                if each["kind"] not in omitted and f"{each['kind']}/{each['metadata']['name']}" not in omitted
            ]
            for file, objects in self.resources.items()
        }
        return replace(self, resources=kept)

    def files(self, path: str, kind: str = "Kustomization") -> dict[str, str]:
        """Return the files by path. Files without objects are left out."""
        resources = {name: objects for name, objects in self.resources.items() if objects}
        patches = {name: objects for name, objects in self.patches.items() if objects}
        version = "v1alpha1" if kind == "Component" else "v1beta1"
        kustomization: Object = {"apiVersion": f"{_KUSTOMIZE}/{version}", "kind": kind}
        if listed := [*self.bases, *resources]:
            kustomization["resources"] = listed
        if kind == "Kustomization":
            kustomization["labels"] = [{"pairs": PART_OF}]
        if self.components:
            kustomization["components"] = self.components
        if self.config_maps:
            kustomization["configMapGenerator"] = [_generator(each) for each in self.config_maps.values()]
        # Not several in one file: the kustomize of kubectl 1.32 and 1.33 panics then.
        inline = [{"patch": manifest.document(_deletion(each))} for each in self.deleted]
        if inline or patches:
            kustomization["patches"] = [*inline, *({"path": name} for name in patches)]
        found = {name: manifest.dump(objects) for name, objects in {**resources, **patches}.items()}
        found |= self.other | {name: text for each in self.config_maps.values() for name, text in each["data"].items()}
        return {f"{path}/{name}": text for name, text in {_FILE: manifest.dump([kustomization]), **found}.items()}


def _file_of(model: ModelPlan) -> str:
    return f"{model.name}.yaml"


def files(plan: DeploymentPlan) -> dict[str, str]:
    """Return all files of the deployment: relative path -> text. Raises `UsageError` if a cluster cannot run it."""
    for model in plan.models:
        check(model, plan.clusters)
    omitted = {each for model in plan.models for each in model.spec.deploy.omit}
    base = _base(plan, omitted).without(omitted)
    components = {name: each.without(omitted) for name, each in _components(plan, omitted).items()}
    overlays = {each.name: _overlay(plan, each, base, components).without(omitted) for each in plan.clusters}
    jobs = {name: each.without(omitted) for name, each in _benches(plan, omitted).items()}
    for overlay in overlays.values():
        _check_names([base, *components.values(), overlay])
    for folder in (base, *components.values(), *overlays.values(), *jobs.values()):
        _check_lengths(folder)
    found = base.files("base")
    for name, component in components.items():
        found |= component.files(f"components/{name}", "Component")
    for cluster in plan.clusters:
        found |= overlays[cluster.name].files(f"overlays/{cluster.name}")
        if cluster.name in jobs:
            found |= jobs[cluster.name].files(f"bench/{cluster.name}")
    return dict(sorted(found.items()))


def embed_files(plan: DeploymentPlan, run: embed.EmbedRun) -> dict[str, str]:
    """Return the files of `--embed`, as `files` does."""
    model, *others = plan.models
    found: dict[str, str] = {}
    if others or model.spec.models or not model.spec.image.embed:
        raise UsageError(
            "--embed needs one model, with an image that can run `inferctl embed`",
            "pass one spec with `image.embed: true` and an encoder model, and build its image again",
        )
    check(model, plan.clusters)
    omitted = set(model.spec.deploy.omit)
    for cluster in plan.clusters:
        able = (each for each in model.flavors if each.at(cluster).max_replicas.value)
        if flavor := next(able, None):
            most = int(flavor.at(cluster).max_replicas.value)
            objects = embed.objects(model, flavor.only_at(cluster), most, run, plan.namespace)
            folder = Folder({"namespace.yaml": _namespace(plan.namespace, omitted), _file_of(model): objects})
            _check_lengths(folder)
            found |= folder.without(omitted).files(f"{EMBED}/{cluster.name}")
    return found


def check(model: ModelPlan, clusters: Sequence[Cluster]) -> None:
    """Raise `UsageError` if the pods of `model` could not start: no image, a field that a version lacks."""
    spec = model.spec
    if model.name in _OTHER_FILES:
        raise UsageError(f"the name {model.name} is that of a file of the manifests", "set another `name` in the spec")
    access.check(spec)
    metering.check(spec)
    bench.check(spec)
    feature = versions.FEATURES["image-volume"]
    for cluster in clusters if any(each.volume for each in weights_folders(spec)) else ():
        if not feature.works(cluster.minor):
            raise UsageError(
                f"{spec.name}: a model image needs Kubernetes 1.{feature.since}; cluster {cluster.name} has "
                f"{cluster.kubernetes}",
                f"use {feature.instead}",
            )


def _check_names(folders: Sequence[Folder]) -> None:
    """Raise `UsageError` if two objects have one name, as of flavor `l4-overflow` next to `l4`."""
    known: set[tuple[str, str]] = set()
    for each in (one for folder in folders for objects in folder.resources.values() for one in objects):
        found = (each["kind"], each["metadata"]["name"])
        if found in known:
            raise UsageError(
                f"two objects would be the {found[0]} {found[1]}", "set another `name` of the flavor or of the spec"
            )
        known.add(found)


def _check_lengths(folder: Folder) -> None:
    """Raise `UsageError` if a name is longer than what is made of it may be."""
    for each in (one for objects in folder.resources.values() for one in objects):
        kind, name, labels = each["kind"], each["metadata"]["name"], each["metadata"].get("labels", {})
        # Names of pods of others may be cut: nobody looks for a placeholder by its name.
        limit = _LONGEST.get((kind, labels.get(COMPONENT))) or _LONGEST.get((kind, None))
        prefix = f"{labels.get(COMPONENT)}-" if kind == "Job" else ""
        name = name.removeprefix(prefix)
        if limit and len(name) > limit[0]:
            raise UsageError(
                f"the {kind} {prefix}{name}: {name} has {len(name)} characters, and may have {limit[0]}, "
                f"because {limit[1]}",
                "set a shorter `name` of the spec or of the flavor",
            )


def _base(plan: DeploymentPlan, omitted: Container[str]) -> Folder:
    namespace = plan.namespace
    found = Folder({"namespace.yaml": _namespace(namespace, omitted)})
    for model in plan.models:
        found.resources[_file_of(model)] = _model(model, namespace)
    return found


def _namespace(name: str, omitted: Container[str]) -> list[Object]:
    denied = policy.deny_all(name)
    own = (SERVER, metering.CONSUMER, BENCH, EMBED)
    components = own if f"{denied['kind']}/{denied['metadata']['name']}" in omitted else ()
    return [policy.namespace(name), denied, policy.allow_dns(name, components)]


def _model(model: ModelPlan, namespace: str) -> list[Object]:
    spec = model.spec
    egress = [*metering.egress(spec), *access.egress(spec, namespace), *broker.egress(spec, namespace)]
    if downloads(spec):
        egress.append(endpoints.Endpoint(443, None))
    return [
        policy.service_account(model.name, namespace),
        service.service(model.name, namespace),
        policy.disruption_budget(model.name, namespace, labels_of(model.name, SERVER)),
        policy.server_policy(model.name, namespace, egress),
        policy.client_policy(model.name, namespace, workload.port(model)),
        *(workload.deployment(model, flavor, namespace) for flavor in model.flavors),
    ]


def _components(plan: DeploymentPlan, omitted: Container[str]) -> dict[str, Folder]:
    """Return the components that the plan uses, by name."""
    namespace = plan.namespace
    found: dict[str, Folder] = {}
    if consumers := metering.consumers(plan.models, namespace):
        accounts = [policy.service_account(metering.CONSUMER, namespace)]
        found["metering"] = Folder({"usage-relay.yaml": [*accounts, *consumers]})
    if sources := _prometheus_namespaces(plan):
        found["monitoring"] = _monitoring(plan, sources, omitted)
    return found


def _monitoring(plan: DeploymentPlan, sources: Sequence[str], omitted: Container[str]) -> Folder:
    """Return monitors, alerts and dashboards. Without PrometheusRules, the alerts are plain files for Prometheus."""
    namespace = plan.namespace
    found = Folder({"network.yaml": [policy.scrape_policy(namespace, sources)]})
    for model in plan.models:
        rules = observe.rules(plan, model)
        found.resources[_file_of(model)] = [service.monitor(model.name, namespace), rules]
        found.config_maps[_file_of(model)] = observe.config_map(plan, model)
        if rules["kind"] in omitted:
            found.other[f"{model.name}-alerts.yaml"] = manifest.dump([rules["spec"]])
    return found


def _benches(plan: DeploymentPlan, omitted: Container[str]) -> dict[str, Folder]:
    """Return the Jobs by cluster. A receipt is of a kind of hardware, so one Job measures a flavor for all clusters."""
    found: dict[str, Folder] = {}
    for model in (each for each in plan.models if each.spec.deploy.bench):
        by_cluster: dict[str, list[FlavorPlan]] = {}
        for flavor in model.flavors:
            able = (each for each in plan.clusters if flavor.at(each).max_replicas.value)
            if cluster := next(able, None):
                by_cluster.setdefault(cluster.name, []).append(flavor.only_at(cluster))
        for name, flavors in by_cluster.items():
            folder = found.setdefault(name, Folder({"namespace.yaml": _namespace(plan.namespace, omitted)}))
            folder.resources[_file_of(model)] = bench.objects(model, flavors, plan.namespace)
    return found


def _prometheus_namespaces(plan: DeploymentPlan) -> list[str]:
    """Return the namespaces from which Prometheus reads metrics, in all clusters.

    A URL outside of the cluster does not say where its agent runs: then it is the namespace of the default.
    """
    default = endpoints.endpoint(scaling.DEFAULT_PROMETHEUS, plan.namespace).namespace
    urls = {cluster.prometheus for cluster in plan.clusters}
    found = {endpoints.endpoint(url, plan.namespace).namespace or default for url in urls if url}
    if not found and any(model.spec.deploy.scaling != "none" for model in plan.models):
        found = {default}
    return sorted(name for name in found if name)


def _generator(config_map: Object) -> Object:
    """Return what makes a ConfigMap of files. Its name has no hash: nothing has to start again when it changes."""
    names = {key: config_map["metadata"][key] for key in ("name", "namespace")}
    options = {"disableNameSuffixHash": True, "labels": config_map["metadata"]["labels"]}
    return {**names, "files": list(config_map["data"]), "options": options}


def _overlay(plan: DeploymentPlan, cluster: Cluster, base: Folder, components: Mapping[str, Folder]) -> Folder:
    namespace = plan.namespace
    absent = [model for model in plan.models if all(not each.at(cluster).max_replicas.value for each in model.flavors)]
    present = [model for model in plan.models if model not in absent]
    flavors = [(model, flavor) for model in present for flavor in model.flavors]
    deleted = [each for model in absent for folder in (base, *components.values()) for each in folder.objects_of(model)]
    patches = []
    for model, flavor in flavors:
        placed = flavor.at(cluster)
        deployment = workload.deployment(model, flavor, namespace)
        if placed.max_replicas.value == 0:
            deleted.append(deployment)
        elif found := workload.in_cluster(model, flavor, placed, namespace):
            patches.append(found)
    scalers = [each for model in present for each in scaling.scaled_objects(model, cluster, namespace)]
    spare = [each for model, flavor in flavors for each in _overflow(model, flavor, cluster, namespace)]
    if spare:
        spare.insert(0, policy.overflow_priority())
    return Folder(
        resources={"quota.yaml": _quota(plan, cluster), "scaling.yaml": scalers, "overflow.yaml": spare},
        patches={"flavors.yaml": patches},
        deleted=deleted,
        bases=["../../base"],
        components=[f"../../components/{name}" for name in components],
    )


def _overflow(model: ModelPlan, flavor: FlavorPlan, cluster: Cluster, namespace: str) -> list[Object]:
    """Return what keeps nodes for `flavor`, with the GPU resource and the node labels of the cluster."""
    deployment = manifest.plain(workload.deployment(model, flavor.only_at(cluster), namespace))
    return scaling.overflow(model, flavor, cluster, deployment)


def _deletion(item: Object) -> Object:
    """Return the patch that removes an object whose hardware the cluster cannot have."""
    names = {key: item["metadata"][key] for key in ("name", "namespace") if key in item["metadata"]}
    return {"apiVersion": item["apiVersion"], "kind": item["kind"], "metadata": names, "$patch": "delete"}


def _quota(plan: DeploymentPlan, cluster: Cluster) -> list[Object]:
    hard = cluster_limits.gpu_quota(plan.models, cluster)
    return [policy.quota(plan.namespace, hard)] if hard else []
