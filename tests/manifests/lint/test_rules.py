"""Each rule of the lint finds its seeded faults, and nothing else does; no rule finds anything in good manifests."""

from __future__ import annotations

import copy
import random
import time
from typing import Any

import pytest
import yaml

from inferctl.manifests import lint, manifests_file
from inferctl.manifests.lint import observability
from inferctl.manifests.lint.manifests import Manifests, ManifestWorkload
from inferctl.manifests.manifests_file import Located
from inferctl.manifests.versions import FEATURES, OLDEST_SUPPORTED
from tests.manifests import kube
from tests.manifests.lint import seeded

FAULTS = seeded.faults()


def rules(objects: list[dict[str, Any]], minor: int = OLDEST_SUPPORTED) -> set[str]:
    return {finding.rule for finding in lint.lint(seeded.located(objects), minor)}


def changed(name: str, path: tuple[str | int, ...], value: Any) -> list[dict[str, Any]]:
    """Return good.yaml with one value changed."""
    objects = seeded.good()
    (found,) = (each for each in objects if f"{each['kind']}/{each['metadata']['name']}" == name)
    parent: Any = found
    for part in path[:-1]:
        parent = parent[part]
    parent[path[-1]] = value
    return objects


POD = ("spec", "template", "spec")
SERVER = (*POD, "containers", 0)


def test_there_are_no_findings_in_good_manifests() -> None:
    assert lint.lint(manifests_file.read([seeded.GOOD])) == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_rule_finds_its_fault(fault: seeded.Fault) -> None:
    assert rules(fault.objects, fault.minor) == {fault.rule, *fault.also}


def test_each_rule_has_a_fault() -> None:
    assert {fault.rule for fault in FAULTS} == set(lint.RULES)
    written = [each for module in lint.MODULES for each in vars(module).values() if isinstance(each, lint.Rule)]
    assert len(written) == len(lint.RULES), "two rules have one id"
    assert {rule.lesson for rule in written} <= set(lint.LESSONS)


def test_a_node_pool_has_room_for_replicas_and_a_rollout() -> None:
    # The pool has 10 slices, and the highest number of replicas is 8.
    surge = ("spec", "strategy", "rollingUpdate", "maxSurge")
    assert "pool-limit-low" not in rules(changed("Deployment/embed", surge, 2))
    assert "pool-limit-low" in rules(changed("Deployment/embed", surge, 3))


@pytest.mark.parametrize(("name", "value"), [("cpu", "3900m"), ("memory", "8000Mi")])
def test_a_placeholder_is_as_large_as_a_server(name: str, value: str) -> None:
    objects = changed("Deployment/embed-overflow", (*SERVER, "resources", "requests", name), value)
    assert rules(objects) >= {"placeholder-differs"}
    larger = changed("Deployment/embed-overflow", (*SERVER, "resources", "requests", "cpu"), "5")
    assert rules(larger) == set()


def test_namespaces_are_apart_and_large_files_take_seconds() -> None:
    """The same manifests in 40 namespaces: nothing of one is counted for another, and 700 objects take 0.4 s."""
    objects = [each for each in seeded.good() if "namespace" not in each["metadata"]]
    for number in range(40):
        for each in seeded.good():
            if "namespace" in each["metadata"]:
                each["metadata"]["namespace"] = f"team-{number}"
                objects.append(each)
    # The pools are of the whole cluster.
    (pool,) = (each for each in objects if each["kind"] == "NodePool")
    pool["spec"]["limits"] = dict.fromkeys(pool["spec"]["limits"], 1000)
    start = time.process_time()
    assert rules(objects) == set()
    assert time.process_time() - start < 5


def test_a_finding_says_where_why_and_what_to_do() -> None:
    text = seeded.GOOD.read_text(encoding="utf-8").replace("value: -10\n", "value: -1000\n")
    (finding,) = lint.lint(manifests_file.parse(text, "overflow.yaml"))
    assert text.splitlines()[(finding.line or 0) - 1] == "value: -1000"
    assert (finding.file, finding.object, finding.field) == ("overflow.yaml", "PriorityClass/overflow", "value")
    assert finding.level == "error" and finding.rule == "placeholder-priority"
    assert "-1000" in finding.what and "expendable-pods-priority-cutoff" in finding.consequence
    assert finding.lesson == lint.LESSONS["overflow"] and "-10 to -1" in finding.fix


@pytest.mark.parametrize("name", seeded.silent())
def test_what_only_looks_like_a_fault_is_not_found(name: str) -> None:
    assert rules(seeded.silent()[name]) == set()


def test_a_toleration_of_another_taint_is_none_of_gpu_nodes() -> None:
    objects = changed("Deployment/chat", (*POD, "tolerations"), [{"key": "team", "operator": "Exists"}])
    assert rules(objects) == {"gpu-toleration-missing"}


def test_a_recorded_series_is_a_known_metric() -> None:
    query = ("spec", "triggers", 0, "metadata", "query")
    objects = changed("ScaledObject/embed", query, "max(inferctl_needed_replicas)")
    assert rules(objects) == {"unknown-metric"}
    record = {"record": "inferctl_needed_replicas", "expr": "sum(inferctl_queue_tokens)"}
    objects.append(
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": {"name": "recorded", "namespace": "inference"},
            "spec": {"groups": [{"name": "recorded", "rules": [record]}]},
        }
    )
    assert rules(objects) == set()


def test_a_client_with_the_address_of_a_server_is_none() -> None:
    def serves(*args: str) -> bool:
        pod = {"kind": "Pod", "spec": {"containers": [{"image": "python:3.13", "args": list(args)}]}}
        return ManifestWorkload(Located(pod), ()).is_model_server

    assert serves("-m", "vllm.entrypoints.openai.api_server")
    assert not serves("chat.py", "http://vllm:8000/v1")
    assert not serves("chat.py", "--base-url", "http://vllm:8000/v1")


PINNED = f"registry.example.com/models/qwen@sha256:{'ab' * 32}"


@pytest.mark.parametrize(
    ("image", "found"),
    [
        ({"reference": PINNED}, set()),
        ({"reference": PINNED, "pullPolicy": "IfNotPresent"}, set()),
        ({"reference": "example.com/qwen:1", "pullPolicy": "Always"}, {"image-unpinned"}),
        # The reference is optional: a controller may set it.
        ({}, set()),
        ({"reference": "", "pullPolicy": None}, set()),
        (None, set()),
        ("qwen", set()),
    ],
)
def test_an_image_volume_has_a_digest(image: Any, found: set[str]) -> None:
    assert rules(changed("Deployment/chat", (*POD, "volumes", 2), {"name": "weights", "image": image})) == found


def server(**changes: Any) -> list[dict[str, Any]]:
    """Return a Deployment of vLLM on port 8000 with a Service, with changes of its container."""
    container = {
        "name": "vllm",
        "image": "vllm/vllm-openai:v0.12.0",
        "args": ["--model", "Qwen/Qwen2.5-7B-Instruct", "--port", "8000"],
        "ports": [{"name": "http", "containerPort": 8000}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": 8000}},
        **changes,
    }
    sidecar = {"name": "proxy", "image": "proxy:1", "ports": [{"containerPort": 9100}]}
    labels = {"app": "vllm"}
    pod = {"containers": [container, sidecar], "automountServiceAccountToken": False}
    ports = [{"port": 80, "targetPort": 8000}]
    service = kube.thing("Service", "llm", {"selector": labels, "ports": ports})
    return [kube.deployment("llm", labels, pod, 1), service]


@pytest.mark.parametrize(
    ("changes", "places"),
    [
        ({}, []),
        ({"readinessProbe": {"httpGet": {"port": 8080}}}, ["readinessProbe.httpGet.port"]),
        ({"livenessProbe": {"tcpSocket": {"port": "http"}}, "startupProbe": {"grpc": {"port": 1}}}, ["startupProbe.grpc.port"]),
        # Another container of the pod, and a second port of the server.
        ({"readinessProbe": {"httpGet": {"port": 9100}}}, []),
        ({"args": ["--port=8000", "--metrics-port", "9001"], "readinessProbe": {"httpGet": {"port": 9001}}}, []),
        ({"args": ["serve", "--port", "$(PORT)"], "env": [{"name": "PORT", "value": "8000"}]}, []),
        # The name of a port is that of a number on which nothing listens.
        ({"ports": [{"name": "http", "containerPort": 8080}]}, ["ports.0"]),
        ({"args": ["--port", "8001"]}, ["ports.0", "readinessProbe.httpGet.port"]),
        # Without --port, nothing is known about the server: only the Service is compared, with the ports in the pod.
        ({"args": ["serve"], "readinessProbe": {"httpGet": {"port": 8080}}}, []),
        ({"args": ["serve"], "ports": [{"containerPort": 8080}]}, ["Service"]),
        ({"args": ["serve"], "ports": []}, ["Service"]),
        ({"args": ["bash", "-c", "ray start --head --port=6379; vllm serve --port 8000"]}, []),
    ],
)  # fmt: skip
def test_ports_are_those_on_which_the_server_listens(changes: dict[str, Any], places: list[str]) -> None:
    objects = server(**changes)
    found = [each for each in lint.lint(seeded.located(objects)) if each.rule == "port-mismatch"]
    prefix = "spec.template.spec.containers.0."
    assert [each.field.removeprefix(prefix) if "Depl" in each.object else "Service" for each in found] == places
    assert all(each.level == ("warning" if "Service" in places else "error") for each in found)
    if not places:  # the twin with another Service
        objects[1]["spec"]["ports"] = [{"port": 9000}]
        assert "port-mismatch" in rules(objects)


@pytest.mark.parametrize(
    ("image", "found"),
    [
        *(("vllm/vllm-openai:latest", True), ("vllm/vllm-openai", True), ("localhost:5000/vllm", True)),
        ("ghcr.io/huggingface/text-embeddings-inference:89-latest", True),
        *(("ghcr.io/ggml-org/llama.cpp:server-cuda", True), ("lmsysorg/sglang:nightly-20260101", True)),
        *(("vllm/vllm-openai:v0.12.0", False), (f"vllm@sha256:{'ab' * 32}", False)),
        *(("ghcr.io/ggml-org/llama.cpp:server-cuda-b7000", False), ("localhost:5000/vllm:v1", False)),
    ],
)  # fmt: skip
def test_the_image_of_a_server_is_that_of_a_release(image: str, found: bool) -> None:
    assert ("image-unpinned" in rules(server(image=image))) == found


@pytest.mark.parametrize(
    ("changes", "gpus", "found"),
    [
        ({}, 2, False),  # a model on one of them
        ({"args": ["--tensor-parallel-size", "2"]}, 2, True),
        ({"args": ["--tp=2"], "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm/"}]}, 2, False),
        # Over two pods, each with one GPU: no processes of a pod exchange tensors.
        ({"args": ["--pipeline-parallel-size", "2"]}, 1, False),
    ],
)
def test_processes_of_several_gpus_have_shared_memory(changes: dict[str, Any], gpus: int, found: bool) -> None:
    objects = server(resources={"limits": {"nvidia.com/gpu": gpus}}, **changes)
    assert ("shared-memory-missing" in rules(objects)) == found
    objects[0]["spec"]["template"]["spec"]["hostIPC"] = True
    assert "shared-memory-missing" not in rules(objects)


def test_a_field_works_in_the_next_version() -> None:
    faults = [fault for fault in FAULTS if fault.rule == "field-needs-version"]
    assert len(faults) == len(FEATURES)
    for fault in faults:
        assert fault.rule not in rules(fault.objects, fault.minor + 1)


def test_anti_affinity_without_a_selector_keeps_no_pods_apart() -> None:
    term = "requiredDuringSchedulingIgnoredDuringExecution"
    found = {"hostname-anti-affinity"}
    for selector, expected in (
        (None, set()),
        ({}, found),
        ({"matchLabels": {"app.kubernetes.io/name": "embed"}}, found),
    ):
        terms = [{"topologyKey": "kubernetes.io/hostname", "labelSelector": selector}]
        objects = changed("Deployment/embed", (*POD, "affinity", "podAntiAffinity"), {term: terms})
        assert rules(objects) == expected


def test_surge_and_replicas_are_those_of_kubernetes() -> None:
    def surge(strategy: Any, replicas: int) -> int:
        data = {"kind": "Deployment", "spec": {"replicas": replicas, "strategy": strategy}}
        manifests = Manifests([Located(data)])
        return manifests.surge(manifests.workloads[0])

    assert surge(None, 4) == 1
    assert surge({"rollingUpdate": {"maxSurge": "50%"}}, 5) == 3  # rounded up
    assert surge({"rollingUpdate": {"maxSurge": 2}}, 5) == 2
    assert surge({"type": "Recreate"}, 5) == 0


def test_no_rule_fails_on_broken_manifests() -> None:
    """Replace random parts of good and of faulty manifests by values of other types."""
    chosen = random.Random(1)
    starts = [seeded.good(), *(fault.objects for fault in FAULTS)]
    for number in range(120):
        objects = copy.deepcopy(chosen.choice(starts))
        for _ in range(chosen.randint(1, 4)):
            _spoil(objects[chosen.randrange(len(objects))], chosen)
        for finding in lint.lint(seeded.located(objects), 32 + number % 6):
            assert finding.rule in lint.RULES


def _spoil(value: Any, chosen: random.Random) -> None:
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = chosen.choice(keys)
        if not isinstance(value[key], (dict, list)) or not value[key] or chosen.random() < 0.2:
            value[key] = copy.deepcopy(chosen.choice([*kube.JUNK, "\x1b[2J", b"bytes", {"image", "a"}]))
            return
        value = value[key]


def _pool(name: str, *, ignore: str | None, namespace: str | None = None, **changes: Any) -> dict[str, Any]:
    """Return a Deployment with a volume without a limit, which an annotation may exempt."""
    metadata: dict[str, Any] = {"name": name} | ({"namespace": namespace} if namespace else {})
    if ignore:
        metadata["annotations"] = {"inferctl.io/lint-ignore": ignore}
    pod = {"containers": [{"name": "server", "image": "vllm/vllm-openai:v1"}], "volumes": [{"name": "tmp"}]}
    return kube.deployment(name, {"app": name}, pod) | {"metadata": metadata} | changes


RULE = "empty-dir-unbounded"


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (_pool("a", ignore=None, namespace="two"), 1),
        (_pool("a", ignore=None), 1),  # in the namespace of kubectl
        (_pool("a", ignore=None, namespace="one", kind="StatefulSet"), 1),
        (_pool("a", ignore=None, namespace="one", apiVersion="argoproj.io/v1alpha1", kind="Rollout"), 1),
        (_pool("a", ignore="one-zone", namespace="two"), 1),
        (_pool("a", ignore=f"one-zone, {RULE}", namespace="two"), 0),
        (_pool("b", ignore=None, namespace="one"), 1),
        ({**_pool("x", ignore=None), "metadata": {"generateName": "a"}}, 1),
        ({**_pool("a", ignore=None, namespace="one"), "metadata": {"name": "a", "namespace": "one"}}, 1),  # twice
    ],
)
@pytest.mark.parametrize("as_list", [False, True])
def test_an_exception_is_of_one_object(other: dict[str, Any], found: int, as_list: bool) -> None:
    ignored = _pool("a", ignore=RULE, namespace="one")
    for objects in ([ignored, other], [other, ignored]):
        documents = [{"apiVersion": "v1", "kind": "List", "items": objects}] if as_list else objects
        text = yaml.safe_dump_all(documents)
        findings = [each for each in lint.lint(manifests_file.parse(text, "all.yaml")) if each.rule == RULE]
        assert len(findings) == found
        # What kustomize builds has no lines.
        built = [Located(each, "kustomization.yaml") for each in objects]
        assert len([each for each in lint.lint(built) if each.rule == RULE]) == found


def test_findings_of_namesakes_are_told_apart() -> None:
    built = [Located(_pool("a", ignore=None, namespace=name), "kustomization.yaml") for name in ("one", "two")]
    found = [each for each in lint.lint(built) if each.rule == RULE]
    assert [each.namespace for each in found] == ["one", "two"]


def test_metrics_that_no_server_has_are_named() -> None:
    expression = 'sum(inferctl_b{job="inferctl_x"}) / on (inferctl_y) inferctl_a + other + inferctl_tokens_total'
    assert observability.unknown_metrics(expression) == ["inferctl_a", "inferctl_b"]
