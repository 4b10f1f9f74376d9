"""Shell completion, through the protocol that the installed scripts speak."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.processes import execute, python

PROGRAM = [sys.executable, "-m", "inferctl"]

VALUES = {
    "inferctl ch": {"check"},
    "inferctl check --hardware ": {"all", "t4", "a100-40gb-mig-3g.20gb"},
    "inferctl check --precision b": {"bf16"},
    "inferctl init --hardware l": {"l4", "l40s"},
    "inferctl init --base ": {"cpu", "cuda13.0"},
    "inferctl init --ci ": {"github", "gitlab"},
    "inferctl render --base cuda": {"cuda12.8", "cuda13.0"},
    "inferctl build --platform linux/amd64,": {"linux/amd64,linux/arm64"},
    "inferctl lock --base c": {"cpu", "cuda13.0"},
    "inferctl serve -p ": {"auto", "fp32", "fp16", "bf16", "int8"},
    "inferctl serve --log ": {"text", "json"},
    "inferctl bench --plan ": {"quick", "precision", "search"},
    "inferctl bench --corpus ": {"short", "paragraphs", "mixed"},
    "inferctl estimate --hardware t4,a100-40gb-s": {"t4,a100-40gb-sxm"},
    "inferctl compare A B --format ": {"text", "markdown", "json", "junit"},
    "inferctl compare A B --metric p": {"p50", "p90", "p99"},
    "inferctl compare A B --allow ": {"precision", "hardware"},
    "inferctl catalog hardware h100": {"h100-sxm"},
    "inferctl catalog bases ": {"cpu", "cuda13.0"},
    "inferctl catalog stacks ": {"torch2.13-cu130"},
}
# Completes each line of the list on stdin. The lists of values are in place only if a shell requests them at the start.
COMPLETE = """
import contextlib, io, json, os, sys
from inferctl import cli
found = {}
for line in json.load(sys.stdin):
    os.environ.update(COMP_WORDS=line, COMP_CWORD=str(line.count(" ")))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            cli.run([])
        except SystemExit as ended:
            assert ended.code == 0
    found[line] = out.getvalue().split()
print(json.dumps(found))
"""


def test_values_are_offered(tmp_path: Path) -> None:
    done = python(
        "-c",
        COMPLETE,
        env={**os.environ, "_INFERCTL_COMPLETE": "complete_bash"},
        cwd=tmp_path,
        input=json.dumps(list(VALUES)),
    )
    assert (done.returncode, done.stderr) == (0, "")
    offered = json.loads(done.stdout)
    for line, among in VALUES.items():
        found = offered[line]
        assert among <= set(found), line
        assert len(found) == len(set(found)), line
        assert all(value.startswith(line.split(" ")[-1]) for value in found), line


def test_bash_completes_with_the_script_that_it_gets(tmp_path: Path) -> None:
    program = tmp_path / "inferctl"
    program.write_text(f'#!/bin/sh\nexec {" ".join(PROGRAM)} "$@"\n')
    program.chmod(0o755)
    script = """
    eval "$(_INFERCTL_COMPLETE=source_bash inferctl)"
    COMP_WORDS=(inferctl bench --plan qu) COMP_CWORD=3
    _inferctl_completion inferctl
    echo "${COMPREPLY[@]}"
    """
    path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = execute("bash", "-c", script, env=path)
    assert (done.returncode, done.stdout) == (0, "quick\n"), done.stderr
