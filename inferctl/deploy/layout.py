"""The files of a deployment, for kustomize: `base/`, one component for each capability, one overlay for each cluster.

    base/                  what is the same everywhere: servers, Services, budgets, network policies
    components/NAME/       a capability that an overlay includes: monitoring, gateway, metering
    first/CLUSTER.yaml     Deployments that start from zero, for `kubectl create` before the first apply
    overlays/CLUSTER/      one cluster: its replicas, GPU resource and node labels, quota, options
    bench/CLUSTER/         bench Jobs, which run before the rest is deployed: each flavor once, in its first cluster
    gpu-operator/CLUSTER/  values of the GPU Operator's Helm chart, for MIG slices and shared GPUs

`kubectl apply -k overlays/CLUSTER` installs all that belongs to one cluster.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

from inferctl.core.errors import UsageError
from inferctl.deploy import cluster_limits, endpoints, manifest
from inferctl.deploy.clusters import Cluster
from inferctl.deploy.figure import Noted
from inferctl.deploy.objects import (
    access,
    bench,
    broker,
    gateway,
    metering,
    other_products,
    policy,
    scaling,
    service,
    sharing,
    workload,
)
from inferctl.deploy.objects.metadata import BENCH, PART_OF, SERVER, Object, labels_of
from inferctl.deploy.observe import objects as observe
from inferctl.deploy.plan import DeploymentPlan, FlavorPlan, ModelPlan, Placement
from inferctl.manifests import versions
from inferctl.manifests.label_keys import COMPONENT
from inferctl.models import image_source

_KUSTOMIZE = "kustomize.config.k8s.io"
_FILE = "kustomization.yaml"
# All files are in these; those of earlier versions also in `monitoring`.
FOLDERS = ("base", "components", "first", "overlays", "bench", "gpu-operator", "monitoring")
# Files of a folder that are not of one model, so no model may have the name of one.
_OTHER_FILES = ("kustomization", "namespace", "network")

# `inferctl bench` accepts no longer name of a server. It is in the name of the receipt.
LONGEST_BENCH = 40
_LONGEST_LABEL = 63
# Kind and component (None: of any) of an object -> most characters of its name, and why.
_LONGEST: Mapping[tuple[str, str | None], tuple[int, str]] = {
    ("Deployment", SERVER): (46, "names of its pods have a hash of the template and one of the pod, in 63 characters"),
    ("Job", BENCH): (LONGEST_BENCH, "`inferctl bench` accepts no longer name (deploy.bench)"),
    ("NodePool", None): (_LONGEST_LABEL, "its nodes have the name as a label"),
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
        found |= _gpu_operator(plan, cluster)
        if first := _first(plan, cluster):
            found[f"first/{cluster.name}.yaml"] = manifest.dump(first)
    return dict(sorted(found.items()))


def check(model: ModelPlan, clusters: Sequence[Cluster]) -> None:
    """Raise `UsageError` if the pods of `model` could not start: no image, a field that a version lacks."""
    spec = model.spec
    if model.name in _OTHER_FILES:
        raise UsageError(f"the name {model.name} is that of a file of the manifests", "set another `name` in the spec")
    access.check(spec)
    metering.check(spec)
    bench.check(spec)
    needed = []
    if image_source.volume(spec):
        needed.append(("image-volume", "deploy.weights.image" if spec.deploy.weights.image else "a model image"))
    if any(flavor.sharing == "dra" for flavor in model.flavors):
        needed.append(("dra", "sharing: dra"))
    for cluster in clusters:
        for feature, setting in needed:
            if not versions.works(feature, cluster.kubernetes):
                known = versions.FEATURES[feature]
                raise UsageError(
                    f"{spec.name}: {setting} needs Kubernetes 1.{known.since}; cluster {cluster.name} has "
                    f"{cluster.kubernetes}",
                    f"use {known.instead}",
                )


def _check_names(folders: Sequence[Folder]) -> None:
    """Raise `UsageError` if two objects have one name: flavor `gateway` of `embed`, or flavor `x-l4` and model `x`."""
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
        # Names of pods of others may be cut: nobody looks for a placeholder or a gateway by its name.
        limit = _LONGEST.get((kind, labels.get(COMPONENT))) or _LONGEST.get((kind, None))
        prefix = f"{BENCH}-" if kind == "Job" else ""
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
    own = (SERVER, gateway.GATEWAY, metering.CONSUMER, BENCH)
    components = own if f"{denied['kind']}/{denied['metadata']['name']}" in omitted else ()
    return [policy.namespace(name), denied, policy.allow_dns(name, components)]


def _model(model: ModelPlan, namespace: str) -> list[Object]:
    spec = model.spec
    egress = [*metering.egress(spec), *access.egress(spec, namespace), *broker.egress(spec, namespace)]
    if spec.model.weights == "download":
        egress.append(endpoints.Endpoint(443, None))
    through = gateway.GATEWAY if spec.deploy.gateway == "envoy" else None
    direct = [] if through else [policy.client_policy(model.name, namespace, SERVER, workload.port(model))]
    claims = [sharing.claim_template(model, each, namespace) for each in model.flavors if each.sharing == "dra"]
    return [
        policy.service_account(model.name, namespace),
        service.service(model.name, namespace),
        policy.disruption_budget(model.name, namespace, labels_of(model.name, SERVER)),
        policy.server_policy(model.name, namespace, gateway=through, egress=egress),
        *direct,
        *claims,
        *(workload.deployment(model, flavor, namespace) for flavor in model.flavors),
    ]


def _components(plan: DeploymentPlan, omitted: Container[str]) -> dict[str, Folder]:
    """Return the components that the plan uses, by name."""
    namespace = plan.namespace
    found: dict[str, Folder] = {}
    gateways = [model for model in plan.models if model.spec.deploy.gateway == "envoy"]
    if gateways:
        found["gateway"] = Folder({_file_of(model): gateway.objects(model, namespace) for model in gateways})
    if consumers := metering.consumers(plan.models, namespace):
        accounts = [policy.service_account(metering.CONSUMER, namespace)]
        found["metering"] = Folder({"usage-relay.yaml": [*accounts, *consumers]})
    if sources := _prometheus_namespaces(plan):
        found["monitoring"] = _monitoring(plan, sources, omitted)
    return found


def _first(plan: DeploymentPlan, cluster: Cluster) -> list[Object]:
    """Return the Deployments whose autoscaler starts from zero, with 0 replicas and what `kubectl create` needs.

    The first apply would start one pod of each, and so a node: they have no `replicas`, and the default is 1. `kubectl
    create` stores no last-applied configuration, so the apply after it keeps the 0, and the ones after that what the
    autoscaler has set. In the overlay, `replicas: 0` would stop the pods at each apply.
    """
    found = []
    for model in plan.models:
        for flavor in model.flavors:
            placed = flavor.at(cluster)
            if placed.replicas is None and placed.min_replicas.value == 0:
                full = workload.deployment(model, flavor, plan.namespace)
                template = full["spec"]["template"]
                containers = [{key: each[key] for key in ("name", "image")} for each in template["spec"]["containers"]]
                labels = {"labels": template["metadata"]["labels"]}
                spec = {
                    "replicas": 0,
                    "selector": full["spec"]["selector"],
                    "template": {"metadata": labels, "spec": {"containers": containers}},
                }
                name = {key: full["metadata"][key] for key in ("name", "namespace")}
                found.append({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": name, "spec": spec})
    return found


def _gpu_operator(plan: DeploymentPlan, cluster: Cluster) -> dict[str, str]:
    """Return the settings of the GPU Operator in a cluster whose nodes it labels; none if the defaults do."""
    placed = [flavor for model in plan.models for flavor in model.flavors if flavor.at(cluster).max_replicas.value]
    if cluster.node_labels != "nvidia":
        return {}
    objects, values = other_products.gpu_operator(placed, cluster.mig_strategy)
    if not values:
        return {}
    folder = f"gpu-operator/{cluster.name}"
    found = Folder({"config.yaml": objects}).files(folder) if objects else {}
    return {**found, f"{folder}/values.yaml": manifest.dump([values])}


def _monitoring(plan: DeploymentPlan, sources: Sequence[str], omitted: Container[str]) -> Folder:
    """Return monitors, alerts and dashboards. Without PrometheusRules, the alerts are plain files for Prometheus."""
    namespace = plan.namespace
    policies = [policy.scrape_policy("allow-prometheus", namespace, {COMPONENT: SERVER}, "http", sources)]
    gateways = [model for model in plan.models if model.spec.deploy.gateway == "envoy"]
    if gateways:
        selector = {COMPONENT: gateway.GATEWAY}
        policies.append(
            policy.scrape_policy("allow-prometheus-gateway", namespace, selector, service.METRICS_PORT, sources)
        )
    found = Folder({"network.yaml": policies})
    for model in plan.models:
        rules = observe.rules(plan, model)
        found.resources[_file_of(model)] = [*_monitors(model, namespace), rules]
        found.config_maps[_file_of(model)] = observe.config_map(plan, model)
        if rules["kind"] in omitted:
            found.other[f"{model.name}-alerts.yaml"] = manifest.dump([rules["spec"]])
    return found


def _monitors(model: ModelPlan, namespace: str) -> list[Object]:
    monitors = [service.monitor(model.name, namespace)]
    if model.spec.deploy.gateway == "envoy":
        monitors.append(service.monitor(model.name, namespace, gateway.GATEWAY, service.METRICS_PORT))
    return monitors


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
    urls = {cluster.prometheus for cluster in plan.clusters} | {model.spec.deploy.prometheus for model in plan.models}
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
    scalers = [each for model in present for each in scaling.scaling(model, cluster, namespace)]
    spare = [each for model, flavor in flavors for each in _overflow(model, flavor, cluster, namespace)]
    if any(each["kind"] == "Deployment" for each in spare):
        spare.insert(0, policy.overflow_priority())
    pools = other_products.node_pools(plan, cluster)
    return Folder(
        resources={
            "quota.yaml": _quota(plan, cluster),
            "scaling.yaml": scalers,
            "overflow.yaml": spare,
            "nodepools.yaml": pools,
        },
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
    """Return the quota of GPUs: what all flavors may have, with a rollout and the overflow."""
    kinds: dict[tuple[str, str], list[tuple[FlavorPlan, Placement]]] = {}
    for model in plan.models:
        for flavor in model.flavors:
            placed = flavor.at(cluster)
            if placed.resource and placed.max_replicas.value and flavor.sharing != "dra":
                kinds.setdefault((placed.resource.name, flavor.hardware.key), []).append((flavor, placed))
    parts: dict[str, list[tuple[int, str]]] = {}
    for (name, key), flavors in kinds.items():
        parts.setdefault(name, []).append(cluster_limits.gpus(flavors, cluster.max_replicas.get(key)))
    hard: Mapping[str, Noted] = {
        name: Noted(
            str(sum(count for count, _ in found)),
            f"{' + '.join(formula for _, formula in found)}: maximum, rollout and overflow",
        )
        for name, found in parts.items()
    }
    return [policy.quota(plan.namespace, hard)] if hard else []
