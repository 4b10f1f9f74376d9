"""Validates Kubernetes objects without a cluster: strict schemas of a version, and CRD schemas with their CEL rules."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import cel
import jsonschema
import kubernetes_validate
import yaml

CRDS = Path(__file__).with_name("crds")
VERSIONS = tuple(f"1.{minor}" for minor in range(32, 38))
# Names of properties that are words of CEL.
_RESERVED = {"true", "false", "null", "in", "as", "break", "const", "continue", "else", "for", "function", "if"}
_RESERVED |= {"import", "let", "loop", "package", "namespace", "return", "var", "void", "while"}
# kustomization.yaml is read by kustomize, not by the API server.
_KUSTOMIZE = "kustomize.config.k8s.io"


def problems(found: Mapping[str, Any], version: str) -> list[str]:
    """Return what the API server of `version` would reject in an object, as far as schemas and CEL rules know it."""
    # Overlays share most objects, and kubernetes_validate reads its schema each time.
    key = version, repr(found)
    if key not in _found:
        _found[key] = _problems(found, version)
    return _found[key]


_found: dict[tuple[str, str], list[str]] = {}


def _problems(found: Mapping[str, Any], version: str) -> list[str]:
    group = str(found["apiVersion"]).rpartition("/")[0]
    name = f"{found['kind']} {found['metadata']['name']}"
    if (schema := custom_resources().get((found["apiVersion"], found["kind"]))) is not None:
        return [f"{name}: {problem}" for problem in _custom(schema, found)]
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
    """Return the schema of each custom resource by (apiVersion, kind)."""
    found = {}
    for file in sorted(CRDS.glob("*.yaml")):
        spec = yaml.safe_load(file.read_text())["spec"]
        for version in spec["versions"]:
            key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
            found[key] = version["schema"]["openAPIV3Schema"]
    return found


def _custom(schema: dict[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    value = _with_defaults(schema, copy.deepcopy(dict(found)))
    for error in jsonschema.Draft202012Validator(_strict(id(schema), schema)).iter_errors(value):
        yield f"{error.json_path}: {error.message}"
    yield from _rules(schema, value, "$")


_converted: dict[int, dict[str, Any]] = {}


def _strict(key: int, schema: dict[str, Any]) -> dict[str, Any]:
    if key not in _converted:
        _converted[key] = _json_schema(schema, root=True)
    return _converted[key]


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


def _with_defaults(schema: Mapping[str, Any], value: Any) -> Any:
    if isinstance(value, dict):
        for name, inner in schema.get("properties", {}).items():
            if name not in value and "default" in inner:
                value[name] = copy.deepcopy(inner["default"])
            if name in value:
                value[name] = _with_defaults(inner, value[name])
        extra = schema.get("additionalProperties")
        if isinstance(extra, dict):
            for name in value.keys() - schema.get("properties", {}).keys():
                value[name] = _with_defaults(extra, value[name])
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [_with_defaults(schema["items"], each) for each in value]
    return value


def _rules(schema: Mapping[str, Any], value: Any, path: str) -> Iterator[str]:
    """Evaluate the CEL rules of `schema` and of all its parts that `value` has."""
    for each in schema.get("x-kubernetes-validations", ()):
        rule = each["rule"]
        if "oldSelf" in rule:  # of updates only
            continue
        context = cel.Context(variables={"self": _escaped(value)}, functions={"find": _find})
        if cel.evaluate(rule, context) is not True:
            yield f"{path}: {each.get('message') or rule}"
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for name, inner in value.items():
            part = properties.get(name, schema.get("additionalProperties"))
            if isinstance(part, dict):
                yield from _rules(part, inner, f"{path}.{name}")
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, inner in enumerate(value):
            yield from _rules(schema["items"], inner, f"{path}[{index}]")


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {f"__{name}__" if name in _RESERVED else name: _escaped(inner) for name, inner in value.items()}
    return [_escaped(inner) for inner in value] if isinstance(value, list) else value


def _find(text: str, pattern: str) -> str:
    found = re.search(pattern, text)
    return found.group() if found else ""
