"""Validates Kubernetes objects without a cluster: strict schemas of a version, the schemas of CRDs, and the lint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from inferctl.manifests.lint import lint
from inferctl.manifests.manifests_file import Located

CRDS = Path(__file__).with_name("crds")
VERSIONS = tuple(f"1.{minor}" for minor in range(32, 38))
# kustomization.yaml is read by kustomize, not by the API server.
_KUSTOMIZE = "kustomize.config.k8s.io"


def problems(found: Mapping[str, Any], version: str) -> list[str]:
    """Return what the API server of `version` would reject in an object, as far as schemas know it."""
    # Overlays share most objects, and kubernetes_validate reads its schema each time.
    key = version, repr(found)
    if key not in _found:
        _found[key] = _problems(found, version)
    return _found[key]


def lint_findings(built: Iterable[dict[str, Any]], version: str) -> list[str]:
    """Return what the lint finds in the objects of a folder."""
    found = lint([Located(each) for each in built], int(version.removeprefix("1.")))
    return [f"{each.rule} {each.object} {each.field}: {each.what}" for each in found]


_found: dict[tuple[str, str], list[str]] = {}


def _problems(found: Mapping[str, Any], version: str) -> list[str]:
    group = str(found["apiVersion"]).rpartition("/")[0]
    name = f"{found['kind']} {found['metadata']['name']}"
    if (schema := custom_resources().get((found["apiVersion"], found["kind"]))) is not None:
        errors = jsonschema.Draft202012Validator(schema).iter_errors(dict(found))
        return [f"{name}: {error.json_path}: {error.message}" for error in errors]
    if "." in group and not group.endswith(".k8s.io") and group != _KUSTOMIZE:
        return [f"{name}: no schema for {found['apiVersion']}"]
    try:
        kubernetes_validate.validate(dict(found), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{name}: {'.'.join(map(str, error.path))}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError:
        return [f"{name}: no schema for {found['apiVersion']} {found['kind']} in {version}"]
    return []


@cache
def custom_resources() -> dict[tuple[str, str], dict[str, Any]]:
    """Return the JSON Schema of each custom resource by (apiVersion, kind)."""
    found = {}
    for file in sorted(CRDS.glob("*.yaml")):
        spec = yaml.safe_load(file.read_text())["spec"]
        for version in spec["versions"]:
            key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
            found[key] = _json_schema(version["schema"]["openAPIV3Schema"], root=True)
    return found


def _json_schema(schema: Any, root: bool = False) -> Any:
    """Return a structural schema of Kubernetes as JSON Schema that accepts no unknown fields."""
    if isinstance(schema, list):
        return [_json_schema(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {}
    for key, value in schema.items():
        if key in ("properties", "additionalProperties", "patternProperties") and isinstance(value, dict):
            named = key != "additionalProperties"
            found[key] = {name: _json_schema(each) for name, each in value.items()} if named else _json_schema(value)
        elif key in ("items", "not", "allOf", "anyOf", "oneOf"):
            found[key] = _json_schema(value)
        elif not key.startswith("x-") and key not in ("description", "format", "default", "example"):
            found[key] = value
    if schema.get("x-kubernetes-int-or-string"):
        found["type"] = ["integer", "string"]
    if schema.get("nullable") and "type" in found:
        found["type"] = [found["type"], "null"]
    open_object = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if "properties" in schema and not open_object and "type" in schema:
        found["additionalProperties"] = False
        if root:  # the schema of the metadata is that of Kubernetes itself
            found["properties"]["metadata"] = {"type": "object"}
    return found
