"""Files of a cluster and manifests with any field of another type: an answer or an error with a hint, no traceback."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferctl.cli import deploy_preview
from inferctl.core.errors import InferctlError
from tests.manifests import kube
from tests.manifests.kube import thing

JUNK: list[Any] = [
    None, True, -1, 3.5, "", "text", "[/]", [], {}, [[]], [None], {"a": None}, [{}], {"name": []}, "9" * 400, 2**64,
    math.inf, math.nan, "500m", "-1Gi",
]  # fmt: skip
ZONE, HOST = "topology.kubernetes.io/zone", "kubernetes.io/hostname"
SELECTOR = {"matchLabels": {"app": "embed"}, "matchExpressions": [{"key": "app", "operator": "Exists"}]}
TERM = {"topologyKey": HOST, "labelSelector": SELECTOR, "namespaces": ["other"], "namespaceSelector": {}}


def pod_spec(image: str) -> dict[str, Any]:
    return {
        "priorityClassName": "low" if image == "pause" else "high",
        "runtimeClassName": "nvidia",
        "nodeSelector": {"gpu": "l4"},
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule", "tolerationSeconds": 5}],
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [
                        {
                            "matchExpressions": [{"key": "rank", "operator": "Gt", "values": ["1"]}],
                            "matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["z"]}],
                        }
                    ]
                }
            },
            "podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [TERM]},
        },
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": ZONE, "labelSelector": SELECTOR, "minDomains": 2, "matchLabelKeys": ["app"]}
        ],
        "initContainers": [{"name": "side", "restartPolicy": "Always", "resources": {"requests": {"cpu": "100m"}}}],
        "containers": [
            {
                "name": "main",
                "image": image,
                "ports": [{"hostPort": 8080, "protocol": "TCP", "hostIP": "10.0.0.1"}],
                "resources": {"requests": {"cpu": "1"}, "limits": {"cpu": "2", "nvidia.com/gpu": 1}},
            }
        ],
        "volumes": [{"name": "weights", "persistentVolumeClaim": {"claimName": "weights"}}],
    }


def cluster() -> list[dict[str, Any]]:
    """Return what kubectl says about a cluster with one object of each kind that the preview reads."""
    allocatable = {"cpu": "8", "memory": "32Gi", "pods": "110", "nvidia.com/gpu": "1"}
    nodes = [
        thing(
            "Node",
            f"n{n}",
            {"taints": [{"key": "gpu", "effect": "NoSchedule"}]},
            labels={HOST: f"n{n}", ZONE: "ab"[n % 2], "gpu": "l4", "rank": "2"},
            status={"allocatable": allocatable},
        )
        for n in range(4)
    ]
    status = {"startTime": "2026-11-01T00:00:00Z", "namespace": "default"}
    pods = [kube.running(f"p{n}", f"n{n}", {"app": "overflow"}, pod_spec("pause"), **status) for n in range(3)]
    claim: dict[str, Any] = {"storageClassName": "s", "accessModes": ["ReadWriteOnce"]}
    budget = {"minAvailable": "50%", "selector": {"matchLabels": {"app": "overflow"}}}
    quota = {"hard": {"requests.nvidia.com/gpu": "9"}, "scopeSelector": {"matchExpressions": []}}
    used = {"used": {"requests.nvidia.com/gpu": "3"}}
    return [
        *nodes,
        *pods,
        thing("PriorityClass", "low", value=-10, globalDefault=True),
        thing("PriorityClass", "high", value=10, preemptionPolicy="PreemptLowerPriority"),
        thing("RuntimeClass", "nvidia", overhead={"podFixed": {"cpu": "10m"}}),
        thing("PodDisruptionBudget", "b", budget, status={"disruptionsAllowed": 1, "disruptedPods": {}}),
        thing("ResourceQuota", "q", quota, status=used),
        thing("Namespace", "default", labels={"team": "a"}),
        thing("PersistentVolumeClaim", "weights", {**claim, "resources": {"requests": {"storage": 1}}}),
        thing("PersistentVolume", "pv", {**claim, "capacity": {"storage": "2"}}, labels={ZONE: "a"}),
    ]


def manifests() -> list[dict[str, Any]]:
    def deployment(name: str, image: str) -> dict[str, Any]:
        annotations = {"inferctl.io/tokens-per-second": "100", "inferctl.io/load-seconds": "45"}
        return kube.deployment(name, {"app": name}, pod_spec(image), 2, annotations=annotations)

    scaled = {"scaleTargetRef": {"name": "embed"}, "minReplicaCount": 1, "maxReplicaCount": 3}
    annotations = {"inferctl.io/peak-tokens-per-second": "250"}
    scaler = thing("ScaledObject", "embed", scaled, annotations=annotations)
    return [deployment("embed", "server"), deployment("overflow", "pause"), scaler]


def preview(folder: Path, nodes: list[dict[str, Any]], objects: list[dict[str, Any]], as_json: bool) -> None:
    files = (folder / "nodes.yaml", folder / "manifests.yaml")
    for file, documents in zip(files, (nodes, objects), strict=True):
        file.write_text(yaml.dump_all(documents, Dumper=yaml.CSafeDumper))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(InferctlError):
        deploy_preview.preview([files[0]], [files[1]], as_json=as_json)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in `value`."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(each for key, child in children for each in places(child, (*path, key)))]


@pytest.mark.parametrize("seed", range(3))
def test_no_field_of_another_type_makes_a_traceback(tmp_path: Path, seed: int) -> None:
    chosen = random.Random(seed)
    preview(tmp_path, cluster(), manifests(), as_json=False)
    for number in range(40):
        files = [cluster(), manifests()]
        for objects in files:
            path = chosen.choice([each for each in places(objects) if len(each) > 1])
            parent: Any = objects
            for part in path[:-1]:
                parent = parent[part]
            if chosen.random() < 0.2 and isinstance(parent, dict):
                del parent[path[-1]]
            else:
                parent[path[-1]] = copy.deepcopy(chosen.choice(JUNK))
        preview(tmp_path, files[0], files[1], as_json=number % 2 == 0)
