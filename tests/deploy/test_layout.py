"""The files of `inferctl deploy`: valid for each version of Kubernetes, built by kustomize, and what they contain."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest

from inferctl.config.deploy_spec import Omitted
from inferctl.config.spec import Adapter, Model, Spec
from inferctl.core.errors import UsageError
from inferctl.deploy import layout
from inferctl.manifests.kubernetes import selectors
from inferctl.manifests.kubernetes.fields import quantity
from inferctl.manifests.kubernetes.resources import of_pod
from tests.deploy import plans
from tests.deploy.conftest import KUBECTL, Objects
from tests.deploy.validation import VERSIONS, lint_findings, problems
from tests.processes import execute

Build = Callable[[dict[str, str], str], Objects]
OVERLAYS = [f"overlays/{cluster['name']}" for cluster in plans.CLUSTERS]


def named(objects: Objects, kind: str, name: str) -> dict[str, Any]:
    (found,) = (each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name)
    return found


def pod_of(objects: Objects, name: str = "embed-l4") -> dict[str, Any]:
    found: dict[str, Any] = named(objects, "Deployment", name)["spec"]["template"]["spec"]
    return found


def egress(objects: Objects, name: str = "embed-server") -> list[tuple[str | None, int]]:
    """Return the namespace (None: any) and the port of each rule."""
    rules = named(objects, "NetworkPolicy", name)["spec"].get("egress", [])
    label = "kubernetes.io/metadata.name"
    return [
        (rule["to"][0]["namespaceSelector"]["matchLabels"][label] if "to" in rule else None, rule["ports"][0]["port"])
        for rule in rules
    ]


def pods(objects: Objects) -> Iterator[tuple[str, dict[str, Any]]]:
    for each in objects:
        if each["kind"] in ("Deployment", "Job", "StatefulSet"):
            yield each["metadata"]["name"], each["spec"]["template"]["spec"]


def test_kubectl_is_the_version_that_the_documentation_names() -> None:
    done = execute(KUBECTL, "version", "--client", code=0)
    assert "Client Version: v1.37" in done.stdout


def test_no_file_has_several_deletions() -> None:
    """kubectl 1.32 and 1.33 cannot build such a file."""
    patches = {name for name, text in plans.files().items() if "$patch: delete" in text}
    assert {name.rpartition("/")[2] for name in patches} == {"kustomization.yaml"}  # each is a patch of its own


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid_in_every_version_and_the_lint_finds_nothing(version: str, build: Build) -> None:
    files = layout.files(plans.plan(kubernetes=version))
    folders = sorted({name.rpartition("/")[0] for name in files if name.startswith(("overlays/", "bench/"))})
    assert len(folders) == 4
    built = {}
    for folder in folders:
        found = build(files, folder)
        assert lint_findings(found, version) == []
        built |= {json.dumps(each, sort_keys=True): each for each in found}
    assert len(built) > 50
    assert [problem for each in built.values() for problem in problems(each, version)] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_overlay_is_complete_and_has_each_object_once(overlay: str, build: Build) -> None:
    built = build(plans.files(), overlay)
    names = [(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in built]
    assert len(names) == len(set(names))
    kinds = {each["kind"] for each in built}
    assert kinds >= {
        *("Namespace", "ResourceQuota", "ServiceAccount", "NetworkPolicy", "Service", "Deployment"),
        *("PodDisruptionBudget", "ServiceMonitor", "ScaledObject", "ConfigMap"),
    }
    for each in built:
        if each["kind"] not in ("Namespace", "PriorityClass"):
            assert each["metadata"]["namespace"] == "inference"
    # The second cluster has max_replicas: {t4: 0}.
    assert ("embed-t4" in {name for _, _, name in names}) == (overlay != OVERLAYS[1])
    assert named(built, "Service", "embed")["spec"]["trafficDistribution"] == "PreferClose"


@pytest.mark.parametrize("omitted", get_args(Omitted))
def test_what_others_make_is_left_out_and_the_rest_stays(omitted: str, build: Build) -> None:
    """One spec says it for all: the namespace is theirs together."""
    everything = layout.files(plans.plan(plans.embed(), plans.generate(), kubernetes="1.34"))
    without = layout.files(plans.plan(plans.embed(omit=[omitted]), plans.generate(), kubernetes="1.34"))
    gone, changed = set(), set()
    for folder in (*OVERLAYS, "bench/aws-us-east-1"):
        before, after = (
            {f"{each['kind']}/{each['metadata']['name']}": each for each in build(files, folder)}
            for files in (everything, without)
        )
        assert after.keys() <= before.keys()
        gone |= before.keys() - after.keys()
        changed |= {name for name in after if after[name] != before[name]}
        # Only the default policy is about pods of others in the namespace.
        assert not changed or (changed == {"NetworkPolicy/allow-dns"} and omitted == "NetworkPolicy/default-deny")
        policies = [each for name, each in after.items() if name.startswith("NetworkPolicy/")]
        assert any(each["spec"]["podSelector"] == {} for each in policies) == (not omitted.startswith("NetworkPolicy"))
    assert gone and all(f"{name}/".startswith(f"{omitted}/") for name in gone)


def test_without_the_default_policy_all_own_pods_resolve_names(build: Build) -> None:
    files = layout.files(plans.plan(plans.embed(omit=["NetworkPolicy/default-deny"]), kubernetes="1.34"))
    for folder in (*OVERLAYS, "bench/aws-us-east-1"):
        built = build(files, folder)
        selector = named(built, "NetworkPolicy", "allow-dns")["spec"]["podSelector"]
        for each in built:
            if each["kind"] in ("Deployment", "Job") and not each["metadata"]["name"].endswith("-overflow"):
                labels = each["spec"]["template"]["metadata"]["labels"]
                assert selectors.matches(selector, labels), each["metadata"]["name"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_selectors_find_their_pods(overlay: str, build: Build) -> None:
    built = build(plans.files(), overlay)
    templates = [each["spec"]["template"]["metadata"]["labels"] for each in built if each["kind"] == "Deployment"]
    ports = {port["name"] for _, pod in pods(built) for each in pod["containers"] for port in each.get("ports", ())}
    for each in built:
        selector = {
            "Service": lambda spec: spec["selector"],
            "PodDisruptionBudget": lambda spec: spec["selector"]["matchLabels"],
            "NetworkPolicy": lambda spec: spec["podSelector"].get("matchLabels", {}),
            "Deployment": lambda spec: spec["selector"]["matchLabels"],
        }.get(each["kind"])
        if selector:
            wanted = selector(each["spec"]).items()
            clients = wanted == {"inferctl.io/client": "true"}.items()  # pods of others
            assert clients or any(wanted <= labels.items() for labels in templates), each["metadata"]["name"]
        if each["kind"] == "Service":
            assert {port["targetPort"] for port in each["spec"]["ports"]} <= ports
    services = [each for each in built if each["kind"] == "Service"]
    for each in built:
        if each["kind"] == "ServiceMonitor":
            wanted = each["spec"]["selector"]["matchLabels"].items()
            (service,) = (found for found in services if wanted <= found["metadata"]["labels"].items())
            names = {port["name"] for port in service["spec"]["ports"]}
            assert {endpoint["port"] for endpoint in each["spec"]["endpoints"]} <= names


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_restricted(overlay: str, build: Build) -> None:
    files = plans.files()
    built = [*build(files, overlay), *build(files, "bench/aws-us-east-1")]
    found = list(pods(built))
    assert len(found) >= 5
    for name, pod in found:
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["enableServiceLinks"] is False, name
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        for each in [*pod.get("initContainers", ()), *pod["containers"]]:
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            requests, limits = each["resources"]["requests"], each["resources"]["limits"]
            assert {key: requests[key] for key in requests if key != "ephemeral-storage"} == limits, name
            assert re.search(r"@sha256:[0-9a-f]{64}$|:v?\d+\.\d+", each["image"]), each["image"]
        for volume in pod.get("volumes", ()):
            assert "hostPath" not in volume
            assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"], (name, volume)
        # The disk that its volumes may take is reserved.
        empty = [each["emptyDir"] for each in pod.get("volumes", ()) if "emptyDir" in each]
        disk = sum(quantity(each["sizeLimit"]) for each in empty if each.get("medium") != "Memory")
        reserved = of_pod(pod, "requests").get("ephemeral-storage", 0)
        if not name.endswith("-overflow"):  # holds the place of a server
            assert (disk == 0 and not reserved) or disk <= reserved < disk + 2**20, (name, reserved)


def test_no_object_contains_a_secret(build: Build) -> None:
    built = [each for overlay in OVERLAYS for each in build(plans.files(), overlay)]
    assert not [each for each in built if each["kind"] == "Secret"]
    server = pod_of(built[: len(built) // 3], "embed-a100-half")
    (keys,) = (volume for volume in server["volumes"] if volume["name"] == "keys")
    assert keys["secret"] == {"secretName": "inferctl-keys", "defaultMode": 0o440}
    (relay,) = server["initContainers"]
    ledger = {each["name"]: each for each in relay["env"]}["INFERCTL_METERING_LEDGER"]
    assert ledger["valueFrom"] == {"secretKeyRef": {"name": "inferctl-ledger", "key": "url"}}


def test_probes_and_grace_come_from_measured_times(build: Build) -> None:
    built = build(layout.files(plans.plan(plans.embed(), clusters=plans.ONE_CLUSTER)), OVERLAYS[0])
    pod = pod_of(built)
    server = pod["containers"][0]
    startup = server["startupProbe"]
    assert startup["httpGet"]["path"] == "/readyz"
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 3 * 120
    assert server["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert server["readinessProbe"]["httpGet"]["path"] == "/readyz"
    env = {each["name"]: each.get("value") for each in server["env"]}
    stop = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    # 1 s: serve.grace_seconds
    assert pod["terminationGracePeriodSeconds"] >= stop + 1 + float(env["INFERCTL_SERVE_DRAIN_SECONDS"]) + 1


def test_a_slice_is_a_resource_of_its_own_where_the_device_plugin_has_it(build: Build) -> None:
    files = plans.files()
    aws, gcp = (pod_of(build(files, overlay), "embed-a100-half") for overlay in (OVERLAYS[0], OVERLAYS[2]))
    extended = [
        {name: count for name, count in pod["containers"][0]["resources"]["limits"].items() if "/" in name}
        for pod in (aws, gcp)
    ]
    assert extended == [{"nvidia.com/mig-3g.20gb": 1}, {"nvidia.com/gpu": 1}]
    required = [
        {
            term["key"]: term.get("values", term["operator"])
            for term in pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
                "nodeSelectorTerms"
            ][0]["matchExpressions"]
        }
        for pod in (aws, gcp)
    ]
    assert required == [
        {"nvidia.com/gpu.product": ["NVIDIA-A100-SXM4-40GB"], "nvidia.com/mig.config.state": ["success"]},
        {
            "cloud.google.com/gke-accelerator": ["nvidia-tesla-a100"],
            "cloud.google.com/gke-gpu-partition-size": ["3g.20gb"],
            "cloud.google.com/gke-gpu-sharing-strategy": "DoesNotExist",
        },
    ]
    assert all(pod["tolerations"][0]["key"] == "nvidia.com/gpu" for pod in (aws, gcp))
    # The patch of a cluster keeps the rest of the affinity.
    assert all("podAntiAffinity" in pod["affinity"] for pod in (aws, gcp))


def test_the_quota_covers_maximum_rollout_and_overflow(build: Build) -> None:
    plan = plans.plan()
    built = build(layout.files(plan), OVERLAYS[0])
    hard = named(built, "ResourceQuota", "accelerators")["spec"]["hard"]
    needed: dict[str, int] = {}
    for model in plan.models:
        for flavor in model.flavors:
            placed = flavor.at(plan.clusters[0])
            rollout = named(built, "Deployment", flavor.name)["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
            pods = placed.max_replicas.value + rollout + (placed.overflow.value if placed.overflow else 0)
            key = f"requests.{placed.resource.name}" if placed.resource else ""
            needed[key] = needed.get(key, 0) + int(pods)
    assert {name: int(value) for name, value in hard.items()} == needed


def test_clients_of_the_namespace_and_name_servers_are_reached(build: Build) -> None:
    built = build(plans.files(), OVERLAYS[0])
    dns = named(built, "NetworkPolicy", "allow-dns")["spec"]
    # Name servers are pods, the node itself (EKS Auto Mode) or 169.254.169.254 (GKE), so there is no selector.
    assert dns == {
        "podSelector": {},
        "policyTypes": ["Egress"],
        "egress": [{"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]}],
    }
    sources = [{"podSelector": {}}, {"namespaceSelector": {"matchLabels": {"inferctl.io/clients": "true"}}}]
    scrape = named(built, "NetworkPolicy", "allow-prometheus")["spec"]["ingress"]
    monitoring = {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}
    assert [source["namespaceSelector"] for rule in scrape for source in rule["from"]] == [monitoring]
    for model in ("embed", "chat"):
        assert named(built, "NetworkPolicy", f"{model}-server")["spec"]["ingress"][0]["from"] == sources
        spec = named(built, "NetworkPolicy", f"{model}-clients")["spec"]
        assert (spec["podSelector"], spec["policyTypes"]) == (
            {"matchLabels": {"inferctl.io/client": "true"}},
            ["Egress"],
        )
        (rule,) = spec["egress"]
        (peer,) = rule["to"]
        labels = peer["podSelector"]["matchLabels"]
        assert labels == {"app.kubernetes.io/name": model, "app.kubernetes.io/component": "server"}
        (pod, *_) = (
            each["spec"]["template"]["spec"]
            for each in built
            if each["kind"] == "Deployment" and labels.items() <= each["spec"]["template"]["metadata"]["labels"].items()
        )
        ports = {
            port["containerPort"] for each in pod["containers"] for port in each["ports"] if port["name"] == "http"
        }
        assert {port["port"] for port in rule["ports"]} == ports


@pytest.mark.parametrize(
    ("deploy", "message"),
    [
        ({"tools_image": None}, "metering requires a relay"),
        ({"ledger_secret": None}, "nothing stores the usage events"),
    ],
    ids=["tools", "ledger"],
)
def test_usage_events_that_nothing_stores_are_an_error(deploy: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        layout.files(plans.plan(plans.embed(**deploy)))


def test_a_classifier_is_deployed_and_measured(build: Build) -> None:
    spec = plans.embed()
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"task": "classify"})})
    objects = build(layout.files(plans.plan(spec)), OVERLAYS[0])
    assert [problem for each in objects for problem in problems(each, VERSIONS[-1])] == []
    labels = named(objects, "Deployment", "embed-l4")["spec"]["template"]["metadata"]["labels"]
    assert "classify" in labels.values()


def test_a_model_image_is_mounted_without_further_settings(build: Build) -> None:
    spec = plans.embed(weights={})
    source = f"registry.example.com/models/minilm{plans.DIGEST}"
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"source": f"oci://{source}"})})
    objects = build(layout.files(plans.plan(spec, kubernetes="1.35")), OVERLAYS[0])
    assert [problem for each in objects for problem in problems(each, "1.35")] == []
    pod = pod_of(objects)
    (volume,) = (each for each in pod["volumes"] if each["name"] == "model")
    assert volume["image"] == {"reference": source, "pullPolicy": "IfNotPresent"}
    (mount,) = (each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "model")
    assert mount == {"name": "model", "mountPath": "/model", "readOnly": True}  # containerd 2.1 ignores a subPath
    assert {"name": "INFERCTL_MODEL_SOURCE", "value": "/model/model"} in pod["containers"][0]["env"]
    with pytest.raises(UsageError, match=r"a model image needs Kubernetes 1\.35"):
        layout.files(plans.plan(spec, kubernetes="1.34"))
    unpinned = spec.model_copy(update={"model": spec.model.model_copy(update={"source": "oci://example.com/m:v1"})})
    assert any("has no digest" in warning for warning in plans.plan(unpinned, kubernetes="1.35").models[0].warnings)
    assert not any("has no digest" in each for each in plans.plan(spec, kubernetes="1.35").models[0].warnings)


def test_each_model_and_each_adapter_has_its_own_volume(build: Build) -> None:
    def source(name: str) -> str:
        return f"oci://registry.example.com/models/{name}{plans.DIGEST}"

    flavor = {"hardware": "l4", "image": f"r.example.com/x{plans.DIGEST}", "min_replicas": 1, "max_replicas": 2}
    deploy: dict[str, Any] = {"flavors": [flavor], "traffic": {}}
    models = [{"name": name, "model": {"source": source(name), "task": name}} for name in ("embed", "classify")]
    both = Spec.model_validate({"name": "both", "models": models, "deploy": deploy})
    adapters = [Adapter(name="Team/sql", source=source("sql"))]
    chat = plans.generate(**deploy)
    chat = chat.model_copy(update={"model": Model(source=source("chat"), task="generate", adapters=adapters)})
    objects = build(layout.files(plans.plan(both, chat, clusters=[{"name": "a"}], kubernetes="1.35")), "overlays/a")
    assert [problem for each in objects for problem in problems(each, "1.35")] == []
    for name, expected in {
        "both-l4": {"model-0": ("/models/embed", "embed"), "model-1": ("/models/classify", "classify")},
        "chat-l4": {"model": ("/model", "chat"), "model-1": ("/adapters/Team%2Fsql", "sql")},
    }.items():
        pod = named(objects, "Deployment", name)["spec"]["template"]["spec"]
        images = {each["name"]: each["image"]["reference"] for each in pod["volumes"] if "image" in each}
        assert images == {volume: source(model)[6:] for volume, (_, model) in expected.items()}
        mounts = {each["name"]: each["mountPath"] for each in pod["containers"][0]["volumeMounts"]}
        assert {volume: mounts[volume] for volume in images} == {name: path for name, (path, _) in expected.items()}
        paths = [each["value"] for each in pod["containers"][0]["env"] if each["name"] == "INFERCTL_MODEL_SOURCE"]
        assert paths == (["/model/model"] if name == "chat-l4" else [])


def test_a_derived_number_has_its_origin_next_to_it() -> None:
    text = layout.files(plans.plan(clusters=plans.ONE_CLUSTER))["base/embed.yaml"]
    (line,) = {line.strip() for line in text.splitlines() if "failureThreshold" in line and "load time" in line}
    assert re.fullmatch(r"failureThreshold: 72 # .*ceil\(max\(30, 3 x 120\) / 5\).*assumed: no receipt", line)
    grace = [line for line in text.splitlines() if "terminationGracePeriodSeconds" in line]
    assert all(" # grace period: 5 + 1 + 25 + 5" in line for line in grace)


def test_a_bench_job_measures_one_server_of_its_own(build: Build) -> None:
    built = build(plans.files(), "bench/aws-us-east-1")
    job = named(built, "Job", "bench-embed-a100-half")["spec"]["template"]["spec"]
    (server,) = job["initContainers"]
    assert server["restartPolicy"] == "Always"
    assert server["startupProbe"]["httpGet"]["path"] == "/readyz"
    assert server["resources"]["limits"]["nvidia.com/mig-3g.20gb"] == 1
    # No measured cores: both together fit the 4 vCPUs of a g6.xlarge.
    assert [each["resources"]["requests"]["cpu"] for each in (server, *job["containers"])] == ["2", "1"]
    env = {each["name"]: each["value"] for each in server["env"]}
    assert (env["INFERCTL_ACCESS_KEYS"], env["INFERCTL_METERING_MODE"]) == ("null", "off")
    assert "--search --slo 70" in job["containers"][0]["command"][-1]
    assert {volume["name"] for volume in job["volumes"]} == {
        mount["name"] for each in (server, *job["containers"]) for mount in each["volumeMounts"]
    }
