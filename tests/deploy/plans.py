"""Plans for the tests of manifests, from specs as a file would have them."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

from inferctl.config.spec import Spec
from inferctl.deploy import layout
from inferctl.deploy.clusters import Cluster, Clusters
from inferctl.deploy.plan import DeploymentPlan
from inferctl.deploy.planning import SpecSource, make_plan, of_several
from inferctl.models import model
from inferctl.models.fit import ModelSize
from tests.models.decoder_configs import SMOLLM2_135M

DIGEST = "@sha256:" + "ab" * 32
# The shapes of all-MiniLM-L6-v2 and SmolLM2-135M, so that no test needs their weights.
EMBED_SIZE = ModelSize(
    22_713_216,
    {
        "architectures": ["BertModel"],
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "model_type": "bert",
    },
    90_868_376,
)
_LABELS = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "no", "1": "yes"}}
CLASSIFY_SIZE = replace(EMBED_SIZE, config=EMBED_SIZE.config | _LABELS)
GENERATE_SIZE = ModelSize(
    134_515_008,
    {
        **SMOLLM2_135M,
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": 1536,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    269_060_552,
)
CLUSTERS: list[dict[str, Any]] = [
    {"name": "aws-us-east-1", "kubernetes": "1.35", "share": 0.5},
    {"name": "aws-eu-central-1", "kubernetes": "1.34", "max_replicas": {"t4": 0}, "share": 0.2},
    {"name": "gcp-europe-west4", "gpu_labels": "gke", "kubernetes": "1.36", "share": 0.3},
]
# The first cluster alone.
ONE_CLUSTER = [{**CLUSTERS[0], "share": 1.0}]
FLAVORS: list[dict[str, Any]] = [
    {
        "hardware": "a100-40gb-mig-3g.20gb",
        "name": "a100-half",
        "tokens_per_second": 90_000,
        "image": f"registry.example.com/embed{DIGEST}",
    },
    {"hardware": "l4", "tokens_per_second": 40_000, "image": f"registry.example.com/embed{DIGEST}"},
    {"hardware": "t4", "tokens_per_second": 15_000, "image": f"registry.example.com/embed-fp16{DIGEST}"},
]
TOOLS = f"registry.example.com/inferctl-tools{DIGEST}"


def embed(**deploy: Any) -> Spec:
    """Return a spec of embeddings with keys, metering with a broker, and a bench."""
    settings = {
        "flavors": FLAVORS,
        "traffic": {"base_rps": 200, "peak_rps": 3000, "tokens_per_request": 120, "rise_s": 60},
        "weights": {"pvc": "embed-weights"},
        "keys_secret": "inferctl-keys",
        "ledger_secret": "inferctl-ledger",
        "tools_image": TOOLS,
        "bench": True,
        **deploy,
    }
    return Spec.model_validate(
        {
            "name": "embed",
            "model": {"source": "sentence-transformers/all-MiniLM-L6-v2"},
            "access": {"keys": "keys.json", "tokens_per_minute": 100_000},
            "metering": {"mode": "on"},
            "slo": {"p99_ms": 70},
            "deploy": settings,
        }
    )


def generate(**deploy: Any) -> Spec:
    """Return a spec of generation on L4, with downloaded weights."""
    image = f"registry.example.com/chat{DIGEST}"
    settings = {
        "flavors": [{"hardware": "l4", "tokens_per_second": 3000, "image": image}],
        "traffic": {"base_rps": 2, "peak_rps": 20, "tokens_per_request": 400},
        **deploy,
    }
    return Spec.model_validate(
        {
            "name": "chat",
            "model": {"source": "HuggingFaceTB/SmolLM2-135M-Instruct", "weights": "download", "task": "generate"},
            "image": {"base": "vllm-cuda13.0"},
            "deploy": settings,
        }
    )


def plan(*specs: Spec, clusters: list[dict[str, Any]] | None = None, kubernetes: str | None = None) -> DeploymentPlan:
    """Return the plan of `specs`; of an embedding and a generation model in three clusters without any."""
    sources = [_source(spec) for spec in specs or (embed(), generate())]
    return make_plan(sources, _clusters(CLUSTERS if clusters is None else clusters), kubernetes)


@functools.cache
def _files() -> dict[str, str]:
    return layout.files(plan())


def files() -> dict[str, str]:
    """Return the files of `plan()`, rendered once."""
    return dict(_files())


def _clusters(rows: list[dict[str, Any]]) -> tuple[Cluster, ...]:
    return Clusters.model_validate({"clusters": rows}).resolved()


def _source(spec: Spec) -> SpecSource:
    if spec.models:
        return of_several(spec, [_source(each) for each in spec.each()])
    size = {"generate": GENERATE_SIZE, "classify": CLASSIFY_SIZE}.get(spec.model.task, EMBED_SIZE)
    task = model.resolve_task(spec.model.task, size, spec.model.source)
    return SpecSource(spec, Path(), size, task)
