"""Settings that gave wrong or dangerous manifests: names, namespaces, URLs, nodes that others use too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from inferctl.cli import deploy_files
from inferctl.config.spec import Spec
from inferctl.core.errors import UsageError
from inferctl.deploy import layout
from inferctl.deploy.clusters import Clusters
from inferctl.models.fit import ModelSize
from tests.deploy import plans
from tests.deploy.conftest import Objects
from tests.deploy.test_layout import OVERLAYS, Build, named, pod_of
from tests.deploy.validation import problems

A100 = {**plans.FLAVORS[0], "hardware": "a100-40gb-sxm", "name": "a100"}
HALF, L4, T4 = plans.FLAVORS
SLICED = {**L4, "shared_by": 2}


def named_as(name: str) -> Spec:
    return plans.embed().model_copy(update={"name": name})


def on_one(*flavors: dict[str, Any], **cluster: Any) -> dict[str, str]:
    """Return the files for one cluster, which differs from the first one in `cluster`."""
    clusters = [{**plans.ONE_CLUSTER[0], **cluster}]
    return layout.files(plans.plan(plans.embed(flavors=list(flavors)), clusters=clusters))


def required(built: Objects, name: str) -> dict[str, Any]:
    """Return what the nodes of a Deployment must have: label -> values or operator."""
    pod = pod_of(built, name)
    (term,) = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    return {each["key"]: each.get("values", each["operator"]) for each in term["matchExpressions"]}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        # The model `namespace` would replace the policy that forbids all other connections.
        *((name, f"the name {name} is that of a file") for name in ("namespace", "kustomization", "network")),
        ("3d-embed", "3d-embed starts with a digit"),  # the name of a Service starts with a letter
    ],
)
def test_names_that_the_manifests_cannot_have_are_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        layout.files(plans.plan(named_as(name)))


@pytest.mark.parametrize(
    ("specs", "name"),
    [
        ([plans.embed(flavors=[L4, {**T4, "name": "l4-overflow"}], overflow=1)], "embed-l4-overflow"),
        ([plans.embed(flavors=[{**L4, "name": "x-l4"}]), named_as("embed-x")], "embed-x-l4"),
    ],
    ids=["overflow", "two models"],
)
def test_two_objects_with_one_name_are_an_error(specs: list[Spec], name: str) -> None:
    with pytest.raises(UsageError, match=f"two objects would be the Deployment {name}"):
        layout.files(plans.plan(*specs, clusters=plans.ONE_CLUSTER))


@pytest.mark.parametrize("namespace", ["kube-system", "kube-public", "default"])
def test_a_namespace_with_pods_of_others_is_refused(namespace: str) -> None:
    """The policy `default-deny` in kube-system would stop the name servers of the whole cluster."""
    with pytest.raises(ValidationError, match="would cut their connections"):
        plans.embed(namespace=namespace)


@pytest.mark.parametrize("user", ["user:hunter2@", "hunter2@"])
def test_a_url_with_a_password_never_reaches_a_manifest(user: str) -> None:
    with pytest.raises(ValidationError, match="which the manifests would show"):
        Clusters.model_validate({"clusters": [{"name": "a", "prometheus": f"http://{user}prometheus.monitoring"}]})


@pytest.mark.parametrize("url", ["http://prometheus:99999", "http://:9090", "http://[::1", "nats://prometheus"])
def test_a_url_without_a_valid_host_and_port_is_an_error(url: str) -> None:
    with pytest.raises(ValidationError, match=r"prometheus\s+expected an address") as caught:
        Clusters.model_validate({"clusters": [{"name": "a", "prometheus": url}]})
    assert url not in str(caught.value)


def test_metrics_are_scraped_also_if_prometheus_is_outside_of_the_cluster(build: Build) -> None:
    built = build(on_one(*plans.FLAVORS, prometheus="https://prometheus.example.com"), OVERLAYS[0])
    assert {"ServiceMonitor", "PrometheusRule"} <= {each["kind"] for each in built}
    (rule,) = named(built, "NetworkPolicy", "allow-prometheus")["spec"]["ingress"]
    (source,) = rule["from"]
    assert source["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}


@pytest.mark.parametrize(
    ("url", "warned"),
    [("https://thanos.example.com", True), ("http://prometheus.monitoring:9090", False)],  # a Service of each cluster
)
def test_one_prometheus_of_several_clusters_is_a_warning(url: str, warned: bool) -> None:
    made = plans.plan(plans.embed(), clusters=[{"name": name, "prometheus": url} for name in ("a", "b")])
    assert any("each would count the traffic of all" in warning for warning in made.warnings) is warned


def test_gke_gives_no_slice_or_shared_gpu_to_a_pod_that_wants_a_whole_one(build: Build) -> None:
    """In GKE, all of them are `nvidia.com/gpu`, with the same label of the accelerator."""
    accelerator, slices, strategy, clients = (
        f"cloud.google.com/gke-{name}"
        for name in ("accelerator", "gpu-partition-size", "gpu-sharing-strategy", "max-shared-clients-per-gpu")
    )
    files = on_one(A100, HALF, {**SLICED, "name": "part"}, gpu_labels="gke")
    built = build(files, OVERLAYS[0])
    assert [problem for each in built for problem in problems(each, "1.35")] == []
    a100 = {accelerator: ["nvidia-tesla-a100"]}
    assert required(built, "embed-a100") == a100 | {slices: "DoesNotExist", strategy: "DoesNotExist"}
    assert required(built, "embed-a100-half") == a100 | {slices: ["3g.20gb"], strategy: "DoesNotExist"}
    assert required(built, "embed-part") == {
        accelerator: ["nvidia-l4"],
        slices: "DoesNotExist",
        strategy: ["time-sharing"],
        clients: ["2"],
    }
    shared = plans.generate(flavors=[{**plans.generate().deploy.flavors[0].model_dump(), "shared_by": 2}])
    shared = shared.model_copy(update={"serve": shared.serve.model_copy(update={"gpus": 3})})
    with pytest.raises(UsageError, match="a pod gets a part of one GPU only"):
        plans.plan(shared, clusters=plans.ONE_CLUSTER)


def test_a_shared_gpu_has_as_many_parts_as_its_memory_is_divided_by(build: Build) -> None:
    built = build(on_one(SLICED), OVERLAYS[0])
    assert required(built, "embed-l4") == {
        "nvidia.com/gpu.product": ["NVIDIA-L4"],
        "nvidia.com/gpu.sharing-strategy": ["time-slicing"],
        "nvidia.com/gpu.replicas": ["2"],
    }


def test_processes_of_several_gpus_have_memory_and_cores_of_their_own(build: Build) -> None:
    def server(gpus: int) -> tuple[dict[str, str], str]:
        spec = plans.generate()
        spec = spec.model_copy(update={"serve": spec.serve.model_copy(update={"gpus": gpus})})
        built = build(layout.files(plans.plan(spec, clusters=plans.ONE_CLUSTER)), OVERLAYS[0])
        pod = pod_of(built, "chat-l4")
        (shm,) = (volume for volume in pod["volumes"] if volume["name"] == "shm")
        return pod["containers"][0]["resources"]["limits"], shm["emptyDir"]["sizeLimit"]

    (one, small), (three, large) = server(1), server(3)
    assert (one["cpu"], three["cpu"], small, large) == ("3", "9", "1Gi", "3Gi")
    # 4 GiB per process, with a third of the weights (269 MB) on each of three GPUs: 256.6 and 85.5 MiB.
    assert (one["memory"], three["memory"]) == ("4353Mi", "12545Mi")


def test_downloaded_weights_fit_their_volume(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    size = ModelSize(plans.GENERATE_SIZE.parameters, plans.GENERATE_SIZE.config, 140 * 1024**3)
    limits = []
    for each in (plans.GENERATE_SIZE, size):
        monkeypatch.setattr(plans, "GENERATE_SIZE", each)
        built = build(layout.files(plans.plan(plans.generate(), clusters=plans.ONE_CLUSTER)), OVERLAYS[0])
        pod = pod_of(built, "chat-l4")
        (volume,) = (volume for volume in pod["volumes"] if volume["name"] == "model-cache")
        limits.append(volume["emptyDir"]["sizeLimit"])
    assert limits == ["50Gi", "168Gi"]


def test_another_output_in_the_folder_is_kept(tmp_path: Path) -> None:
    both, one = plans.plan(), plans.plan(plans.embed())
    deploy_files.write(both, tmp_path / "team")
    deploy_files.write(both, tmp_path)
    (tmp_path / "base" / "own.yaml").write_text("kind: ConfigMap\n")
    deploy_files.write(one, tmp_path)
    gone = ("base/chat.yaml", "components/monitoring/chat.yaml", "components/monitoring/inferctl-chat.json")
    assert not [name for name in gone if (tmp_path / name).exists()]
    kept = (*(f"team/{name}" for name in gone), "base/own.yaml", "components/monitoring/inferctl-embed.json")
    assert [name for name in kept if (tmp_path / name).exists()] == list(kept)
