"""How many seeded faults other checks find that `inferctl deploy --lint` finds: a table for docs/deploy-lint.md.

The faults are those of tests/manifests/lint/faults.yaml, each alone in otherwise good manifests. A check finds one if
it reports something that it does not report for the good manifests.

    python benchmarks/peers/lint_comparison.py --checkov PATH/bin/checkov

checkov (3.3) needs an environment of its own, because its dependencies are old: `python -m venv DIR`, then
`DIR/bin/pip install checkov`. The other checks are development dependencies.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.deploy.lint import seeded  # noqa: E402

from inferctl.manifests import lint  # noqa: E402
from tests.deploy import validation  # noqa: E402

Objects = Sequence[Mapping[str, Any]]
# What a check reports about manifests: any hashable descriptions.
Check = Callable[[Objects, int], set[str]]
KUBECTL = Path(sys.executable).with_name("kubectl")


def strict_schema(objects: Objects, minor: int) -> set[str]:
    """Strict schemas of Kubernetes itself (kubernetes-validate)."""
    import kubernetes_validate

    found = set()
    for each in objects:
        try:
            kubernetes_validate.validate(dict(each), f"1.{minor}", strict=True)
        except kubernetes_validate.ValidationError as error:
            found.add(f"{each['kind']}: {error.message}")
        except kubernetes_validate.SchemaNotFoundError:
            pass  # a warning of the tool, which then exits with 0
    return found


def all_schemas(objects: Objects, minor: int) -> set[str]:
    """Strict schemas, the schemas of custom resources with their CEL rules, and an unknown apiVersion as an error."""
    named = [{**each, "metadata": {"name": "", **each["metadata"]}} for each in objects]
    return {problem for each in named for problem in validation.problems(each, f"1.{minor}")}


def kustomize(objects: Objects, minor: int) -> set[str]:
    """`kubectl kustomize`, the only check of kubectl that works without a cluster."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "all.yaml").write_text(yaml.safe_dump_all(objects), encoding="utf-8")
        Path(folder, "kustomization.yaml").write_text("resources: [all.yaml]\n", encoding="utf-8")
        done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, check=False)
    return {done.stderr} if done.returncode else set()


def inferctl(objects: Objects, minor: int) -> set[str]:
    """Our lint, with the manifests alone: without nodes and measured facts."""
    return {each.rule for each in lint.lint(seeded.located([dict(each) for each in objects]), lint.LintContext(minor))}


def checkov(program: Path, sets: Mapping[str, Objects]) -> dict[str, set[str]]:
    """Return the failed checks of checkov by name of the manifests. One run for all sets: each start takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        names = {}
        for number, (name, objects) in enumerate(sets.items()):
            names[f"{number:03}.yaml"] = name
            Path(folder, f"{number:03}.yaml").write_text(yaml.safe_dump_all(objects), encoding="utf-8")
        line = [program, "-d", folder, "--framework", "kubernetes", "secrets", "-o", "json", "--compact", "--quiet"]
        done = subprocess.run([*line, "--skip-download"], capture_output=True, text=True, check=False)
        reports = json.loads(done.stdout)
    found: dict[str, set[str]] = {name: set() for name in sets}
    for report in reports if isinstance(reports, list) else [reports]:
        for each in report.get("results", {}).get("failed_checks", ()):
            file = Path(each["file_path"]).name
            # The secrets framework names a secret by its hash, which is no resource.
            resource = each["resource"] if report["check_type"] == "kubernetes" else ""
            found[names[file]].add(f"{each['check_id']} {resource}")
    return found


# A Deployment that each check must report.
BROKEN = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {},
    "spec": {
        "replica": 1,
        "template": {
            "spec": {
                "containers": [
                    {"securityContext": {"privileged": True}, "env": [{"name": "HF_TOKEN", "value": "s3cr3t"}]}
                ]
            }
        },
    },
}


def control(check: Check) -> None:
    """Raise `SystemExit` if a check finds nothing wrong with a Deployment that each of them must report."""
    if not check([BROKEN], 35):
        raise SystemExit(f"{check.__name__} does not find the control fault, so its zeros mean nothing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkov", type=Path, help="program of checkov")
    parser.add_argument("--json", type=Path, help="also write what each check finds to this file")
    options = parser.parse_args()
    good, faults = seeded.good(), seeded.faults()
    checks: dict[str, Check] = {
        "kubernetes-validate": strict_schema,
        "all schemas with CEL": all_schemas,
        "kubectl kustomize": kustomize,
        "inferctl deploy --lint": inferctl,
    }
    caught: dict[str, set[str]] = {}
    for name, check in checks.items():
        control(check)
        before: dict[int, set[str]] = {}
        caught[name] = set()
        for fault in faults:
            minor = fault.context.minor
            if minor not in before:
                before[minor] = check(good, minor)
            if check(fault.objects, minor) - before[minor]:
                caught[name].add(fault.name)
    if options.checkov:
        sets = {fault.name: fault.objects for fault in faults}
        reported = checkov(options.checkov, {"": good, "control": [BROKEN], **sets})
        if not any(each.startswith("CKV_K8S_16") for each in reported["control"]):
            raise SystemExit("checkov does not find the privileged container, so its zeros mean nothing")
        caught["checkov"] = {name for name in sets if reported[name] - reported[""]}
    lessons = {rule.id: rule.lesson for rule in lint.RULES.values()}
    totals = Counter(lessons[fault.rule] for fault in faults)
    names = [name for name in ("kubernetes-validate", "all schemas with CEL", "kubectl kustomize", "checkov",
             "inferctl deploy --lint") if name in caught]  # fmt: skip
    print("| lesson | faults |", " | ".join(names), "|")
    print("|---|---|" + "---|" * len(names))
    for lesson in lint.LESSONS:
        counts = [sum(lessons[f.rule] == lesson and f.name in caught[name] for f in faults) for name in names]
        print(f"| {lesson} | {totals[lesson]} |", " | ".join(map(str, counts)), "|")
    print(f"| all | {len(faults)} |", " | ".join(str(len(caught[name])) for name in names), "|")
    if options.json:
        table = {fault.name: [name for name in names if fault.name in caught[name]] for fault in faults}
        options.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
