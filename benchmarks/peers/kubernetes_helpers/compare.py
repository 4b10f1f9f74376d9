"""Compares the preview with the code of Kubernetes on random pods, nodes, selectors and quantities.

Covered is what Kubernetes has as a library, k8s.io/component-helpers: quantities, requests and limits of pods, node
affinity, taints and tolerations, label selectors. The library has no topology spread, pod affinity or preemption.

Debian 13 has the library in version 0.32 (Kubernetes 1.32) as golang-k8s-component-helpers-dev. Build the program with
any Go, then run:

    mkdir -p build/src && cp -r benchmarks/peers/kubernetes_helpers build/src/
    GO111MODULE=off GOPATH=$PWD/build:/usr/share/gocode go build -o build/helpers kubernetes_helpers
    python benchmarks/peers/kubernetes_helpers/compare.py build/helpers --count 100000
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import subprocess
from collections import Counter
from typing import Any

from inferctl.manifests.kubernetes import fields, resources, selectors, taints
from inferctl.manifests.kubernetes.taints import Taint

KEYS = ("a", "b", "zone", "gpu")
VALUES = ("1", "2", "x", "", "10", "-3", "+4", "007", "true")
EFFECTS = ("NoSchedule", "NoExecute", "PreferNoSchedule")
AMOUNTS = ("1", "2", "500m", "0.1", "1.5", "1e3", "128Mi", "1Gi", "1G", "0", "100k", "250u", "0.0001", "1001m")
# Without quantities over 64 bits, which overflow in Kubernetes.
TEXTS = (
    *AMOUNTS, "1E3", "1Ki", "3n", "-1", "+2", ".5", "5.", "1e-3", "1e", "0x10", "1 Gi", "", "1.0e2", "00012",
    "1.2.3", "1e2Ki", "1ee3", "100M", "K", "1K", "1T", "1Ti", "1P", "1e+2",
)  # fmt: skip
RESOURCES = ("cpu", "memory", "ephemeral-storage", "nvidia.com/gpu", "hugepages-2Mi")


class Questions:
    """Random questions, each with the answer of the preview."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def next(self) -> tuple[dict[str, Any], Any]:
        """Return a question and the answer of the preview."""
        ask = self._random.choice(("quantity", "requests", "limits", "affinity", "affinity", "taints", "selector"))
        question, answer = getattr(self, f"_{ask}")()
        return {"ask": ask, **question}, answer

    def _chance(self, share: float) -> bool:
        return self._random.random() < share

    def _some(self, values: tuple[str, ...], share: float) -> list[str]:
        return [each for each in values if self._chance(share)]

    def _quantity(self) -> tuple[dict[str, Any], Any]:
        text = self._random.choice(TEXTS)
        try:
            found = fields.amounts({"cpu": text, "other": text})
        except ValueError:
            return {"text": text}, None
        return {"text": text}, [found["cpu"], found["other"]]

    def _container(self, *, initial: bool) -> dict[str, Any]:
        stated = {
            kind: {name: self._random.choice(AMOUNTS) for name in self._some(RESOURCES, 0.4)}
            for kind in self._some(("requests", "limits"), 0.75)
        }
        sidecar = {"restartPolicy": "Always"} if initial and self._chance(0.4) else {}
        return {"name": "c", "resources": stated, **sidecar}

    def _pod(self, kind: resources.Kind) -> tuple[dict[str, Any], Any]:
        spec: dict[str, Any] = {
            "containers": [self._container(initial=False) for _ in range(self._random.randint(1, 3))],
            "initContainers": [self._container(initial=True) for _ in range(self._random.randint(0, 3))],
        }
        if self._chance(0.2):
            spec["overhead"] = {"cpu": "100m", "memory": "64Mi"}
        stored = copy.deepcopy(spec)
        for each in (*stored["containers"], *stored["initContainers"]):
            # The API server makes a limit the request where there is none.
            if limits := each["resources"].get("limits"):
                each["resources"]["requests"] = {**limits, **each["resources"].get("requests", {})}
        return {"pod": {"metadata": {"name": "p"}, "spec": stored}}, resources.of_pod(spec, kind)

    def _requests(self) -> tuple[dict[str, Any], Any]:
        return self._pod("requests")

    def _limits(self) -> tuple[dict[str, Any], Any]:
        return self._pod("limits")

    def _labels(self, share: float = 0.6) -> dict[str, str]:
        return {key: self._random.choice(VALUES) for key in self._some(KEYS, share)}

    def _requirement(self, *operators: str) -> dict[str, Any]:
        operator = self._random.choice(("In", "NotIn", "Exists", "DoesNotExist", *operators))
        values = {"In": VALUES, "NotIn": VALUES, "Gt": ("1", "5", "-2", "x"), "Lt": ("1", "5", "+3", "x")}
        count = self._random.randint(1, 2) if operator in ("In", "NotIn") else 1
        chosen = {"values": self._random.sample(values[operator], count)} if operator in values else {}
        return {"key": self._random.choice(KEYS), "operator": operator, **chosen}

    def _affinity(self) -> tuple[dict[str, Any], Any]:
        spec: dict[str, Any] = {"nodeSelector": self._labels(0.15)}
        if self._chance(0.8):
            terms = [
                {
                    "matchExpressions": [self._requirement("Gt", "Lt") for _ in range(self._random.randint(0, 2))],
                    "matchFields": [
                        {"key": "metadata.name", "operator": operator, "values": [self._random.choice(("n1", "n2"))]}
                        for operator in self._some(("In", "NotIn"), 0.1)
                    ],
                }
                for _ in range(self._random.randint(0, 3))
            ]
            required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
            spec["affinity"] = {"nodeAffinity": required}
        labels = self._labels()
        question = {"pod": {"metadata": {}, "spec": spec}, "node": {"metadata": {"name": "n1", "labels": labels}}}
        return question, selectors.node_matches(spec, "n1", labels)

    def _taints(self) -> tuple[dict[str, Any], Any]:
        present = [
            {"key": self._random.choice(KEYS), "value": self._random.choice(("", "x", "y")), "effect": effect}
            for effect in self._some(EFFECTS, 0.5)
        ]
        tolerated = []
        for _ in range(self._random.randint(0, 2)):
            whole = {
                "key": self._random.choice(KEYS),
                "operator": self._random.choice(("", "Equal", "Exists")),
                "value": self._random.choice(("", "x", "y")),
                "effect": self._random.choice(EFFECTS),
            }
            tolerated.append({key: value for key, value in whole.items() if self._chance(0.75)})
        question = {
            "pod": {"metadata": {}, "spec": {"tolerations": tolerated}},
            "node": {"metadata": {}, "spec": {"taints": present}},
        }
        return question, taints.untolerated(tolerated, [Taint(**each) for each in present]) is None

    def _selector(self) -> tuple[dict[str, Any], Any]:
        expressions = [self._requirement() for _ in range(self._random.randint(0, 2))]
        selector = {"matchLabels": self._labels(0.3), "matchExpressions": expressions}
        chosen, labels = self._random.choice((None, {}, selector, selector, selector)), self._labels()
        return {"selector": chosen, "labels": labels}, selectors.matches(chosen, labels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="the program of main.go")
    parser.add_argument("--count", type=int, default=20_000, help="number of questions")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    questions = Questions(options.seed)
    asked = [questions.next() for _ in range(options.count)]
    text = "".join(f"{json.dumps(question)}\n" for question, _ in asked)
    done = subprocess.run([options.program], input=text, capture_output=True, text=True, check=True)
    total: Counter[str] = Counter()
    different: Counter[str] = Counter()
    for (question, ours), line in zip(asked, done.stdout.splitlines(), strict=True):
        theirs = json.loads(line)
        total[question["ask"]] += 1
        if _plain(ours) != _plain(theirs):
            different[question["ask"]] += 1
            if different[question["ask"]] <= 3:
                print(f"{json.dumps(question)}\n  preview: {ours}\n  Kubernetes: {theirs}")
    for ask, count in sorted(total.items()):
        print(f"{ask}: {count:,} questions, {different[ask]:,} answers differ")
    return 1 if different else 0


def _plain(answer: Any) -> Any:
    """Return an answer without the resources of which a pod needs none."""
    return {name: amount for name, amount in answer.items() if amount} if isinstance(answer, dict) else answer


if __name__ == "__main__":
    raise SystemExit(main())
