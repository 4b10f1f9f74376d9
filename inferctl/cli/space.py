"""`inferctl space`: show the names of vector spaces, and compare two of them."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inferctl.cli import console, download, options
from inferctl.cli.options import Json
from inferctl.core import outputs
from inferctl.core.errors import NotReadyError, UsageError
from inferctl.models import image_source
from inferctl.models import model as model_folder
from inferctl.models.model import is_hub_id

if TYPE_CHECKING:
    from inferctl.bench.judge.space_change import SpaceChange, Vectors
    from inferctl.bench.load.http_json import ServerAccess
    from inferctl.bench.load.target import ServerConnection
    from inferctl.image.docker import DockerEngine
    from inferctl.image.records import ImageInfo

SCHEMA = "inferctl.space-diff/1"
_SOURCE_HELP = "Model folder, hub id, image, receipt, or URL of a server."
_EXIT_CODES = {"not needed": 0, "re-embed": 1, "not enough evidence": 4}
_READY_S = 900.0

app = options.group("space", "Show vector spaces, and how much a change of one matters.")

_DIFF_EPILOG = """\b
Examples:
  # Compare two model folders on your own texts
  inferctl space diff ./old ./new --texts texts.jsonl
  # Compare two servers, such as of two versions of torch, and keep the record
  inferctl space diff http://10.0.0.7:8080 http://10.0.0.8:8080 --output record.json
  # Compare only what defines the spaces
  inferctl space diff vectors/receipt.json registry.example.com/ml/minilm:v2 --definition
"""


@dataclass
class _Side:
    """What is known of a source. `definitions`: by output, None if only the name is known.

    `vectors`: None if they were not computed, for the reason `why`. `output`: the one that was computed.
    """

    source: str
    names: dict[str, str] = field(default_factory=dict)
    definitions: dict[str, Any] = field(default_factory=dict)
    execution: dict[str, Any] = field(default_factory=dict)
    output: str = ""
    vectors: Vectors | None = None
    why: str = ""

    def add(self, spaces: Mapping[str, Any]) -> None:
        """Add spaces as `GET /info` and receipts have them."""
        for output, each in spaces.items():
            self.names[output], self.definitions[output] = str(each["name"]), each.get("definition")

    def add_names(self, listed: str) -> None:
        """Add the names of a label."""
        self.names |= {name.partition("_")[0]: name for name in filter(None, listed.split(","))}

    def document(self) -> dict[str, Any]:
        """Return the source as JSON data."""
        spaces = {each: {"name": name, "definition": self.definitions.get(each)} for each, name in self.names.items()}
        return {"source": self.source, "spaces": spaces, "execution": self.execution, "not_computed": self.why or None}


@app.command()
def show(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=_SOURCE_HELP)],
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Send the API key in this variable to a server.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the names of the spaces of a model.

    Example: inferctl space show ./all-MiniLM-L6-v2
    """
    side = _Reader(_access(api_key_env)).read(source)
    console.result(side.document(), "\n".join(side.names.values()), as_json=as_json)


@app.command(epilog=_DIFF_EPILOG)
def diff(
    old: Annotated[str, typer.Argument(metavar="OLD", help=_SOURCE_HELP)],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The same, of the space that replaces it.")],
    texts: Annotated[
        str,
        typer.Option(metavar="FILE", help="Compare on these texts: .txt, one per line, or .jsonl with the key text."),
    ] = "mixed",
    most: Annotated[int, typer.Option("--most", metavar="N", min=1, help="Use the first N distinct texts.")] = 500,
    least_kept: Annotated[
        float,
        typer.Option(metavar="PERCENT", min=1, max=100, help="Require this share of the nearest neighbors to stay."),
    ] = 95,
    definition: Annotated[
        bool, typer.Option("--definition", help="Compare only the definitions, and compute nothing.")
    ] = False,
    precision: Annotated[str, options.precision_option("Serve model folders in this precision.")] = "auto",
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Send the API key in this variable to servers.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write the record of the comparison.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare two vector spaces, and say whether stored vectors must be embedded again.

    Exit code 0: not needed, 1: re-embed, 4: not enough evidence. Model folders and images on this machine are started,
    one after the other. Receipts and images elsewhere are compared by their definition only.
    """
    from inferctl.bench.plan import workload
    from inferctl.receipts import receipt

    if output is not None:
        outputs.check(output, "--output", parents=True)
    found, digest = workload.read_corpus(texts)
    probes = [] if definition else list(dict.fromkeys(found))[:most]
    reader = _Reader(_access(api_key_env), probes, precision)
    sides = reader.read(old), reader.read(new)
    document = _compared(*sides, least_kept / 100)
    if document["measured"]:
        document["texts"] = {"source": texts if texts == "mixed" else Path(texts).name, "sha256": digest}
    document = {"schema": SCHEMA, "created": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"), **document}
    document["seal"] = receipt.seal_of(json.loads(json.dumps(document)))
    if output is not None:
        outputs.write(output, json.dumps(document, indent=1, ensure_ascii=False) + "\n", "--output")
    console.result(document, _text(document), as_json=as_json)
    raise typer.Exit(_EXIT_CODES[document["verdict"]])


def _access(api_key_env: str | None) -> ServerAccess:
    from inferctl.cli.bench_options import AccessOptions

    return AccessOptions(api_key_env=api_key_env).access()


@dataclass
class _Reader:
    """Reads sources. Without `texts`, it computes nothing."""

    access: ServerAccess
    texts: list[str] = field(default_factory=list)
    precision: str = "auto"

    def read(self, source: str) -> _Side:
        """Return what is known of a source, and its vectors. Raises `InferctlError`."""
        if source.startswith(("http://", "https://")):
            return self._of_server(source)
        path = Path(source)
        if path.is_file():
            return _of_file(path)
        if path.is_dir() or image_source.is_image(source) or is_hub_id(source):
            return self._of_folder(source)
        return self._of_image(source)

    def _of_server(self, url: str) -> _Side:
        from inferctl.bench.load.target import connect

        return self._computed(_Side(url), connect(url, access=self.access))

    def _of_folder(self, source: str) -> _Side:
        from inferctl.bench.load import child_server
        from inferctl.reading import embedding_config, space

        folder = model_folder.find(source) if Path(source).is_dir() else download.fetch(source, None)
        if (task := model_folder.resolve_task("auto", folder, source)) != "embed":
            raise UsageError(f"{source} is a model for {task}, which has no vectors", "name a model for embeddings")
        side = _Side(source)
        if self.texts:
            starting = child_server.serve_folder(folder.path, "model", self.precision)
            with console.progress(f"starting {source}"), starting as server:
                return self._computed(side, server)
        found = space.read(folder.path, embedding_config.read(folder.path))
        side.add({output: each.described for output, each in found.items()})
        return side

    def _of_image(self, reference: str) -> _Side:
        from inferctl.image import registry
        from inferctl.image.docker import DockerEngine
        from inferctl.image.image_name import full_reference

        side, reference = _Side(reference), full_reference(reference)
        try:
            engine = DockerEngine.connect()
            image, side.why = engine.image(reference), "the image is not on this machine"
        except NotReadyError as error:
            image, side.why = None, error.message
        labels = image.labels if image else registry.remote_image(reference, "linux/amd64").labels
        side.add_names(labels.get("io.inferctl.model.space", ""))
        if not side.names:
            raise UsageError(f"{reference} has no label `io.inferctl.model.space`", "name a server of it: its URL")
        stack = {"stack": labels.get("io.inferctl.stack"), "precision": labels.get("io.inferctl.precision")}
        side.execution = {**stack, "inferctl": labels.get("io.inferctl.version")}
        if image is None or not self.texts:
            return side
        if labels.get("io.inferctl.model.weights", "bake") == "mount":
            side.why = "the image has no weights of its own"
            return side
        with console.progress(f"starting {reference}"), _container(engine, image) as server:
            side.why = ""
            return self._computed(side, server)

    def _computed(self, side: _Side, server: ServerConnection) -> _Side:
        from inferctl.bench.measure import space_vectors

        side.add((server.info.get("model") or {}).get("spaces") or {})
        side.execution = {**side.execution, **space_vectors.execution(server.info)}
        if self.texts:
            with console.progress(f"embedding {len(self.texts):,} texts with {side.source}"):
                side.output, side.vectors = server.output, space_vectors.vectors(server, self.texts)
        return side


def _of_file(path: Path) -> _Side:
    """Return what a receipt of `inferctl embed` or `inferctl bench` says, or `model.json`."""
    try:
        document = json.loads(path.read_bytes())
        model = document.get("model")
        spaces = document.get("spaces") or (model.get("spaces") if isinstance(model, dict) else None) or {}
        precision = document.get("precision")
        side = _Side(str(path), why="a receipt has no vectors")
        side.add(spaces)
        side.execution = {"precision": precision.get("effective") if isinstance(precision, dict) else precision}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise UsageError(f"{path} is not a receipt", "name a receipt of `inferctl embed` or `inferctl bench`") from None
    if not side.names:
        raise UsageError(f"{path} names no space", "an earlier version wrote it: name the model or a server instead")
    return side


@contextlib.contextmanager
def _container(engine: DockerEngine, image: ImageInfo) -> Iterator[ServerConnection]:
    """Start an image, and yield the connection to its server. Raises `InferctlError`."""
    from inferctl.bench.load.target import connect
    from inferctl.config import settings
    from inferctl.image import serve_image
    from inferctl.image.running_container import exit_error, free_port, wait_ready

    address = serve_image.Address("127.0.0.1", free_port())
    container, address = serve_image.start(engine, image, {}, address, console.note, environment=settings.OPEN_ACCESS)
    with container:
        if not wait_ready(container, (address.host, address.port), _READY_S):
            raise exit_error(container) or NotReadyError(f"the image was not ready after {_READY_S:.0f} s")
        yield connect(f"http://{address.host}:{address.port}")


def _compared(old: _Side, new: _Side, least_kept: float) -> dict[str, Any]:
    """Return what differs between two sources, and the verdict, as JSON data."""
    from inferctl.bench.judge import space_change
    from inferctl.reading import space

    common = [output for output in old.names if output in new.names]
    spaces = {
        each: {
            "names": [old.names[each], new.names[each]],
            "differs": space.differences(old.definitions[each], new.definitions[each])
            if old.definitions.get(each) and new.definitions.get(each)
            else None,
        }
        for each in common
    }
    keys = [key for key, value in old.execution.items() if value and new.execution.get(key)]
    execution = {key: (old.execution[key], new.execution[key]) for key in keys}
    found: dict[str, Any] = {
        "old": old.document(),
        "new": new.document(),
        "spaces": spaces,
        "execution": {key: each for key, each in execution.items() if each[0] != each[1]},
    }
    output = (old.output if old.output == new.output else "") or next(iter(common), "")
    change: SpaceChange | None = None
    if old.vectors and new.vectors and old.output == new.output:
        change = space_change.measure(old.vectors, new.vectors, least_kept)
    if change:
        return {**found, "output": output, "measured": asdict(change), **_verdict(change.verdict, change.reason)}
    sides = [f"{side.source}: {side.why}" for side in (old, new) if side.why]
    why = "; ".join(sides) or ("too few texts" if old.vectors else "not requested")
    found |= {"output": output or None, "measured": None}
    if not output:
        return {**found, **_verdict("re-embed", "the two have no output in common")}
    if old.names.get(output) and old.names[output] == new.names.get(output):
        return {**found, **_verdict("not needed", f"the definitions are equal; vectors were not compared ({why})")}
    return {
        **found,
        **_verdict("not enough evidence", f"the definitions differ, and vectors were not compared ({why})"),
    }


def _verdict(verdict: str, reason: str) -> dict[str, str]:
    return {"verdict": verdict, "reason": reason}


def _text(document: Mapping[str, Any]) -> str:
    lines = []
    for output, each in document["spaces"].items():
        old, new = each["names"]
        lines.append(f"{output}: {old}, equal definitions" if old == new else f"{output}: {old} -> {new}")
        lines += [f"  {part}: {_short(a)} -> {_short(b)}" for part, (a, b) in (each["differs"] or {}).items()]
        if each["differs"] is None and old != new:
            lines.append("  what differs is not known: one side has no definition")
    if document["execution"]:
        lines.append("execution: " + ", ".join(f"{key} {a} -> {b}" for key, (a, b) in document["execution"].items()))
    if found := document["measured"]:
        lines.append(f"measured on {found['texts']:,} texts, output {document['output']}:")
        if found["cosine_min"] is not None:
            lines.append(
                f"  cosine of old and new: lowest {found['cosine_min']:.6f}, median {found['cosine_median']:.6f}"
            )
        for key, title in (("mixed", "neighbors kept in a mixed store"), ("reembedded", "after embedding all again")):
            if share := found[key]:
                lines.append(f"  {title}: {share['value']:.1%} ({share['low']:.1%} to {share['high']:.1%})")
    lines.append(f"{document['verdict']}: {document['reason']}")
    return "\n".join(map(console.plain, lines))


def _short(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:39]}…"
