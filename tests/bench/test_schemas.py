"""The schemas in docs/schemas describe the documents that the commands write."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from bench_samples import SHORT_PLAN, document, sealed
from test_search import Simulated

from inferctl import cli
from inferctl.bench.judge import goodput
from inferctl.bench.plan import sections
from inferctl.bench.report import rows

SCHEMAS = Path(__file__).resolve().parents[2] / "docs" / "schemas"
RECEIPTS = sorted((SCHEMAS.parent / "examples" / "kubernetes" / "receipts").glob("*.json"))


def schema(name: str) -> Any:
    found = json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(found)
    return found


def unknown_keys(described: dict[str, Any], value: Any, root: dict[str, Any], path: str = "") -> Iterator[str]:
    """Yield the keys of a document that its schema does not describe, where it describes any."""
    described = root["$defs"][described["$ref"].rpartition("/")[2]] if "$ref" in described else described
    if isinstance(value, dict) and "properties" in described and described.get("additionalProperties") is not True:
        for key, inner in value.items():
            if key not in described["properties"]:
                yield f"{path}.{key}"
            else:
                yield from unknown_keys(described["properties"][key], inner, root, f"{path}.{key}")
    if isinstance(value, list) and "items" in described:
        for inner in value:
            yield from unknown_keys(described["items"], inner, root, f"{path}[]")


def check(name: str, value: Any) -> None:
    found = schema(name)
    jsonschema.Draft202012Validator(found).validate(value)
    assert sorted(set(unknown_keys(found, value, found))) == []


def test_documents_of_a_benchmark_match_their_schemas(
    answering: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = [f"--url={name}={answering('--median-ms', '5')}" for name in ("old", "new")]
    assert cli.run(["bench", *targets, "--plan", SHORT_PLAN, "--output", str(tmp_path / "results"), "--json"]) == 0
    (folder,) = (tmp_path / "results").iterdir()
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "result.json").read_text())
    check("bench", json.loads((folder / "result.json").read_text()))
    receipts = [folder / "receipts" / f"{name}.json" for name in ("old", "new")]
    for receipt in receipts:
        check("receipt", json.loads(receipt.read_text()))
    cli.run(["compare", *map(str, receipts), "--format", "json"])
    check("compare", json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("file", RECEIPTS, ids=lambda file: file.stem)
def test_sample_receipts_match_the_schema(file: Path) -> None:
    check("receipt", json.loads(file.read_text(encoding="utf-8")))


def test_the_result_of_a_search_matches_the_schema(tmp_path: Path) -> None:
    settings = sections.Search.model_validate({"budget_s": 600})
    found = goodput.find(settings, 80, 100.0, Simulated(80, refuses_from=80))
    (receipt,) = sealed(tmp_path, document("bf16", 100, 10, search=json.loads(json.dumps(found))))
    assert found["probes"]
    check("receipt", receipt.data)


def test_each_key_of_a_row_is_described() -> None:
    keys = {field.name for field in dataclasses.fields(rows.MeasuredRow)}
    assert keys == set(schema("bench")["properties"]["rows"]["items"]["properties"])
