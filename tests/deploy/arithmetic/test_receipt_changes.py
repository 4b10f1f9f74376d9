"""A changed receipt changes exactly the numbers of the manifests that come from it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferctl import cli
from inferctl.receipts import receipt

EXAMPLE = Path(__file__).resolve().parents[3] / "docs" / "examples" / "kubernetes"


def rendered(output: Path) -> Path:
    assert cli.run(["deploy", "-f", "embed.yaml", "-f", "generate.yaml", "--output", str(output)]) == 0
    return output


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            name = inner.get("name", index) if isinstance(inner, dict) else index
            yield from leaves(inner, f"{path}[{name}]")
    else:
        yield path, value


def values(folder: Path) -> dict[str, Any]:
    """Return every value of every manifest: `file Kind/name.path` -> value."""
    found: dict[str, Any] = {}
    for file in sorted(each for each in folder.rglob("*") if each.is_file()):
        for each in yaml.safe_load_all(file.read_text()):  # JSON is YAML
            name = (each.get("metadata") or {}).get("name", "")
            head = f"{file.relative_to(folder).as_posix()} {each.get('kind')}/{name}"
            found |= leaves(each, head)
    return found


def replace_rate(file: Path, old: float, new: float) -> None:
    data = json.loads(file.read_text())
    assert data["search"]["max_goodput_rps"] == old
    data["search"]["max_goodput_rps"] = new
    receipt.write(file, {key: value for key, value in data.items() if key not in ("seal", "schema")})


def test_a_changed_receipt_changes_exactly_what_comes_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The L4 serves 200 instead of 240 requests/s of 250 tokens: 50,000 instead of 60,000 tokens/s.

    A replica is planned with 0.7 of it: 35,000 instead of 42,000. Its maximum serves the peak of the cluster alone:
    aws-eu-central-1 375,000 / 42,000 = 8.9 -> 9 and 375,000 / 35,000 = 10.7 -> 11; the others 187,500: 4.5 -> 5 and
    5.4 -> 6. The overflow in aws-us-east-1 was 150,000 / 60,000 = 2.5 -> 3 and is 150,000 / 50,000 = 3.
    """
    monkeypatch.chdir(shutil.copytree(EXAMPLE, tmp_path / "example"))
    before = rendered(tmp_path / "before")
    replace_rate(Path("receipts/embed-l4.json"), 240.0, 200.0)
    after = rendered(tmp_path / "after")
    old, new = values(before), values(after)
    assert old.keys() == new.keys()
    changed = {path: (old[path], new[path]) for path in old if old[path] != new[path]}
    queries = {path: changed.pop(path) for path in list(changed) if path.endswith((".query", ".expr"))}
    # Quotas are sums of maxima, but aws-eu-central-1 can have 20 L4, not 11 + 10.
    quota = "ResourceQuota/accelerators.spec.hard.requests.nvidia.com/gpu"
    assert changed == {
        "base/embed.yaml Deployment/embed-l4.metadata.annotations.inferctl.io/tokens-per-second": ("60000", "50000"),
        f"overlays/aws-eu-central-1/quota.yaml {quota}": ("71", "72"),
        "overlays/aws-eu-central-1/scaling.yaml ScaledObject/embed-l4.spec.maxReplicaCount": (9, 11),
        f"overlays/aws-us-east-1/quota.yaml {quota}": ("42", "43"),
        "overlays/aws-us-east-1/scaling.yaml ScaledObject/embed-l4.spec.maxReplicaCount": (5, 6),
        f"overlays/gcp-europe-west4/quota.yaml {quota}": ("44", "45"),
        "overlays/gcp-europe-west4/scaling.yaml ScaledObject/embed-l4.spec.maxReplicaCount": (5, 6),
    }
    scaled = {re.sub(r"^\S+ (\S+)\.spec.*\[(.*)\].*", r"\1 \2", path) for path in queries if "ScaledObject" in path}
    assert scaled == {
        f"ScaledObject/embed-{flavor} {name}" for flavor in ("l4", "t4") for name in ("offered", "backlog")
    }
    # Panels of the dashboard have what the available replicas of all flavors serve.
    assert {path.partition("[")[0] for path in queries if "ScaledObject" not in path} == {
        "components/monitoring/inferctl-embed.json None/.panels"
    }
    # The rate, the planned rate, and the maximum of the L4 in the queries of the T4.
    becomes = {"42000": "35000", "60000": "50000", "vector(9)": "vector(11)", "vector(5)": "vector(6)"}
    for first, second in queries.values():
        words = re.compile(r"vector\(\d+\)|\d+")
        assert words.sub(lambda match: becomes.get(match[0], match[0]), first) == second


def test_every_changed_line_names_the_receipt_or_has_a_changed_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comment that stays the same next to another number would name the wrong source."""
    monkeypatch.chdir(shutil.copytree(EXAMPLE, tmp_path / "example"))
    before = rendered(tmp_path / "before")
    old_seal = json.loads(Path("receipts/embed-l4.json").read_text())["seal"][:8]
    # The same rate, but another time: only the seal differs.
    data = json.loads(Path("receipts/embed-l4.json").read_text())
    data["created"] = "2026-11-21T09:00:00+00:00"
    new = receipt.write(
        Path("receipts/embed-l4.json"), {key: value for key, value in data.items() if key not in ("seal", "schema")}
    )
    after = rendered(tmp_path / "after")
    assert values(before) == values(after)
    for file in sorted(before.rglob("*.yaml")):
        changed = (after / file.relative_to(before)).read_text()
        assert file.read_text().replace(old_seal, new.seal[:8]) == changed
    assert any(old_seal in file.read_text() for file in before.rglob("*.yaml"))
