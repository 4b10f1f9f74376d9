"""Remove from CRDs what the tests do not read: `python tests/deploy/crds/strip.py FILE...`.

These are descriptions, and the status of objects, which only a controller writes, with the columns that show it.
"""

import sys
from pathlib import Path
from typing import Any

import yaml


def stripped(value: Any) -> Any:
    """Return `value` without descriptions. A property with this name has a schema, which is no text."""
    if isinstance(value, dict):
        return {key: stripped(each) for key, each in value.items() if key != "description" or isinstance(each, dict)}
    return [stripped(each) for each in value] if isinstance(value, list) else value


for file in map(Path, sys.argv[1:]):
    found = stripped(yaml.safe_load(file.read_text()))
    for version in found["spec"]["versions"]:
        version["schema"]["openAPIV3Schema"]["properties"].pop("status", None)
        version.pop("additionalPrinterColumns", None)
    file.write_text(yaml.safe_dump(found, sort_keys=False, width=120))
