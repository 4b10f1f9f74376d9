"""How close a server's vectors are to fp32 ones of the same weights, computed by `inferctl.serve.reference` in a process of its own."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from inferctl import model as models
from inferctl.bench.load.target import Target
from inferctl.bench.plan import workload
from inferctl.bench.plan.plan import Quality
from inferctl.bench.stats import rank
from inferctl.errors import InferctlError

PROGRAM = "inferctl.serve.reference"
NEIGHBOURS = 10
_BATCH = 16

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Reference:
    """fp32 vectors of `texts`, shape (n, dimensions), from the model folder with the digest `model_sha256`; `corpus_sha256` is that of the
    file that the texts are from, where they are from one."""

    texts: list[str]
    vectors: Matrix
    model_sha256: str
    corpus_sha256: str | None = None


class Checker:
    """Compares servers with the fp32 reference of the folder `model`, which is computed once for each input limit that a server states.

    `limits` None: the plan asks for no check; `model` None: there are no weights to compare with. The reference's process works in
    `folder` (None: in this one), so that a bench that goes on finds what a killed one left. `failed`: whether there was no reference to compare
    the last server with, because it could not be computed; a later bench may be able to.
    """

    def __init__(self, limits: Quality | None, model: Path | None, folder: Path | None = None) -> None:
        self._limits = limits
        self._folder = folder
        self._model = models.ModelFolder(model) if model else None
        self._known: dict[int | None, Reference | str] = {}
        self.failed = False

    def __call__(self, target: Target, waiting: Callable[[float], None]) -> dict[str, Any]:
        """The quality entry of a receipt. A server that fails at this is broken, not unchecked; `waiting` hears the seconds passed."""
        self.failed = False
        if self._limits is None:
            return unchecked("the plan asks for no quality check")
        if self._model is None:
            return unchecked("no local model folder was given to compare with")
        served = (target.info.get("model") or {}).get("sha256")
        if not served:
            return unchecked("the server does not say which weights it has")
        if served != self._model.digest:
            return unchecked(f"the server's weights ({served[:12]}…) are not those of the local folder")
        longest = (target.info.get("limits") or {}).get("max_input_tokens")
        if longest not in self._known:
            self._known[longest] = self._reference(self._model.path, self._limits, longest, waiting)
        expected = self._known[longest]
        if isinstance(expected, str):
            self.failed = True
            return unchecked(expected)
        try:
            return check(target, expected, self._limits)
        except InferctlError as error:
            return broken(error.message)

    def _reference(
        self, model: Path, limits: Quality, longest: int | None, waiting: Callable[[float], None]
    ) -> Reference | str:
        """The vectors to compare with, or why there are none."""
        texts, digest = workload.read_corpus(limits.corpus)
        try:
            found = reference(model, texts[: limits.texts], longest, waiting, self._folder)
            return replace(found, corpus_sha256=digest)
        except InferctlError as error:
            return error.message


def reference(
    model: Path,
    texts: list[str],
    max_input_tokens: int | None,
    waiting: Callable[[float], None],
    folder: Path | None = None,
) -> Reference:
    """Compute the reference in a process of its own that works in `folder`, with inputs cut where the server cuts them; `waiting` is called
    with the seconds passed.

    Raises `InferctlError` when it fails.
    """
    limit = ["--max-input-tokens", str(max_input_tokens)] if max_input_tokens else []
    arguments = [sys.executable, "-m", PROGRAM, str(model.resolve()), *limit]
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as complaint:
        given.write(json.dumps(texts).encode())
        given.seek(0)
        process = subprocess.Popen(
            arguments, stdin=given, stdout=answer, stderr=complaint, cwd=folder, start_new_session=True
        )
        try:
            passed = 0.0
            while process.poll() is None:
                waiting(passed)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
                passed += 0.5
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        answer.seek(0)
        complaint.seek(0)
        if process.returncode:
            raise InferctlError(
                f"the fp32 reference could not be computed: {_reason(complaint.read().decode(errors='replace'))}"
            )
        document = json.loads(answer.read())
    rows = [np.frombuffer(base64.b64decode(text), "<f4") for text in document["embeddings"]]
    return Reference(texts, np.stack(rows), str(document["model_sha256"]))


def check(target: Target, expected: Reference, limits: Quality) -> dict[str, Any]:
    """Embed the reference's texts on `target` and compare. Raises `InferctlError` when the server fails or answers no usable vectors."""
    rows: list[Sequence[float]] = []
    for start in range(0, len(expected.texts), _BATCH):
        rows += target.embed(expected.texts[start : start + _BATCH])
    size = expected.vectors.shape[1]
    if odd := [len(row) for row in rows if len(row) != size]:
        raise InferctlError(f"the server answered vectors of {odd[0]} dimensions, the reference has {size}")
    with np.errstate(over="ignore"):
        found = np.asarray(rows, np.float32)
    if not np.isfinite(found).all():
        raise InferctlError("the server answered vectors that are not finite")
    if not found.any(axis=1).all():
        raise InferctlError("the server answered vectors that are all zeros")
    return compare(expected.vectors, found, limits) | {"corpus_sha256": expected.corpus_sha256}


def compare(expected: Matrix, found: Matrix, limits: Quality) -> dict[str, Any]:
    """Cosine of each pair of rows, and how many of each text's ten nearest neighbours are the same; shapes (n, dimensions)."""
    cosine = np.sort(np.sum(_unit(expected) * _unit(found), axis=1))
    recall = recall_at(expected, found, NEIGHBOURS)
    p1 = float(cosine[rank(len(cosine), 0.01) - 1])
    return {
        "checked": True,
        "texts": len(expected),
        "cosine": {"mean": round(float(cosine.mean()), 8), "p1": round(p1, 8), "min": round(float(cosine[0]), 8)},
        "recall_at_10": round(recall, 4),
        "limits": {"cosine_p1": limits.min_cosine_p1, "recall_at_10": limits.min_recall},
        "passes": p1 >= limits.min_cosine_p1 and recall >= limits.min_recall,
    }


def unchecked(reason: str) -> dict[str, Any]:
    """The quality entry of a receipt whose vectors were not compared."""
    return {"checked": False, "reason": reason}


def broken(reason: str) -> dict[str, Any]:
    """The quality entry of a receipt whose server gave no vectors that could be compared: it fails."""
    return {"checked": True, "passes": False, "reason": reason}


def recall_at(expected: Matrix, found: Matrix, k: int) -> float:
    """Mean share of each row's k nearest other rows (by cosine, among `expected`) that are among its k nearest among `found`."""
    near, got = _nearest(expected, k), _nearest(found, k)
    return float(np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(near.tolist(), got.tolist(), strict=True)]))


def _nearest(vectors: Matrix, k: int) -> npt.NDArray[np.intp]:
    unit = _unit(vectors)
    likeness = unit @ unit.T
    np.fill_diagonal(likeness, -np.inf)
    return np.argsort(-likeness, axis=1, kind="stable")[:, : min(k, len(vectors) - 1)]


def _unit(vectors: Matrix) -> npt.NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    unit: npt.NDArray[np.float64] = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return unit


def _reason(complaint: str) -> str:
    lines = [line for line in complaint.splitlines() if line.strip()]
    return next(
        (line.removeprefix("error: ") for line in lines if line.startswith("error:")),
        lines[-1] if lines else "no message",
    )
