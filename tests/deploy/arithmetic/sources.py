"""Build receipts, specs and plans for the tests of `inferctl deploy`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inferctl.config import settings
from inferctl.config.spec import Spec, Task
from inferctl.deploy import planning
from inferctl.deploy.clusters import Cluster, Clusters
from inferctl.deploy.plan import DeploymentPlan
from inferctl.models.fit import ModelSize, UnknownSize
from inferctl.receipts import receipt

# A model of 100 million parameters: 200 MB in 16 bits.
SMALL = ModelSize(100_000_000, {"hidden_size": 768, "intermediate_size": 3072, "vocab_size": 30_000})
HALF = "a100-40gb-mig-3g.20gb"
IMAGE = f"registry.example.com/ml/embed@sha256:{'ab' * 32}"


def receipt_document(key: str, rate: float, **changes: Any) -> dict[str, Any]:
    """Return the document of a receipt: a search on hardware `key` found `rate` requests/s of 250 tokens."""
    made = {
        "created": "2026-11-20T09:00:00+00:00",
        "configuration": {"name": key, "precision": "auto", "url": None},
        "environment": {},
        "hardware": {"key": key, "name": key},
        "model": {"source": "test"},
        "plan": {"name": "search", "load": {"task": "embed", "mode": "open"}},
        "precision": {"effective": "fp16" if key == "t4" else "bf16"},
        "quality": {"checked": True, "passes": True},
        "resources": {},
        "runs": [{"ready_seconds": 30.0}, {"ready_seconds": 41.5}],
        "search": {"verdict": "found", "max_goodput_rps": rate},
        "summary": {"requests_per_s": rate, "tokens_per_request": 250.0, "latency_ms": {"max": 400.0}},
        "validity": {"valid": True, "reasons": [], "cautions": []},
    }
    return made | changes


def write_receipt(file: Path, key: str, rate: float, **changes: Any) -> Path:
    return receipt.write(file, receipt_document(key, rate, **changes)).path


def spec(deploy: dict[str, Any], **sections: Any) -> Spec:
    """Return a spec of embeddings with baked weights and the section `deploy`."""
    data = {"name": "embed", "model": {"source": "org/embed", "weights": "bake"}, **sections, "deploy": deploy}
    return Spec.model_validate(data)


def parse(text: str) -> Spec:
    """Return the spec of YAML text, without variables of the environment."""
    return settings.resolve(settings.parse(text), {}, {}).spec


def plan(
    made: Spec,
    folder: Path = Path(),
    clusters: list[dict[str, Any]] | None = None,
    size: ModelSize | UnknownSize = SMALL,
    task: Task = "embed",
) -> DeploymentPlan:
    """Return the plan of one spec. `clusters`: their keys in the clusters file."""
    found = Clusters.model_validate({"clusters": clusters or [{"name": "default"}]}).resolved()
    return planning.make_plan([planning.SpecSource(made, folder, size, task)], found)


def cluster(**keys: Any) -> Cluster:
    return Clusters.model_validate({"clusters": [{"name": "default", **keys}]}).resolved()[0]
