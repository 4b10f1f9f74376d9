"""An Indexed Job that runs `inferctl embed` on the files of a PersistentVolumeClaim, one pod for each part.

Nothing coordinates the pods. One that replaces another computes the ranges of its part that are not done, also when
a spot node is taken away.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def objects(model: ModelPlan, flavor: FlavorPlan, most: int, run: EmbedRun, namespace: str) -> list[Object]:
    """Return the Job on the nodes of `flavor`, of which a cluster has `most` replicas, and its network policy."""
    parts, server = run.parts or most, job.container(model, flavor)
    command = [catalog.base(model.spec.image.base).python.executable, "-m", "inferctl", "embed", "--spec", CONFIG_PATH]
    container = {
        "name": EMBED,
        **{key: server[key] for key in ("image", "imagePullPolicy", "env", "resources", "securityContext")},
        "command": [*command, *run.arguments, "--part", f"$(JOB_COMPLETION_INDEX)/{parts}"],
        "workingDir": _DATA,
        "volumeMounts": [*server["volumeMounts"], {"name": "data", "mountPath": _DATA}],
    }
    # Of a lost or reclaimed node, an eviction, a preemption.
    disrupted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    # Such as for other options than those of the output: no retry helps.
    usage = {"containerName": EMBED, "operator": "In", "values": [UsageError.exit_code]}
    settings = {
        "completionMode": "Indexed",
        "completions": parts,
        "parallelism": Noted(min(parts, most), f"min(parts {parts}, most replicas of the flavor {most})"),
        "backoffLimitPerIndex": _RETRIES,
        "podFailurePolicy": {"rules": [disrupted, {"action": "FailJob", "onExitCodes": usage}]},
    }
    claim = {"name": "data", "persistentVolumeClaim": {"claimName": run.claim}}
    found = job.job(model, flavor, EMBED, namespace, settings, {"containers": [container]}, [claim])
    return [*job.shared(model, EMBED, namespace), found]
