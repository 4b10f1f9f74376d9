"""A Job for each flavor that measures one server on its hardware, from inside of the cluster.

The server and `inferctl bench` are two containers of one pod, so the Job measures exactly one replica, disturbs no
other, and needs no Deployment. It writes its receipts to the log, from which a command reads them:

    kubectl logs job/NAME --container bench | tail -n 1 | base64 -d | tar -xz
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from inferctl.config.settings import OPEN_ACCESS
from inferctl.config.spec import Spec
from inferctl.core.errors import UsageError
from inferctl.deploy import sizing
from inferctl.deploy.endpoints import Endpoint
from inferctl.deploy.objects import access, metering, workload
from inferctl.deploy.objects.containers import container_security, empty, pod_base, reserve_disk, resources
from inferctl.deploy.objects.metadata import BENCH, SERVER, Object, labels_of, metadata
from inferctl.deploy.objects.policy import bench_policy, service_account
from inferctl.deploy.plan import FlavorPlan, ModelPlan
from inferctl.models.weights_folders import downloads

_RESULTS = "/results"
_KEPT_S = 86_400
# A search takes about ten minutes, after the start of the node and the server.
_LONGEST_S = 7200
# With an assumed server, both fit 4 vCPUs.
_CORES = 1


def check(spec: Spec) -> None:
    """Raise `UsageError` if bench Jobs have no image."""
    if spec.deploy.bench and not spec.deploy.tools_image:
        raise UsageError(
            "deploy.bench requires an image with the load generator, and images of servers do not contain it",
            "set deploy.tools_image to an image with `inferctl[bench]`",
        )


def objects(model: ModelPlan, flavors: Sequence[FlavorPlan], namespace: str) -> list[Object]:
    """Return the Jobs of `flavors`, which are those of one cluster, and their network policy."""
    account = service_account(f"{model.name}-{BENCH}", namespace)
    policy = bench_policy(model.name, namespace, _egress(model))
    return [account, policy, *(_job(model, flavor, namespace) for flavor in flavors)]


def _job(model: ModelPlan, flavor: FlavorPlan, namespace: str) -> Object:
    gpus = flavor.resource.count if flavor.resource else 1
    flavor = replace(flavor, cpu=sizing.cores(flavor.rate, _CORES, gpus))
    labels = labels_of(model.name, BENCH, flavor.label)
    tmp, tmp_mount = empty("bench-tmp", "/tmp", "1Gi")
    results, results_mount = empty("results", _RESULTS, "2Gi")
    container = {
        "name": BENCH,
        "image": model.spec.deploy.tools_image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["/bin/sh", "-c", _script(model, flavor)],
        "resources": resources(str(_CORES), "2Gi"),
        "securityContext": container_security(),
        "volumeMounts": [tmp_mount, results_mount],
    }
    pod = workload.pod(model, flavor)
    server = _server(model, flavor)
    mounted = {mount["name"] for mount in server["volumeMounts"]}
    volumes = [volume for volume in pod["volumes"] if volume["name"] in mounted]
    affinity = {key: value for key, value in pod["affinity"].items() if key == "nodeAffinity"}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(f"{BENCH}-{flavor.name}", namespace, labels),
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": _LONGEST_S,
            "ttlSecondsAfterFinished": _KEPT_S,
            "template": {
                "metadata": {"labels": labels},
                "spec": reserve_disk(
                    {
                        "restartPolicy": "Never",
                        **pod_base(f"{model.name}-{BENCH}"),
                        # Otherwise, the bench cannot see the memory and the cores that the server uses.
                        "shareProcessNamespace": True,
                        **({"affinity": affinity} if affinity else {}),
                        **({"tolerations": pod["tolerations"]} if "tolerations" in pod else {}),
                        "initContainers": [server],
                        "containers": [container],
                        "volumes": [*volumes, tmp, results],
                    }
                ),
            },
        },
    }


def _egress(model: ModelPlan) -> list[Endpoint]:
    """Return what the server connects to: the hub, if it downloads its weights."""
    return [Endpoint(443, None)] if downloads(model.spec) else []


def _server(model: ModelPlan, flavor: FlavorPlan) -> Object:
    """Return the server as a sidecar: the bench starts when its startup probe succeeds, and it ends after the bench."""
    found = workload.container(model, flavor)
    open_access = {**OPEN_ACCESS, **({"INFERCTL_METERING_MODE": "off"} if metering.volumes(model.spec) else {})}
    env = [each for each in found["env"] if not each["name"].startswith(("INFERCTL_ACCESS_", "INFERCTL_METERING_"))]
    left_out = {volume["name"] for volume, _ in (*access.volumes(model.spec), *metering.volumes(model.spec))}
    return {
        "name": SERVER,
        "image": found["image"],
        "imagePullPolicy": found["imagePullPolicy"],
        "restartPolicy": "Always",
        "env": [*env, *({"name": name, "value": value} for name, value in sorted(open_access.items()))],
        "ports": found["ports"],
        "resources": found["resources"],
        "securityContext": found["securityContext"],
        "startupProbe": found["startupProbe"],
        "volumeMounts": [mount for mount in found["volumeMounts"] if mount["name"] not in left_out],
    }


def _script(model: ModelPlan, flavor: FlavorPlan) -> str:
    slo = model.spec.slo
    if "generate" in model.tasks and slo.ttft_ms and slo.itl_ms:
        load = f"--search --slo-ttft {slo.ttft_ms:g} --slo-itl {slo.itl_ms:g}"
    elif "generate" not in model.tasks and slo.p99_ms:
        load = f"--search --slo {slo.p99_ms:g}"
    else:
        load = "--users 16 --duration 60"  # without an SLO, only the throughput can be measured
    url = f"{flavor.name}=http://127.0.0.1:{workload.port(model)}"
    return (
        f"inferctl bench --url {url} {load} --output {_RESULTS} || exit 1\n"
        f"cd {_RESULTS}/*/receipts && tar -cz . | base64 -w 0\n"
    )
