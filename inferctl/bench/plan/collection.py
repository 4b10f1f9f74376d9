"""Read a collection for retrieval: documents, queries and judgments in BEIR's layout, or documents alone."""

from __future__ import annotations

import csv
import hashlib
import io
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

    `documents` and `queries` are sorted by id. Each query has a relevant document (a grade above 0). `weak`: the queries
    are titles or first lines of documents, which do not contain them. `left_out` counts queries without a relevant
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
    documents = _texts(folder / "corpus.jsonl")
    name = folder.resolve().name
    if not (folder / "queries.jsonl").exists():
        return _weak(name, documents)
    queries = {key: _joined(title, text) for key, (title, text) in _texts(folder / "queries.jsonl").items()}
    known = [folder / "qrels" / "test.tsv", folder / "qrels.tsv"]
    file = next((each for each in known if each.exists()), known[0])
    grades = _grades(file, queries, documents)
    judgments = {key: dict(sorted(grades[key].items())) for key in sorted(grades) if max(grades[key].values()) > 0}
    if len(judgments) < 2:
        raise UsageError(f"{file} has no two queries with a score above 0", f"add judgments: {_LAYOUT}")
    texts = {key: _joined(*parts) for key, parts in sorted(documents.items()) if any(parts)}
    asked = {key: queries[key] for key in judgments}
    left_out, empty = len(queries) - len(asked), len(documents) - len(texts)
    return Collection(name, texts, asked, judgments, left_out=left_out, empty=empty)


def _weak(name: str, documents: dict[str, tuple[str, str]]) -> Collection:
    """Return documents without their titles or, if they have none, without their first lines: these are the queries."""
    texts: dict[str, str] = {}
    relevant: dict[str, dict[str, int]] = {}
    for key, (title, text) in sorted(documents.items()):
        first, _, rest = (title, "", text) if title else text.partition("\n")
        texts[key] = rest.strip() or first
        if first and rest.strip():
            relevant.setdefault(first.strip(), {})[key] = 1
    if len(relevant) < 2:
        raise UsageError(
            f"no two documents of {name} have a title or several lines, of which a query can be made",
            f"add queries and judgments: {_LAYOUT}",
        )
    chosen = list(relevant.items())[:: -(-len(relevant) // MOST_WEAK)]
    queries = {next(iter(grades)): query for query, grades in chosen}
    judgments = {next(iter(grades)): grades for _, grades in chosen}
    texts = {key: text for key, text in texts.items() if text}
    left_out, empty = len(relevant) - len(chosen), len(documents) - len(texts)
    return Collection(name, texts, queries, judgments, True, left_out, empty)


def _joined(title: str, text: str) -> str:
    """Return title and text as BEIR and MTEB join them."""
    return f"{title} {text}".strip()


def _texts(file: Path) -> dict[str, tuple[str, str]]:
    """Return title and text by id. Raises `UsageError`."""
    found: dict[str, tuple[str, str]] = {}
    for number, line in enumerate(_content(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            key, *parts = (
                str(entry[name] or "") for name in ("_id", "title", "text") if name != "title" or name in entry
            )
        except (ValueError, RecursionError, KeyError, TypeError):
            raise UsageError(f"{file}:{number}: the line is not a text with an id", _LAYOUT) from None
        if key in found:
            raise UsageError(f"{file}:{number}: a second text has the id {key!r}", "give each text an id of its own")
        found[key] = (parts[0].strip() if len(parts) > 1 else "", parts[-1].strip())
    if not any(any(parts) for parts in found.values()):
        raise UsageError(f"{file} has no texts", _LAYOUT)
    return found


def _grades(file: Path, queries: dict[str, str], documents: dict[str, tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Return the grades by query and document. Raises `UsageError`, also for ids that have no text."""
    grades: dict[str, dict[str, int]] = {}
    for number, row in enumerate(csv.reader(io.StringIO(_content(file)), delimiter="\t", quoting=csv.QUOTE_NONE), 1):
        if number == 1 or not row:  # the header
            continue
        try:
            query, document, grade = row[0], row[1], int(row[2])
        except (ValueError, IndexError):
            raise UsageError(
                f"{file}:{number}: the line is not query-id, corpus-id and a whole score", _LAYOUT
            ) from None
        for kind, key, texts in (("query", query, queries), ("document", document, documents)):
            if key not in texts:
                raise UsageError(
                    f"{file}:{number}: the judged {kind} {key!r} has no text", "add it, or remove the line"
                )
        grades.setdefault(query, {})[document] = grade
    return grades


def _content(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}", _LAYOUT) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8: {error.reason}", "convert the file, for example with `iconv`") from None
