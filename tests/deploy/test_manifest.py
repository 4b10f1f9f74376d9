"""Objects as YAML: text stays text, and each note is in the line of its value."""

from __future__ import annotations

import importlib.util
import re
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inferctl.deploy import manifest
from inferctl.deploy.figure import Noted
from tests.deploy.conftest import objects

# Text that YAML 1.1 or 1.2 could read as something else, and text that cannot be on one line.
HARD = ["on", "y", "12", "1e3", "0x10", "12:30", "1_000", "null", "~", "", "true", ".5", "-1", "2026-11-27", "a: b"]
HARD += ["#x", "a #b", "*", "a\nb\n", "a ", " a", "{x}", "- a", "plain", "[a", "'", '"', "%d", "@x", "1.35", "off"]
HARD += ["=", "<<", "a\n\n", "\n", " a\nb", "a\n b \n", "a\rb\n", "\t", "a\u2028b\nc", "a\x85b", "\U0001f680", "\x07"]
HARD += ["x " * 4000, "---", "--- a\n---\nb", "a\n# b\n", "\ufeffa", "?", "? a", "!a", "&a", "a:", "|", ">"]


def noted(value: Any) -> Any:
    """Return `value` with a note on each text and integer."""
    if isinstance(value, dict):
        return {key: noted(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [noted(inner) for inner in value]
    return Noted(value, f"note: # of\n {value!r}") if isinstance(value, int | str) else value


TEXTS = st.sampled_from(HARD) | st.text(st.sampled_from(string.printable + "\x85\u2028é\U0001f680"), max_size=8)
SCALARS = TEXTS | st.integers() | st.booleans() | st.none() | st.sampled_from([0.5, 1e-7, 1e20])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))


@settings(deadline=None)
@given(st.dictionaries(TEXTS, VALUES, max_size=4))
@example({"values": HARD, **dict.fromkeys(HARD, 1)})
def test_a_reader_gets_the_values_with_and_without_notes(value: dict[str, Any]) -> None:
    for written in (value, noted(value)):
        assert manifest.plain(written) == value
        assert list(yaml.load_all(manifest.dump([written, written]), yaml.CSafeLoader)) == [value, value]


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3))
def test_each_note_is_in_the_line_of_its_value(value: dict[str, Any]) -> None:
    counted: list[str] = []

    def with_count(inner: Any) -> Any:
        if isinstance(inner, dict):
            return {key: with_count(each) for key, each in inner.items()}
        if isinstance(inner, list):
            return [with_count(each) for each in inner]
        counted.append(f"word{len(counted)}")
        return Noted(counted[-1], f"note of {counted[-1]}.")

    text = manifest.dump([with_count(value)])
    assert re.findall(r"(word\d+) # note of (\w+)\.$", text, re.MULTILINE) == [(word, word) for word in counted]


def test_pyyaml_without_libyaml_writes_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(yaml, "CSafeDumper")
    monkeypatch.delattr(yaml, "CSafeLoader")
    specification = importlib.util.find_spec(manifest.__name__)
    assert specification and specification.loader
    without = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(without)
    assert issubclass(without._Dumper, yaml.SafeDumper)
    value = {"values": noted(HARD), **dict.fromkeys(HARD, Noted(1, "one"))}
    assert list(yaml.safe_load_all(without.dump([value]))) == [manifest.plain(value)]


def test_kustomize_reads_the_same_text(tmp_path: Path) -> None:
    # kustomize writes these without quotes, and PyYAML reads something else.
    not_for_pyyaml = ("=", "<<", "a\x85b")
    texts = {f"key{number}": text for number, text in enumerate(HARD) if text not in not_for_pyyaml}
    written = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": noted(texts)}
    (tmp_path / "a.yaml").write_text(manifest.dump([written]))
    (tmp_path / "kustomization.yaml").write_text(manifest.dump([{"resources": ["a.yaml"]}]))
    (found,) = objects(tmp_path)
    assert found["data"] == texts
