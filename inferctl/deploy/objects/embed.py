"""An Indexed Job that runs `inferctl embed` on the files of a PersistentVolumeClaim, one pod for each part.

Nothing coordinates the pods: each makes the same ranges of the input, and computes those of its part that are not done.
So a pod that replaces another one continues, also on a spot node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from inferctl.core.errors import UsageError
from inferctl.deploy.figure import Noted
from inferctl.deploy.objects import job
from inferctl.deploy.objects.metadata import EMBED, Object
from inferctl.deploy.plan import FlavorPlan, ModelPlan
from inferctl.facts import catalog
from inferctl.image.render import CONFIG_PATH

# Where the claim is mounted. It is the working directory, so that relative paths are those in the claim.
_DATA = "/data"
_RETRIES = 3


@dataclass(frozen=True)
class EmbedRun:
    """A run of `inferctl embed`: its claim, its arguments, and its parts, None for the most replicas of the flavor."""

    claim: str
    arguments: tuple[str, ...]
    parts: int | None = None


def check(model: ModelPlan) -> None:
    """Raise `UsageError` if the image of `model` cannot run `inferctl embed`."""
    if len(model.spec.models) or "generate" in model.tasks:
        raise UsageError(
            f"{model.name} has several models, or generates: `--embed` is of one encoder", "pass the spec of one model"
        )
    if not model.spec.image.embed:
        raise UsageError(
            f"the image of {model.name} cannot run `inferctl embed`: it has the server only",
            "set `image.embed: true` in the spec, build the image again, and name it in the spec",
        )


def objects(model: ModelPlan, flavor: FlavorPlan, most: int, run: EmbedRun, namespace: str) -> list[Object]:
    """Return the Job on the nodes of `flavor`, of which a cluster has `most` replicas, and its network policy."""
    parts = run.parts or most
    python = catalog.base(model.spec.image.base).python.executable
    server = job.container(model, flavor)
    container = {
        "name": EMBED,
        **{key: server[key] for key in ("image", "imagePullPolicy", "env", "resources", "securityContext")},
        "command": [python, "-m", "inferctl", "embed", "--spec", CONFIG_PATH, *run.arguments],
        "workingDir": _DATA,
        "volumeMounts": [*server["volumeMounts"], {"name": "data", "mountPath": _DATA}],
    }
    container["command"] += ["--part", f"$(JOB_COMPLETION_INDEX)/{parts}"]
    settings: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": parts,
        "parallelism": Noted(min(parts, most), f"min(parts {parts}, most replicas of the flavor {most})"),
        "backoffLimitPerIndex": _RETRIES,
        "podFailurePolicy": {
            "rules": [
                # A lost or reclaimed node, an eviction, a preemption: the pod did not fail.
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                # Other options than those of the output, or another input: no retry helps.
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": EMBED, "operator": "In", "values": [UsageError.exit_code]},
                },
            ]
        },
    }
    claim = {"name": "data", "persistentVolumeClaim": {"claimName": run.claim}}
    pod = {"containers": [container]}
    return [*job.shared(model, EMBED, namespace), job.job(model, flavor, EMBED, namespace, settings, pod, [claim])]
