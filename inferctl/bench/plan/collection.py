"""Read a collection for retrieval: documents, queries and judgments in BEIR's layout, or documents alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from inferctl.core.errors import UsageError

# Documents alone have at most so many queries, spread over all documents.
MOST_WEAK = 1000
_LAYOUT = (
    'corpus.jsonl and queries.jsonl have lines like {"_id": "1", "title": "", "text": "..."}, '
    "qrels/test.tsv has query-id, corpus-id and score"
)


@dataclass(frozen=True)
class Collection:
    """Texts by id, and the grades of judged documents by query.

    `documents` and `queries` are sorted by id. Each query has a relevant one (a grade above 0). `weak`: queries are
    titles or first lines of documents, which do not contain them. `left_out` counts queries without a relevant
    document, `empty` documents without text.
    """

    name: str
    documents: dict[str, str]
    queries: dict[str, str]
    judgments: dict[str, dict[str, int]]
    weak: bool = False
    left_out: int = 0
    empty: int = 0

    @property
    def sha256(self) -> str:
        """The digest (hex) of ids, texts and grades. Equal digests mean that the same queries are measured."""
        return hashlib.sha256(json.dumps([self.documents, self.queries, self.judgments]).encode()).hexdigest()

    def as_dict(self) -> dict[str, object]:
        """Return what a receipt says of the collection, without its texts and ids."""
        kept = {key: getattr(self, key) for key in ("name", "sha256", "weak", "left_out", "empty")}
        judged = sum(len(grades) for grades in self.judgments.values())
        return kept | {"documents": len(self.documents), "queries": len(self.queries), "judgments": judged}


def read(folder: Path) -> Collection:
    """Return the collection in `folder`. Raises `UsageError` for a missing, empty or contradictory file."""
    parts = _texts(folder / "corpus.jsonl")
    known = [folder / "qrels" / "test.tsv", folder / "qrels.tsv"]
    weak = not any(each.exists() for each in (folder / "queries.jsonl", *known))
    if weak:
        documents, queries, grades, file = *_weak(parts), folder / "corpus.jsonl"
    else:
        # As BEIR and MTEB join them.
        documents = {key: f"{title} {text}".strip() for key, (title, text) in parts.items()}
        queries = {key: text for key, (_, text) in _texts(folder / "queries.jsonl").items()}
        file = next((each for each in known if each.exists()), known[0])
        grades = _grades(file, queries, documents)
    relevant = [key for key in sorted(grades) if max(grades[key].values()) > 0]
    if len(relevant) < 2:
        raise UsageError(
            f"{file} gives {len(relevant)} queries with a relevant document, at least 2 are needed",
            f"add judgments: {_LAYOUT}",
        )
    chosen = relevant[:: -(-len(relevant) // MOST_WEAK)] if weak else relevant
    texts = {key: text for key, text in sorted(documents.items()) if text}
    left_out, empty = len(queries) - len(chosen), len(documents) - len(texts)
    kept, judged = {key: queries[key] for key in chosen}, {key: dict(sorted(grades[key].items())) for key in chosen}
    return Collection(folder.resolve().name, texts, kept, judged, weak, left_out, empty)


def _weak(parts: dict[str, tuple[str, str]]) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]:
    """Return documents without their titles or, if they have none, without their first lines; these as queries; grades.

    A query has the id of its first document, and all documents with this title are relevant.
    """
    texts, ids = dict[str, str](), dict[str, str]()
    grades: dict[str, dict[str, int]] = {}
    for key, (title, text) in sorted(parts.items()):
        first, _, rest = (title, "", text) if title else text.partition("\n")
        texts[key] = rest.strip() or first
        if first and rest.strip():
            grades.setdefault(ids.setdefault(first.strip(), key), {})[key] = 1
    return texts, {key: query for query, key in ids.items()}, grades


def _texts(file: Path) -> dict[str, tuple[str, str]]:
    """Return title and text by id. Raises `UsageError`."""
    found: dict[str, tuple[str, str]] = {}
    for place, line in _lines(file):
        try:
            entry = json.loads(line)
            key, title, text = str(entry["_id"]), str(entry.get("title") or ""), entry["text"].strip()
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{place}: the line is not a text with an id", _LAYOUT) from None
        if key in found:
            raise UsageError(f"{place}: a second text has the id {key!r}", "give each text an id of its own")
        found[key] = title.strip(), text
    if not any(map(any, found.values())):
        raise UsageError(f"{file} has no texts", _LAYOUT)
    return found


def _grades(file: Path, queries: dict[str, str], documents: dict[str, str]) -> dict[str, dict[str, int]]:
    """Return the grades by query and document. Raises `UsageError`, also for ids that have no text."""
    grades: dict[str, dict[str, int]] = {}
    for number, (place, line) in enumerate(_lines(file)):
        try:
            query, document, score = line.split("\t")
            grade = int(score)
        except ValueError:
            if not number:  # the header, which some files lack
                continue
            raise UsageError(f"{place}: the line is not query-id, corpus-id and a whole score", _LAYOUT) from None
        if grades.setdefault(query, {}).setdefault(document, grade) != grade:
            raise UsageError(f"{place}: a second grade for {document!r} and the query {query!r}", "keep one of them")
        for kind, key, texts in (("query", query, queries), ("document", document, documents)):
            if key not in texts:
                raise UsageError(f"{place}: the judged {kind} {key!r} has no text", "add it, or remove the line")
    return grades


def _lines(file: Path) -> list[tuple[str, str]]:
    """Return the lines that are not blank, each with its place."""
    try:
        # splitlines() would also split at U+2028, which JSON strings may contain.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}", _LAYOUT) from None
    return [(f"{file}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
