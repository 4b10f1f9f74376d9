"""The section `deploy` of the spec, the clusters file, and the digest of specs without them."""

from __future__ import annotations

from pathlib import Path

import pytest

from inferctl.core.errors import SpecError
from inferctl.deploy import clusters
from tests.deploy.arithmetic.sources import parse

HEAD = "name: a\nmodel: {source: a/b}\n"


PLAIN = "183e132ee360677b7ec3b5a9057bf2f68b851a58c60188caabadc524755d503a"
FULL = "serve: {precision: bf16, port: 9000}\nhardware: [t4]\nslo: {p99_ms: 70}\n"


@pytest.mark.parametrize(
    ("text", "digest"),
    [
        *((f"{HEAD}{deploy}", PLAIN) for deploy in ("", "deploy: {}\n", "deploy:\n")),
        (
            "name: a\nmodel: {source: a/b, weights: bake}\n" + FULL,
            "12d59517ed78ee63530f096d98da419e09be566e98871699043cc6f62f4c1257",
        ),
    ],
)
def test_specs_without_a_deployment_keep_their_digests(text: str, digest: str) -> None:
    """The digests are those of the version before the section had keys."""
    assert parse(text).digest() == digest
    assert parse(f"{HEAD}deploy: {{namespace: x}}\n").digest() != digest


@pytest.mark.parametrize(
    ("deploy", "message"),
    [
        ("flavors: [{hardware: l4, receipt: r.json, tokens_per_second: 5}]", "remove tokens_per_second"),
        ("flavors: [{hardware: a100-40gb-mig-3g.20gb, shared_by: 2}]", "3g.20gb is not shared further"),
        ("flavors: [{hardware: l4, sharing: mig}]", "unknown key 'sharing'"),
        ("flavors: [{hardware: l4, min_replicas: 3, max_replicas: 2}]", "min_replicas 3 above max_replicas 2"),
        ("flavors: [{hardware: l4}, {hardware: l4}]", "has l4 twice"),
        ("flavors: [{hardware: l4, name: L4}]", "deploy.flavors.0.name"),
        ("traffic: {base_rps: 5, peak_rps: 2}", "base_rps 5 is above peak_rps 2"),
        ("traffic: {peak_rps: 2}", "requires base_rps and peak_rps together"),
        ("utilization: 1.5", "deploy.utilization"),
        ("scaling: cluster", "'cluster' is not one of keda, none"),
        ("overflow: some", "deploy.overflow: 'some' is not auto, none or a number"),
        ("overflow: -1", "deploy.overflow: -1 is not auto, none or a number"),
        ("flavors: [{hardware: l4, recipt: r.json}]", "did you mean receipt?"),
        ("namespace: Inference", "deploy.namespace"),
        ("weights: {image: b}", "unknown key 'image'"),
        ("omit: [Deployment]", "deploy.omit.0"),
        ("flavours: []", "did you mean flavors?"),
    ],
)
def test_wrong_settings_are_named(deploy: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(f"{HEAD}deploy:\n  {deploy}\n")
    error = f"{caught.value.message} {caught.value.hint}"
    assert message in error


@pytest.mark.parametrize(
    "deploy",
    [
        "flavors: [{hardware: l4, min_replicas: 2, max_replicas: 2}]",
        "flavors: [{hardware: l4, shared_by: 2}]",
        "traffic: {base_rps: 5, peak_rps: 5}",
        "overflow: 0",
    ],
)
def test_settings_at_a_bound_are_accepted(deploy: str) -> None:
    assert parse(f"{HEAD}deploy:\n  {deploy}\n").deploy.model_fields_set


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clusters: []\n", "clusters"),
        ("clusters:\n  - {share: 1}\n", "2: clusters.0.name is missing"),
        ("clusters:\n  - name: a\n    region_: x\n", "3: unknown key 'region_'"),
        ("clusters:\n  - {name: a, gpu_labels: aks}\n", "clusters.0.gpu_labels"),
        ("clusters:\n  - {name: a, kubernetes: '1.31'}\n", "2: kubernetes: '1.31' is not supported"),
        ("clusters:\n  - {name: a}\n  - {name: a}\n", "the cluster a is listed twice"),
        ("clusters:\n  - {name: a, share: 0.6}\n  - {name: b, share: 0.6}\n", "add up to 1.2, not to 1"),
        ("clusters:\n  - {name: a, share: 0.6}\n", "add up to 0.6, not to 1"),
        ("clusters:\n  - name: a\n    max_replicas: {l5: 2}\n", "hardware 'l5' not found; did you mean"),
    ],
)
def test_errors_of_the_clusters_file_have_their_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "clusters.yaml"
    file.write_text(text)
    with pytest.raises(SpecError) as caught:
        clusters.read(file)
    assert message in caught.value.message


def test_clusters_share_what_the_others_leave(tmp_path: Path) -> None:
    file = tmp_path / "clusters.yaml"
    file.write_text("prometheus: http://p:9090\nclusters:\n  - {name: a, share: 0.5}\n  - name: b\n  - name: c\n")
    found = clusters.read(file)
    assert [cluster.share for cluster in found] == [0.5, 0.25, 0.25]
    assert {cluster.prometheus for cluster in found} == {"http://p:9090"}
