"""Measure retrieval and speed of real models on two judged collections of packages: `make demo-retrieval`.

    python benchmarks/demo_retrieval.py models/all-MiniLM-L6-v2 models/splade-tiny [--json FILE]

- faq: 503 questions and answers in English, one relevant answer each. Swedish Construction FAQ by Zaragoza AB, CC BY
  4.0. A company wrote it, and it has near duplicates.
- arxiv: 314 papers as queries, and tags as documents. Data of semanlink.net and of arXiv without a stated license, so
  it is downloaded and not kept here.

No package has a cross-encoder with weights, so MiniLM with one vector per token is the reranker. It was not trained for
that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fetch_model import pip


def write(
    folder: Path, documents: Mapping[str, str], queries: Mapping[str, str], judged: Iterable[tuple[str, str]]
) -> None:
    """Write a collection in BEIR's layout; each judged pair of query and document has the grade 1."""
    folder.joinpath("qrels").mkdir(parents=True)
    for name, texts in (("corpus", documents), ("queries", queries)):
        lines = (json.dumps({"_id": key, "title": "", "text": text}) for key, text in texts.items())
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pairs = [("query-id", "corpus-id", "score"), *((query, document, "1") for query, document in judged)]
    (folder / "qrels" / "test.tsv").write_text("".join("\t".join(pair) + "\n" for pair in pairs), encoding="utf-8")


def faq(folder: Path, work: Path) -> None:
    """Write the questions and answers."""
    pip("download", "--dest", str(work), "zaragoza-construction-faq==1.2.1")
    (wheel,) = work.glob("zaragoza*.whl")
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read("zaragoza_construction_faq/data/faq-en.jsonl").decode().splitlines()
    entries = {row["id"]: row for row in map(json.loads, lines)}
    answers, questions = ({key: row[part] for key, row in entries.items()} for part in "aq")
    write(folder, answers, questions, ((key, key) for key in entries))


def arxiv(folder: Path, work: Path) -> None:
    """Write papers (title and abstract) and tags (labels, labels of the tags above them, and comment)."""
    pip("download", "--no-binary", ":all:", "--dest", str(work), "cherche==2.2.1")
    with tarfile.open(work / "cherche-2.2.1.tar.gz") as archive:
        papers, tags = (
            json.load(archive.extractfile(f"cherche-2.2.1/cherche/data/semanlink/{name}.json"))  # type: ignore[arg-type]
            for name in ("arxiv", "tags")
        )
    used = sorted({tag for paper in papers for tag in paper["tag"]})
    parts = ("prefLabel", "altLabel", "broader_prefLabel", "broader_altLabel")
    labels = {
        tag: " ".join([*(word for part in parts for word in tags[tag].get(part, ())), tags[tag]["comment"]])
        for tag in used
    }
    queries = {paper["document"]: f"{paper['arxiv_title']} {paper['arxiv_summary']}" for paper in papers}
    write(
        folder, labels, queries, ((paper["document"], tag) for paper in papers for tag in dict.fromkeys(paper["tag"]))
    )


def static(folder: Path, work: Path) -> Path:
    """Write the table and the tokenizer of wordllama as a StaticEmbedding model of sentence-transformers."""
    pip("download", "--dest", str(work), "wordllama==0.4.0.post1")
    (wheel,) = work.glob("wordllama*.whl")
    (folder / "0_StaticEmbedding").mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for source, name in (
            ("wordllama/weights/l2_supercat_256.safetensors", "model.safetensors"),
            ("wordllama/tokenizers/l2_supercat_tokenizer_config.json", "tokenizer.json"),
        ):
            (folder / "0_StaticEmbedding" / name).write_bytes(archive.read(source))
    return _modules(folder, "0_StaticEmbedding", "static_embedding.StaticEmbedding")


def late_interaction(folder: Path, model: Path) -> Path:
    """Write MiniLM as a model with one vector per token: its states, normalized."""
    shutil.copytree(model, folder, copy_function=os.link)
    settings = folder / "config_sentence_transformers.json"
    settings.unlink(missing_ok=True)
    settings.write_text(json.dumps({"model_type": "MultiVectorEncoder"}))
    (folder / "modules.json").unlink()
    (folder / "1_Normalize").mkdir()
    (folder / "1_Normalize" / "config.json").write_text(json.dumps({"module_input_name": "token_embeddings"}))
    return _modules(folder, "", "transformer.Transformer")


def _modules(folder: Path, path: str, first: str) -> Path:
    kinds = ((path, first), ("1_Normalize", "normalize.Normalize"))
    package = "sentence_transformers.base.modules"
    modules = [
        {"idx": number, "name": str(number), "path": place, "type": f"{package}.{kind}"}
        for number, (place, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def measured(collection: Path, work: Path, *options: str) -> dict[str, Any]:
    """Run a benchmark, and return its findings, rows of retrieval and speeds."""
    line = ["bench", "--plan", "quick", "--retrieval", str(collection), "--output", str(work / "results"), *options]
    done = subprocess.run([sys.executable, "-m", "inferctl", *line, "--json"], stdout=subprocess.PIPE, check=False)
    result = json.loads(done.stdout or "null") or sys.exit(done.returncode)
    speeds = {row["configuration"]: row.get("requests_per_s") for row in result["rows"]}
    cautions = [caveat["text"] for caveat in result["caveats"]]
    kept = {key: result[key] for key in ("findings", "retrieval")}
    return {**kept, "requests_per_s": speeds, "cautions": cautions, "report": result["report"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("sparse", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    work, found = Path(tempfile.mkdtemp(prefix="inferctl-retrieval-")), dict[str, dict[str, Any]]()
    tokens = late_interaction(work / "MiniLM-tokens", options.dense)
    models = [options.dense, static(work / "wordllama", work), options.sparse, tokens]
    precisions = ["-m", str(options.dense), *(f"-p{name}" for name in ("fp32", "fp16", "bf16", "int8"))]
    for name, make in (("faq", faq), ("arxiv", arxiv)):
        make(work / name, work)
        found[f"{name}, precisions"] = measured(work / name, work, *precisions)
        sources = [f"--model={model}" for model in models]
        found[f"{name}, models"] = measured(work / name, work, *sources, "-pfp32", "--rerank", str(tokens))
        for part in list(found)[-2:]:
            print(f"{part}: {found[part].pop('report')}", *found[part]["findings"], sep="\n  ", flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
