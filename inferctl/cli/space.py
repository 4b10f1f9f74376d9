"""`inferctl space`: show the names of vector spaces, and compare two of them."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from inferctl.cli import console, download, options
from inferctl.cli.options import Json
from inferctl.core import outputs
from inferctl.core.errors import InferctlError, NotReadyError, UsageError, needs_packages
from inferctl.models import image_source
from inferctl.models.model import is_hub_id, resolve_task

if TYPE_CHECKING:
    from inferctl.bench.judge.space_change import Vectors
    from inferctl.bench.measure.retrieval import RetrievalResult
    from inferctl.bench.plan.collection import Collection
    from inferctl.cli.bench_options import AccessOptions

_EXIT_CODES = {"not needed": 0, "re-embed": 1, "not enough evidence": 4}
_MOST_TEXTS, _READY_S, _NOT_REQUESTED = 1000, 900.0, "not requested"
_SOURCE_HELP = "Model folder, hub id, image, receipt, or URL of a server."
_Source = Annotated[str, typer.Argument(metavar="SOURCE", help=_SOURCE_HELP)]
_KeyVariable = Annotated[str | None, typer.Option(metavar="NAME", help="Send the API key in this variable to servers.")]
_SERVED_MODEL_HELP = "Read this model of a server or image. [default: the first it lists]"

app = options.group("space", "Show vector spaces, and how much a change of one matters.")

_DIFF_EPILOG = """\b
Examples:
  # Compare two model folders on your own texts
  inferctl space diff ./old ./new --texts texts.jsonl
  # Also measure how well each finds the relevant documents of judged queries
  inferctl space diff ./old ./new --retrieval ./collection
  # Compare two servers, such as of two versions of torch, and keep the record
  inferctl space diff http://10.0.0.7:8080 http://10.0.0.8:8080 --output record.json
"""


@app.command()
def show(
    source: _Source,
    api_key_env: _KeyVariable = None,
    served_model: Annotated[str | None, typer.Option(metavar="NAME", help=_SERVED_MODEL_HELP)] = None,
    as_json: Json = False,
) -> None:
    """Print the names of the spaces of a model.

    Example: inferctl space show ./all-MiniLM-L6-v2
    """
    from inferctl.cli.bench_options import AccessOptions

    found = _read(source, [], None, AccessOptions(api_key_env=api_key_env, served_model=served_model)).known
    if not found["spaces"]:
        raise UsageError(f"{source} names no space", "name an embedding model that inferctl serves")
    console.result(found, "\n".join(each["name"] for each in found["spaces"].values()), as_json=as_json)


@app.command(epilog=_DIFF_EPILOG)
def diff(
    old: Annotated[str, typer.Argument(metavar="OLD", help=_SOURCE_HELP)],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The same.")],
    texts: Annotated[
        str, typer.Option(metavar="FILE", help="Compare on at most 1,000 texts: .txt, or .jsonl with the key text.")
    ] = "mixed",
    least_kept: Annotated[
        float, typer.Option(metavar="PERCENT", min=1, max=100, help="Require this share of the neighbors to stay.")
    ] = 95,
    retrieval: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also measure nDCG@10 on this judged collection.")
    ] = None,
    definition: Annotated[bool, typer.Option("--definition", help="Compare definitions, and compute nothing.")] = False,
    api_key_env: _KeyVariable = None,
    served_model: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"{_SERVED_MODEL_HELP} Twice: of OLD, of NEW.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write the record of the comparison.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare two vector spaces, and say whether stored vectors must be embedded again.

    Exit code 0: not needed, 1: re-embed, 4: not enough evidence. It starts model folders, in fp32, and images on this
    machine. Receipts and other images have no vectors, so only their definitions are compared.
    """
    from inferctl.bench.plan import collection, workload
    from inferctl.cli.bench_options import AccessOptions
    from inferctl.receipts import receipt

    if output is not None:
        inputs = [Path(each) for each in (old, new, texts, retrieval) if each]
        outputs.check(output, "--output", parents=True, inputs=inputs)
    corpus, digest = workload.read_corpus(texts)
    # Drawn, since the order of a file may follow its topics or languages.
    unique = list(dict.fromkeys(corpus))
    probes = [] if definition else random.Random(0).sample(unique, min(_MOST_TEXTS, len(unique)))
    judged = collection.read(retrieval) if retrieval and not definition else None
    options_of = [AccessOptions(api_key_env=api_key_env, served_model=name) for name in served_model or (None,)]
    sides = (old, options_of[0]), (new, options_of[-1])
    try:
        # A wrong source, or other outputs, are found before anything is computed.
        one, other = (_read(source, [], None, access) for source, access in sides)
        spaces = one.known["spaces"], other.known["spaces"]
        computable = all(side.known["not_computed"] == _NOT_REQUESTED for side in (one, other))
        if probes and computable and (judged or not all(spaces) or spaces[0].keys() & spaces[1].keys()):
            one, other = (_read(source, probes, judged, access) for source, access in sides)
    except InferctlError as error:
        if error.exit_code != _EXIT_CODES["re-embed"]:
            raise
        raise NotReadyError(error.message, error.hint) from None  # a model that does not start is no verdict
    found = _compared(one, other, least_kept / 100) | {"retrieval": judged and _retrieval(one, other)}
    found |= {"schema": "inferctl.space-diff/1", "texts": {"name": Path(texts).name, "sha256": digest}}
    found = json.loads(json.dumps(found))
    found["seal"] = receipt.seal_of(found)
    if output is not None:
        outputs.write(output, json.dumps(found, indent=1, ensure_ascii=False) + "\n", "--output")
    console.result(found, _text(found), as_json=as_json)
    raise typer.Exit(_EXIT_CODES[found["verdict"]])


class _Side(NamedTuple):
    """What is known of a source. If it can compute them: the output and the vectors of texts, and the retrieval."""

    known: dict[str, Any]
    output: str = ""
    vectors: Vectors | None = None
    retrieval: RetrievalResult | None = None


def _read(source: str, texts: list[str], judged: Collection | None, access: AccessOptions) -> _Side:
    from inferctl.bench.measure import retrieval, space_vectors

    with _opened(source, access, bool(texts)) as (known, server):
        found: dict[str, Any] = {"source": source, "execution": {}, "not_computed": None if texts else _NOT_REQUESTED}
        if server is None:
            return _Side(found | known)
        found["spaces"] = (server.info.get("model") or {}).get("spaces") or {}
        found["execution"] = space_vectors.execution(server.info)
        if not texts:
            return _Side(found)
        with console.progress(f"embedding {len(texts):,} texts: {source}"):
            vectors = space_vectors.vectors(server, texts)
        if judged is None:
            return _Side(found, server.output, vectors)
        with needs_packages("`--retrieval`", "retrieval"), console.progress(f"embedding {judged.name}: {source}"):
            return _Side(found, server.output, vectors, retrieval.measure(server, judged, (), lambda _: None))


@contextlib.contextmanager
def _opened(source: str, access: AccessOptions, compute: bool) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield what a source says, and the server that computes it; None for one that cannot, or need not."""
    from inferctl.bench.load import child_server
    from inferctl.bench.load.target import connect
    from inferctl.reading import embedding_config, space

    if source.startswith(("http://", "https://")):
        yield {}, connect(source, access=access.access())
    elif Path(source).is_file():
        yield _of_file(Path(source)), None
    elif Path(source).is_dir() or image_source.is_image(source) or is_hub_id(source):
        folder = download.fetch(source, None)
        if (task := resolve_task("auto", folder, source)) != "embed":
            raise UsageError(f"{source} is a model for {task}, which has no vectors", "name a model for embeddings")
        if compute:
            console.note(f"starting {source} in fp32")
            with child_server.serve_folder(folder.path, "model", "fp32") as server:
                yield {}, server
        else:
            found = space.read(folder.path, embedding_config.read(folder.path))
            yield {"spaces": {output: each.described for output, each in found.items()}}, None
    elif source.startswith(("/", "./", "../", "~")):
        raise UsageError(f"{source} does not exist", "name a model folder, a hub id, an image, a receipt or a URL")
    else:
        with _image(source, compute, access) as opened:
            yield opened


def _of_file(path: Path) -> dict[str, Any]:
    """Return what a receipt of `inferctl embed` or `inferctl bench`, or `model.json`, says of spaces."""
    try:
        found = json.loads(path.read_bytes())
        spaces = found.get("spaces") or found["model"]["spaces"]
        precision = found.get("precision")
        known = {"spaces": {output: {**each, "name": str(each["name"])} for output, each in spaces.items()}}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise UsageError(f"{path} names no space", "name a receipt, a model folder, an image or a URL") from None
    precision = precision.get("effective") if isinstance(precision, dict) else precision
    return {**known, "execution": {"precision": precision}, "not_computed": "a receipt has no vectors"}


@contextlib.contextmanager
def _image(reference: str, compute: bool, access: AccessOptions) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield the names in the labels of an image, and its server if the image is on this machine."""
    from inferctl.bench.load.target import connect
    from inferctl.config import settings
    from inferctl.image import registry, replaced, serve_image
    from inferctl.image.docker import DockerEngine
    from inferctl.image.image_name import full_reference
    from inferctl.image.running_container import exit_error, free_port, wait_ready

    engine, image, why = None, None, "the image is not on this machine: `docker pull` it"
    reference = reference if reference.startswith("sha256:") else full_reference(reference)
    try:
        engine = DockerEngine.connect()
        if image := engine.image(reference):
            why = _NOT_REQUESTED
    except NotReadyError as error:
        why = error.message
    labels = image.labels if image else registry.remote_image(reference, "linux/amd64").labels
    models = replaced.spaces(labels)
    if not models:
        raise UsageError(f"{reference} has no label `io.inferctl.model.space`", "start it, and name its URL")
    model = "" if "" in models else access.served_model or next(iter(models))
    if model not in models:
        raise UsageError(f"{reference} has no model {model!r}", f"its models with vectors: {', '.join(models)}")
    if "io.inferctl.stack" not in labels:
        image, why = None, f"the image is a model without a server: name it `oci://{reference}`"
    if engine is None or image is None or not compute:
        known = {key: labels.get(f"io.inferctl.{key}") for key in ("stack", "precision", "version")}
        spaces = {name.partition("_")[0]: {"name": name, "definition": None} for name in models[model].split(",")}
        yield {"spaces": spaces, "execution": known, "not_computed": why}, None
        return
    console.note(f"starting {reference}")
    address = serve_image.Address("127.0.0.1", free_port())
    container, address = serve_image.start(engine, image, {}, address, console.note, environment=settings.OPEN_ACCESS)
    with container:
        if not wait_ready(container, (address.host, address.port), _READY_S):
            raise exit_error(container) or NotReadyError(f"the image was not ready after {_READY_S:.0f} s")
        yield {}, connect(f"http://{address.host}:{address.port}", access=access.access())


def _compared(old: _Side, new: _Side, least_kept: float) -> dict[str, Any]:
    """Return what differs between two sources, and the verdict, as JSON data."""
    from inferctl.bench.judge import space_change
    from inferctl.reading.space import differences

    spaces: dict[str, Any] = {}
    for output in (each for each in old.known["spaces"] if each in new.known["spaces"]):
        pair = [side.known["spaces"][output] for side in (old, new)]
        known = all(each.get("definition") for each in pair)
        differs = differences(*(each["definition"] for each in pair)) if known else None
        spaces[output] = {"names": [each["name"] for each in pair], "differs": differs}
    one, other = old.known["execution"], new.known["execution"]
    execution = {key: (one[key], other[key]) for key in one if one[key] and other.get(key) not in (None, one[key])}
    found: dict[str, Any] = {"old": old.known, "new": new.known, "spaces": spaces, "execution": execution}
    change = None
    if old.vectors and new.vectors and old.output == new.output:
        change = space_change.measure(old.vectors, new.vectors, least_kept)
    if change:
        measured = {"output": old.output, **asdict(change)}
        return {**found, "verdict": change.verdict, "reason": change.reason, "measured": measured}
    sides = (old.known, new.known)
    whys = [f"{side['source']}: {why}" for side in sides if (why := side["not_computed"]) not in (None, _NOT_REQUESTED)]
    whys = whys or (["too few texts, or other outputs"] if old.vectors else [])
    verdict, what = "not enough evidence", "the definitions differ"
    if not old.known["spaces"] or not new.known["spaces"]:
        what = "a source does not name its spaces"
    elif not spaces:
        verdict = "re-embed"
        what = f"no output is the same ({'; '.join(', '.join(side['spaces']) for side in sides)})"
    elif all(each["names"][0] == each["names"][1] for each in spaces.values()):
        verdict, what = "not needed", "the definitions are equal"
    why = f" ({'; '.join(whys)})" if whys else ""
    return {**found, "verdict": verdict, "reason": f"{what}; vectors were not compared{why}", "measured": None}


def _retrieval(old: _Side, new: _Side) -> dict[str, Any]:
    """Return nDCG@10 of both, each with its own queries and documents, and the verdict on their difference."""
    from inferctl.bench.judge import retrieval, verdict

    both = old.retrieval, new.retrieval
    if missing := [each.reason if each else "a source has no vectors" for each in both if not (each and each.variants)]:
        return {"reason": missing[0]}
    first, second = (each.variants[0] for each in both if each)
    change = retrieval.difference(first.per_query, second.per_query, retrieval.MARGIN, verdict.ERROR_RATE)
    values = [100 * each.ndcg_at_10 for each in (first, second)]
    return {"collection": both[0] and both[0].collection, "ndcg_at_10": values, "difference": asdict(change)}


def _text(found: Mapping[str, Any]) -> str:
    lines = []
    for output, each in found["spaces"].items():
        old, new = each["names"]
        lines.append(f"{output}: {old}, equal definitions" if old == new else f"{output}: {old} -> {new}")
        lines += [f"  {part}: {_values(*pair)}" for part, pair in (each["differs"] or {}).items()]
    lines += [f"{name}: {a} -> {b}" for name, (a, b) in found["execution"].items()]
    if measured := found["measured"]:
        if measured["cosine_min"] is not None:
            figures = f"lowest {measured['cosine_min']:.6f}, median {measured['cosine_median']:.6f}"
            lines.append(f"cosine of old and new on {measured['texts']:,} texts: {figures}")
        again = measured["reembedded"]
        share = f"{again['value']:.1%} ({again['low']:.1%} to {again['high']:.1%})"
        lines.append(f"neighbors kept if all is embedded again: {share}")
    if judged := found["retrieval"]:
        lines.append(_retrieval_text(judged))
    return "\n".join(map(console.plain, [*lines, f"{found['verdict']}: {found['reason']}"]))


def _values(*pair: Any) -> str:
    """Return two values from shortly before where they differ, 40 characters of each."""
    texts = [json.dumps(each, ensure_ascii=False) for each in pair]
    differs = (place for place, (one, other) in enumerate(zip(*texts, strict=False)) if one != other)
    start = max(0, next(differs, 0) - 10)
    shown = ("…" * bool(start) + text[start : start + 40] + "…" * (len(text) > start + 40) for text in texts)
    return " -> ".join(shown)


def _retrieval_text(judged: Mapping[str, Any]) -> str:
    if "difference" not in judged:
        return f"nDCG@10 was not measured: {judged['reason']}"
    (old, new), change, of = judged["ndcg_at_10"], judged["difference"], judged["collection"]
    interval = f"change {change['points']:+.1f} ({change['low']:+.1f} to {change['high']:+.1f}), {change['outcome']}"
    queries = f"{of['queries']:,} {'weak ' if of['weak'] else ''}queries of {of['name']}"
    return f"nDCG@10 if all is embedded again: {old:.1f} to {new:.1f} points, {interval} ({queries})"
