"""Rules and findings: a rule is a function with its lesson, a finding is one place where it fired."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from inferctl.manifests.kubernetes.fields import mapping
from inferctl.manifests.label_keys import LINT_IGNORE
from inferctl.manifests.lint.manifests import Manifests
from inferctl.manifests.manifests_file import FieldPath, Located

Level = Literal["error", "warning", "note"]

# What running models on Kubernetes teaches. Each rule belongs to one lesson.
LESSONS = {
    "neighbors": "A share of a GPU is worth its price only if workloads do not encroach on each other.",
    "placement": "Limits, affinities and taints must make pods land where the node is ready.",
    "overflow": "GPUs run out: keep some alive and empty.",
    "guardrails": "Autoscalers are too clever without guardrails.",
    "regions": "Spread over zones, regions and clouds.",
    "life": "A pod must start and stop without losing a request.",
    "observability": "Metrics and alerts must work before they are needed.",
    "versions": "A schema does not know what a version of Kubernetes has switched on.",
}


@dataclass(frozen=True)
class Hit:
    """A place where a rule fires. `level`, `consequence` and `fix` replace those of the rule."""

    object: Located
    path: FieldPath
    what: str
    level: Level | None = None
    consequence: str | None = None
    fix: str | None = None


@dataclass(frozen=True)
class LintFinding:
    """One finding. `line` is None without a file; `object` is `Kind/name`, `field` a path such as `spec.replicas`.

    `namespace`: of the object; "" if it names none.
    """

    rule: str
    level: Level
    file: str
    line: int | None
    object: str
    namespace: str
    field: str
    lesson: str
    what: str
    consequence: str
    fix: str


Check = Callable[[Manifests], Iterator[Hit]]


@dataclass(frozen=True)
class Rule:
    """A rule: its stable id, its default level, its lesson (a key of `LESSONS`), and what its findings say."""

    id: str
    level: Level
    lesson: str
    finds: str
    consequence: str
    fix: str
    check: Check = field(repr=False)

    def findings(self, manifests: Manifests) -> Iterator[LintFinding]:
        """Yield what the rule finds in objects that are not exempt from it."""
        for hit in self.check(manifests):
            exempt = mapping(hit.object.data, "metadata", "annotations").get(LINT_IGNORE)
            if isinstance(exempt, str) and self.id in exempt.replace(",", " ").split():
                continue
            yield LintFinding(
                rule=self.id,
                level=hit.level or self.level,
                file=hit.object.file,
                line=hit.object.line(hit.path),
                object=f"{hit.object.kind}/{hit.object.name}",
                namespace=hit.object.namespace,
                field=".".join(map(str, hit.path)),
                lesson=LESSONS[self.lesson],
                what=hit.what,
                consequence=hit.consequence or self.consequence,
                fix=hit.fix or self.fix,
            )


def rule(id: str, level: Level, lesson: str, *, finds: str, consequence: str, fix: str) -> Callable[[Check], Rule]:
    """Return a decorator that makes a rule of its check."""
    return lambda check: Rule(id, level, lesson, finds, consequence, fix, check)
