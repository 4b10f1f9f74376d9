"""Files of a cluster and manifests with any field of another type: an answer or an error with a hint, no traceback."""

from __future__ import annotations

import contextlib
import copy
import io
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferctl.cli import deploy_preview
from inferctl.core.errors import InferctlError
from tests.manifests import kube
from tests.manifests.preview import expand

# They have each kind of object and each field that the preview reads.
CASES = [case for _, case in expand.load()]


def files(case: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the cluster of a case, and manifests of two pods like its pod."""
    pod = expand.pod(case["pod"])
    annotations = {"inferctl.io/tokens-per-second": "100", "inferctl.io/load-seconds": "45"}
    labels = pod["metadata"]["labels"] or {"app": "incoming"}
    deployment = kube.deployment("incoming", labels, pod["spec"], 2, annotations=annotations)
    scaled = {"scaleTargetRef": {"name": "incoming"}, "minReplicaCount": 1, "maxReplicaCount": 3}
    annotations = {"inferctl.io/peak-tokens-per-second": "250"}
    scaler = kube.thing("ScaledObject", "x", scaled, annotations=annotations)
    return copy.deepcopy((expand.cluster_objects(case), [deployment, scaler]))  # they share selectors


def preview(folder: Path, nodes: list[dict[str, Any]], objects: list[dict[str, Any]], as_json: bool) -> None:
    paths = (folder / "nodes.yaml", folder / "manifests.yaml")
    for file, documents in zip(paths, (nodes, objects), strict=True):
        file.write_text(yaml.dump_all(documents, Dumper=yaml.CSafeDumper))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(InferctlError):
        deploy_preview.preview([paths[0]], [paths[1]], as_json=as_json)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in `value`."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(each for key, child in children for each in places(child, (*path, key)))]


@pytest.mark.parametrize("seed", range(3))
def test_no_field_of_another_type_makes_a_traceback(tmp_path: Path, seed: int) -> None:
    chosen = random.Random(seed)
    for number in range(60):
        both = files(chosen.choice(CASES))
        for objects in both:
            path = chosen.choice([each for each in places(objects) if len(each) > 1])
            parent: Any = objects
            for part in path[:-1]:
                parent = parent[part]
            if chosen.random() < 0.2 and isinstance(parent, dict):
                del parent[path[-1]]
            else:
                parent[path[-1]] = copy.deepcopy(chosen.choice(kube.JUNK))
        preview(tmp_path, *both, as_json=number % 2 == 0)
