"""A small image with a server and a reference in plain Python that agree, or fail on request."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from platform import machine
from typing import Any

from inferctl.config.spec import Spec
from inferctl.facts import catalog
from inferctl.image import build as builds
from inferctl.image.build import Built
from inferctl.image.docker import DockerEngine
from inferctl.image.events import Event
from inferctl.image.plan import BuildOptions, BuildPlan
from inferctl.image.render import Rendered

PYTHON = "/usr/local/bin/python3.11"
# Value of the label `test` of all images and containers of a test, so that tests can run in parallel and clean up.
mark = uuid.uuid4().hex
VECTORS = """
import base64, hashlib, struct

def vector(text):
    raw = [b - 127.5 for b in hashlib.sha256(text.encode()).digest()]
    length = sum(x * x for x in raw) ** 0.5
    return [x / length for x in raw]

def score(query, text):
    return sum(a * b for a, b in zip(vector(query), vector(text)))

def tokens(text):
    # A prompt as token ids, and for each token after the first the log-probabilities of three tokens.
    ids = list(text.encode())[:40]
    rows = []
    for token in ids[1:]:
        best = {token: -1.2, (token + 1) % 256: -1.0, (token + 2) % 256: -2.0}
        rows.append(best)
    return ids, rows

def packed(numbers):
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
"""
SERVER = """
import http.server, json, os, signal, sys
from inferctl.vectors import packed, score, tokens, vector

how = os.environ["BEHAVIOUR"]
print("tiny server:", how, flush=True)
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
if how == "dies":
    sys.exit("there is no such model")
if how == "locked" and os.environ.get("INFERCTL_ACCESS_KEYS") != "null":
    sys.exit("the key file is missing")
if how == "forbidden":
    open("/model/config.json")
if how == "hungry":
    hoard = []
    while True:
        hoard.append(bytearray(10_000_000))
port = int(sys.argv[sys.argv.index("--port") + 1] if "--port" in sys.argv else os.environ["INFERCTL_SERVE_PORT"])

class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, value, code=200):
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
    def do_GET(self):
        if self.path == "/readyz":
            return self.answer({}, 503 if how == "slow" else 200)
        model = {"sha256": "other" if how == "swapped" else "tiny"}
        task = next((task for task in ("rerank", "generate") if how.startswith(task)), "embed")
        if task == "embed":
            model["dimensions"] = 32
        precision = {"effective": "bf16", "level": "native"}
        self.answer({"name": "tiny", "task": task, "model": model, "precision": precision,
                     "device": {"kind": "cpu", "name": "tiny cpu"}})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/v1/rerank":
            scores = [score(body["query"], t) for t in body["documents"]]
            scores[1] += {"rerank-far": 0.05, "rerank-nan": float("nan")}.get(how, 0)
            results = [{"index": i, "relevance_score": s} for i, s in enumerate(scores)]
            return self.answer({"results": results[how == "rerank-short":]})
        if self.path.endswith("completions"):
            chat = "chat" in self.path
            ids, rows = tokens(json.dumps(body["messages"]) if chat else body["prompt"])
            if how == "generate-tokenizer":
                ids, rows = ids[:-1], rows[:-1]
            if how == "generate-template" and chat:
                ids = [7, *ids[1:]]
            shift = 3.0 if how == "generate-far" else 0.0
            found = [None, *({str(t): {"logprob": -1.25 - shift if t == i else v} for t, v in row.items()}
                             for i, row in zip(ids[1:], rows))]
            if how == "generate-silent":
                found = None
            choice = {"text": "x"} if chat else {"text": "x", "prompt_logprobs": found, "prompt_token_ids": ids}
            answer = {"choices": [choice]}
            return self.answer(answer | {"prompt_logprobs": found, "prompt_token_ids": ids} if chat else answer)
        texts = body["input"]
        if how == "refuses":
            return self.answer({"error": {"message": "no thanks"}}, 422)
        found = [vector(t) for t in texts]
        if how == "nan":
            found[3][0] = float("nan")
        if how == "far":
            found[5] = found[5][::-1]
        if how == "short":
            found[2] = found[2][:-1]
        self.answer({"data": [{"index": i, "embedding": packed(v)} for i, v in enumerate(found)]})

http.server.ThreadingHTTPServer(("0.0.0.0", port), Handler).serve_forever()
"""
REFERENCE = """
import json, os, sys
from inferctl.vectors import packed, score, tokens, vector
given = json.load(sys.stdin)
if sys.argv[-1] == "generate":
    if os.environ["BEHAVIOUR"] == "generate-awq":
        sys.exit(print("error: the fp32 reference cannot read weights in awq", file=sys.stderr) or 2)
    texts = []
    for text in given:
        ids, rows = tokens(text if isinstance(text, str) else json.dumps(text))
        texts.append({"ids": ids, "logprobs": [row[i] for i, row in zip(ids[1:], rows)],
                      "top_ids": [list(row) for row in rows], "top_logprobs": [list(row.values()) for row in rows]})
    output = {"texts": texts}
elif isinstance(given[0], list):
    output = {"scores": [score(query, text) for query, text in given]}
else:
    output = {"dimensions": 32, "embeddings": [packed(vector(text)) for text in given]}
print(json.dumps({"model_sha256": "tiny", **output}))
"""


def rendered(base: str, behaviour: str = "works", extra: str = "", user: str = "10001:10001") -> Rendered:
    dockerfile = f"""FROM {base}
RUN echo preparing > /prepared
{extra}
COPY --link app /app
ENV PYTHONPATH=/app INFERCTL_SERVE_PORT=8080 BEHAVIOUR={behaviour} PYTHONDONTWRITEBYTECODE=1
LABEL test={mark} io.inferctl.version=0 io.inferctl.model.weights=bake
USER {user}
ENTRYPOINT ["{PYTHON}", "-m", "inferctl"]
CMD ["serve"]
"""
    files = {
        "app/inferctl/__init__.py": b"",
        "app/inferctl/__main__.py": SERVER.encode(),
        "app/inferctl/vectors.py": VECTORS.encode(),
        "app/inferctl/serve/__init__.py": b"",
        "app/inferctl/serve/reference.py": REFERENCE.encode(),
    }
    return Rendered(dockerfile, "", files, {}, (), {}, {})


def build(image: Rendered, name: str, context: Path) -> None:
    """Build an image as `name`, without `inferctl build`. `context`: a folder for its files."""
    for path, content in {"Dockerfile": image.dockerfile.encode(), **image.files}.items():
        (context / path).parent.mkdir(parents=True, exist_ok=True)
        (context / path).write_bytes(content)
    subprocess.run(["docker", "buildx", "build", "--quiet", "--load", "-t", name, context], check=True)


def plan(image: Rendered, options: BuildOptions | None = None, name: str | None = None) -> BuildPlan:
    """Return a plan for `image` with a unique name."""
    platform = {"aarch64": "linux/arm64", "arm64": "linux/arm64"}.get(machine(), "linux/amd64")
    model = {"source": "./tiny", "weights": "bake"}
    spec = Spec.model_validate({"name": "tiny", "model": model, "image": {"platform": platform}})
    return BuildPlan(
        references=(name or f"inferctl-test/{uuid.uuid4().hex[:12]}:x",),
        spec=spec,
        base=catalog.base("cpu"),
        stack=catalog.stack(catalog.base("cpu").stack),
        tasks={"tiny": "auto"},
        rendered=image,
        server_files={},
        folders={},
        findings=(),
        options=options or BuildOptions(ready_seconds=60.0),
    )


def with_options(made: BuildPlan, **changes: object) -> BuildPlan:
    return replace(made, options=replace(made.options, **changes))  # type: ignore[arg-type]


def drained(running: Generator[Any, None, Any]) -> tuple[list[Any], Any]:
    """Return what a generator yields, and what it returns."""
    found: list[Any] = []
    while True:
        try:
            found.append(next(running))
        except StopIteration as end:
            return found, end.value


def run(docker: DockerEngine, made: BuildPlan) -> tuple[list[Event], Built]:
    with closing(builds.run(made, docker, docker.info())) as running:
        return drained(running)


def created(*command: str) -> list[str]:
    """Return the ids of the containers or images of the test, including untagged ones."""
    line = ["docker", *command, "--quiet", "--filter", f"label=test={mark}"]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()


def remove_images() -> None:
    for image in set(created("images", "--no-trunc")):
        subprocess.run(["docker", "image", "rm", "--force", image], capture_output=True, check=False)
