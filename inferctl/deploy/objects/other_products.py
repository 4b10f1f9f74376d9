"""Objects of other products that a deployment can use: Karpenter, the GPU Operator, Gateway API."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from inferctl.deploy import cluster_limits, manifest, sizing
from inferctl.deploy.clusters import Cluster
from inferctl.deploy.figure import Noted
from inferctl.deploy.objects import service, sharing
from inferctl.deploy.objects.metadata import SERVER, Object, labels_of, metadata
from inferctl.deploy.plan import DeploymentPlan, FlavorPlan, ModelPlan, Placement, object_name
from inferctl.facts.catalog import Hardware, hardware_profiles

# Names of objects that the platform team makes: the Gateway with its namespace, and the class of nodes of Karpenter.
GATEWAY = {"name": "inference-gateway", "namespace": "gateways"}
NODE_CLASS = "default"
_MIB = 1024 * 1024
# Cloud, or autoscaler of EKS Auto Mode -> group and kind of the class of nodes, and the domain of instance labels.
_NODE_CLASSES = {
    "aws": ("karpenter.k8s.aws", "EC2NodeClass", "karpenter.k8s.aws/instance-gpu-name"),
    "eks-auto": ("eks.amazonaws.com", "NodeClass", "eks.amazonaws.com/instance-gpu-name"),
    "azure": ("karpenter.azure.com", "AKSNodeClass", "karpenter.azure.com/sku-gpu-name"),
}
# Gateways stop a request after 15 s by default; a stream of generation has no limit of its own.
_TIMEOUT = {"embed": "60s", "rerank": "60s", "classify": "60s", "generate": "0s"}


def node_pools(plan: DeploymentPlan, cluster: Cluster) -> list[Object]:
    """Return the NodePools of a cluster with Karpenter or EKS Auto Mode, one for each kind of whole GPU.

    Karpenter does not know MIG slices or shared GPUs as resources, so their nodes are a node group of fixed size.
    """
    known = _NODE_CLASSES.get("eks-auto" if cluster.autoscaler == "eks-auto" else cluster.cloud)
    if cluster.autoscaler not in ("karpenter", "eks-auto") or known is None:
        return []
    found: dict[str, list[tuple[FlavorPlan, Placement]]] = {}
    for model in plan.models:
        for flavor in model.flavors:
            placed = flavor.at(cluster)
            if placed.resource and placed.max_replicas.value and flavor.sharing == "whole":
                found.setdefault(flavor.hardware.key, []).append((flavor, placed))
    return [_node_pool(key, placed, cluster, *known) for key, placed in found.items()]


def _node_pool(
    key: str, placed: list[tuple[FlavorPlan, Placement]], cluster: Cluster, group: str, kind: str, gpu_label: str
) -> Object:
    part = placed[0][0].hardware
    name = key.partition("-")[0]
    requirements: list[Object] = [
        {"key": "kubernetes.io/arch", "operator": "In", "values": ["amd64"]},
        {"key": "karpenter.sh/capacity-type", "operator": "In", "values": ["on-demand"]},
        {"key": gpu_label, "operator": "In", "values": [name.upper() if cluster.cloud == "azure" else name]},
    ]
    if cluster.cloud == "aws" and part.memory_bytes:
        # An A100 has 40 or 80 GB. The label is in MiB, and the catalog in bytes of the data sheet.
        memory = gpu_label.replace("gpu-name", "gpu-memory")
        bounds = {"Gt": 0.8, "Lt": 1.2}
        requirements += [
            {"key": memory, "operator": operator, "values": [str(int(part.memory_bytes * factor / _MIB))]}
            for operator, factor in bounds.items()
        ]
    if cluster.zones:
        zones = {"key": "topology.kubernetes.io/zone", "operator": "In", "values": list(cluster.zones)}
        requirements.append(zones)
    # Karpenter starts no node whose GPUs exceed the rest of the limit.
    each, instance = _gpus_of_a_node(part, cluster)
    limit, formula = cluster_limits.gpus(placed, cluster.max_replicas.get(key))
    note = f"{formula}: maximum, rollout and overflow"
    if limit % each:
        limit, note = math.ceil(limit / each) * each, f"{note}; whole nodes of {each} GPUs ({instance})"
    requirements += [{"key": key, "operator": "In", "values": [value]} for key, value in cluster.labels.items()]
    return {
        "apiVersion": "karpenter.sh/v1",
        "kind": "NodePool",
        "metadata": metadata(f"inferctl-{object_name(key)}", None, {}),
        "spec": {
            "template": {
                # The servers require this label, and Karpenter must know it before a node exists. GPU feature
                # discovery then sets the same value.
                "metadata": {"labels": {"nvidia.com/gpu.product": part.labels["nvidia.com/gpu.product"]}},
                "spec": {
                    "nodeClassRef": {"group": group, "kind": kind, "name": NODE_CLASS},
                    # So that nothing else takes the place of a server on a node with a GPU.
                    "taints": [{"key": "nvidia.com/gpu", "value": "true", "effect": "NoSchedule"}],
                    "requirements": requirements,
                    "expireAfter": "720h",
                },
            },
            "limits": {"nvidia.com/gpu": Noted(str(limit), note)},
            "disruption": {
                "consolidationPolicy": "WhenEmptyOrUnderutilized",
                "consolidateAfter": "5m",
                "budgets": [{"nodes": "1"}],
            },
        },
    }


def _gpus_of_a_node(part: Hardware, cluster: Cluster) -> tuple[int, str]:
    """Return the GPUs of the instance with the list price of the catalog (`p4d.24xlarge, 1 of 8`), and its name."""
    price = sizing.price_of(part, cluster.cloud)
    found = re.fullmatch(r"(\S+), 1 of (\d+)", price.instance) if price else None
    return (int(found[2]), found[1]) if found else (1, "")


def gpu_operator(flavors: Sequence[FlavorPlan], strategy: str) -> tuple[list[Object], Object]:
    """Return ConfigMaps of the GPU Operator's namespace, and the values of its Helm chart that use them.

    Values replace a ClusterPolicy of our own, because the chart makes the only one of a cluster. They are not for a
    cluster with GPUCluster (DRA), which must not have a ClusterPolicy.

    If the flavors share GPUs in one way, it is the default of all nodes. If not, a node selects its configuration with
    the label `nvidia.com/device-plugin.config`.
    """
    objects: list[Object] = []
    values: Object = {}
    gpus = [flavor for flavor in flavors if flavor.resource]
    slices = sorted({(f.hardware.mig.parent, f.hardware.mig.profile) for f in flavors if f.hardware.mig})
    if slices:
        values["mig"] = {"strategy": strategy}
        profiles = {profile for _, profile in slices}
        divisible = {part.mig.parent for part in hardware_profiles().values() if part.mig}
        # A default divides every GPU that can be divided, so none of these would be left whole.
        if len(profiles) == 1 and not any(flavor.hardware.key in divisible for flavor in gpus):
            values["migManager"] = {"config": {"default": f"all-{profiles.pop()}"}}
    if configs := sharing.device_plugin_configs(flavors):
        name = "inferctl-device-plugin"
        objects.append(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": metadata(name, "gpu-operator", {}),
                "data": {key: manifest.dump([config]) for key, config in configs.items()},
            }
        )
        values["devicePlugin"] = {"config": {"name": name}}
        # A default renames `nvidia.com/gpu` on all nodes without a label, so whole GPUs would be gone.
        others = [each for each in gpus if each.sharing not in ("time-slicing", "mps")]
        if len(configs) == 1 and all(each.hardware.mig and strategy == "mixed" for each in others):
            values["devicePlugin"]["config"]["default"] = next(iter(configs))
    return objects, values


def http_route(model: ModelPlan, namespace: str, *, pool: bool) -> Object:
    """Return the route from the Gateway to the servers of `model`: by Service, or through its pool."""
    backend: Object = {"name": model.name, "port": service.PORT}
    if pool:
        backend = {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": model.name}
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": metadata(model.name, namespace, labels_of(model.name, SERVER)),
        "spec": {
            "parentRefs": [dict(GATEWAY)],
            "hostnames": [f"{model.name}.inference.internal"],
            "rules": [
                {
                    # Servers trust this header from proxies, so a client must not send it.
                    "filters": [
                        {
                            "type": "RequestHeaderModifier",
                            "requestHeaderModifier": {"remove": ["x-inferctl-key-id"]},
                        }
                    ],
                    "backendRefs": [backend],
                    "timeouts": {"request": _TIMEOUT[model.task]},
                }
            ],
        },
    }
