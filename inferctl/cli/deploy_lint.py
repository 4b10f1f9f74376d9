"""`inferctl deploy --lint`: findings about Kubernetes manifests, as text and JSON."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inferctl.cli import console
from inferctl.core import document
from inferctl.core.errors import InferctlError, SpecError, UsageError
from inferctl.manifests import lint, manifests_file, versions
from inferctl.manifests.lint import LintFinding
from inferctl.manifests.manifests_file import KUSTOMIZATIONS, Located, kustomization
from inferctl.manifests.preview import overlays

_STDIN = "-"
_HELM = "`helm template CHART | inferctl deploy --lint -`"
_MOST_NAMES = 5
# A place where a template has an expression and YAML has a value. In the text of alerts, expressions follow words.
_TEMPLATE = re.compile(r"^[ \t]*(?:- )?(?:[\w./-]+: +)?\{\{", re.MULTILINE)


def run(paths: Sequence[Path], *, version: str | None, as_json: bool) -> None:
    """Print the findings about the manifests in `paths`; raise `InferctlError` (exit code 1) if one is an error."""
    minor = versions.minor_of(versions.tested(version)) if version else versions.OLDEST_SUPPORTED
    left_out: list[str] = []
    groups = _read(paths, left_out)
    found = {finding: None for objects in groups for finding in lint.lint(objects, minor)}
    findings, count = list(found), sum(map(len, groups))
    unread = lint.unread([each for objects in groups for each in objects])
    if as_json:
        console.document({**_document(count, findings, minor), "unread": unread, "left_out": left_out})
    else:
        for finding in findings:
            console.data(_text(finding))
        if unread:
            kinds = ", ".join(f"{number} {kind}" for kind, number in unread.items())
            console.note(console.plain(f"the pods of these objects are not checked: {kinds}"))
        if left_out:
            names = ", ".join(left_out[:_MOST_NAMES])
            more = f" and {len(left_out) - _MOST_NAMES:,} more" if len(left_out) > _MOST_NAMES else ""
            console.note(console.plain(f"left out, because these are no Kubernetes objects: {names}{more}"))
        assumed = "" if version else " (the oldest with updates; pass `--kubernetes-version` for another)"
        console.note(f"{_summary(findings)} in {count} objects, for Kubernetes 1.{minor}{assumed}")
    errors = sum(finding.level == "error" for finding in findings)
    if errors:
        raise InferctlError(
            f"{errors} of the findings {'is an error' if errors == 1 else 'are errors'}",
            "fix them, or annotate an object with `inferctl.io/lint-ignore: RULE` and say why in a comment",
        )


def _read(paths: Sequence[Path], left_out: list[str]) -> list[list[Located]]:
    """Return the objects that belong together: all of `paths`, with a kustomize tree once for each of its overlays.

    Adds the places of what is no object to `left_out`.
    """
    common: list[Located] = []
    overlays: list[list[Located]] = []
    for path in paths:
        if str(path) == _STDIN:
            common += manifests_file.parse(_standard_input(), "stdin", left_out)
        elif folders := _overlays(path / "overlays"):
            overlays += [_built(folder) for folder in folders]
        elif folder := manifests_file.built_from(path):
            common += _built(folder)
        else:
            common += _objects(path, left_out)
    groups = [[*common, *overlay] for overlay in overlays] or [common]
    if not any(groups):
        raise UsageError(
            f"no Kubernetes objects in {', '.join(map(str, paths))}",
            f"pass files that `kubectl apply` accepts; of charts, pass the output: {_HELM}",
        )
    return groups


def _objects(path: Path, left_out: list[str]) -> list[Located]:
    """Return the objects of a file or a folder. Raises `UsageError` for a chart of Helm: its files are templates."""
    if (path / "Chart.yaml").is_file():
        raise UsageError(f"{path} is a chart of Helm: its files are templates, not Kubernetes objects", f"run {_HELM}")
    try:
        return manifests_file.read([path], left_out)
    except SpecError as error:
        if error.file and _TEMPLATE.search(Path(error.file).read_text(encoding="utf-8", errors="replace")):
            error.hint = f"if this is a template of Helm, run {_HELM}"
        raise


def _standard_input() -> str:
    hint = "pipe YAML or JSON, such as the output of `helm template`"
    try:
        text = sys.stdin.read(document.MAX_MANIFEST_BYTES + 1)
    except UnicodeDecodeError as error:
        raise UsageError(f"the standard input cannot be read: byte {error.start} is not UTF-8", hint) from None
    if len(text) > document.MAX_MANIFEST_BYTES:
        raise UsageError(f"the standard input is larger than {document.MAX_MANIFEST_BYTES:,} bytes", hint)
    return text


def _overlays(folder: Path) -> list[Path]:
    """Return the folders in `folder` that kustomize builds: one for each overlay, which may be in groups."""
    found = []
    for each in sorted(folder.iterdir()) if folder.is_dir() else ():
        below = sorted({file.parent for name in KUSTOMIZATIONS for file in each.rglob(name)})
        found += [each] if kustomization(each) else below
    return found


def _built(folder: Path) -> list[Located]:
    """Return the objects that kustomize builds. They are in no file, so they have no lines."""
    return [Located(each.data, str(kustomization(folder) or folder)) for each in overlays.build(folder)]


def _text(finding: LintFinding) -> str:
    place = f"{finding.file}:{finding.line}: " if finding.line else f"{finding.file}: " if finding.file else ""
    return "\n".join(
        # Names in the manifests of others may have what a terminal obeys.
        console.plain(line)
        for line in (
            f"{place}{finding.level} [{finding.rule}] {finding.object} {finding.field}",
            f"    {finding.what}",
            f"    lesson: {finding.lesson}",
            f"    what goes wrong: {finding.consequence}",
            f"    fix: {finding.fix}",
        )
    )


def _summary(findings: Sequence[LintFinding]) -> str:
    counts = Counter(finding.level for finding in findings)
    return ", ".join(
        f"{counts[level]} {level}{'' if counts[level] == 1 else 's'}" for level in ("error", "warning", "note")
    )


def _document(count: int, findings: Sequence[LintFinding], minor: int) -> dict[str, Any]:
    counts = Counter(finding.level for finding in findings)
    return {
        "kubernetes": f"1.{minor}",
        "objects": count,
        "errors": counts["error"],
        "warnings": counts["warning"],
        "notes": counts["note"],
        "findings": [vars(finding) for finding in findings],
    }
