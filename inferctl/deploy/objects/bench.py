"""A Job for each flavor that measures one server on its hardware, from inside of the cluster.

The server and `inferctl bench` are two containers of one pod, so the Job measures exactly one replica, disturbs no
other, and needs no Deployment. It writes its receipts to the log, from which a command reads them:

    kubectl logs job/NAME --container bench | tail -n 1 | base64 -d | tar -xz
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from inferctl.config.spec import Spec
from inferctl.core.errors import UsageError
from inferctl.deploy import sizing
from inferctl.deploy.objects import job, workload
from inferctl.deploy.objects.containers import container_security, empty, resources
from inferctl.deploy.objects.metadata import BENCH, Object
from inferctl.deploy.plan import FlavorPlan, ModelPlan

_RESULTS = "/results"
# A search takes about ten minutes, after the start of the node and the server.
_LONGEST_S = 7200
# With an assumed server, both fit 4 vCPUs.
_CORES = 1
# What a sidecar for one client does not need.
_OF_A_SERVICE = ("livenessProbe", "readinessProbe", "lifecycle")


def check(spec: Spec) -> None:
    """Raise `UsageError` if bench Jobs have no image."""
    if spec.deploy.bench and not spec.deploy.tools_image:
        raise UsageError(
            "deploy.bench requires an image with the load generator, and images of servers do not contain it",
            "set deploy.tools_image to an image with `inferctl[bench]`",
        )


def objects(model: ModelPlan, flavors: Sequence[FlavorPlan], namespace: str) -> list[Object]:
    """Return the Jobs of `flavors`, which are those of one cluster, and their network policy."""
    return [*job.shared(model, BENCH, namespace), *(_job(model, flavor, namespace) for flavor in flavors)]


def _job(model: ModelPlan, flavor: FlavorPlan, namespace: str) -> Object:
    gpus = flavor.resource.count if flavor.resource else 1
    flavor = replace(flavor, cpu=sizing.cores(flavor.rate, _CORES, gpus))
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
    server = {key: value for key, value in job.container(model, flavor).items() if key not in _OF_A_SERVICE}
    pod = {
        # Otherwise, the bench cannot see the memory and the cores that the server uses.
        "shareProcessNamespace": True,
        # A sidecar: the bench starts when its startup probe succeeds, and it ends after the bench.
        "initContainers": [{**server, "restartPolicy": "Always"}],
        "containers": [container],
    }
    settings = {"backoffLimit": 0, "activeDeadlineSeconds": _LONGEST_S}
    return job.job(model, flavor, BENCH, namespace, settings, pod, [tmp, results])


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
