"""Remove the descriptions from CRDs: `python tests/deploy/crds/strip.py FILE...`. Nothing in the tests reads them."""

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
    file.write_text(yaml.safe_dump(stripped(yaml.safe_load(file.read_text())), sort_keys=False, width=120))
