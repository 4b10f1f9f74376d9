"""Mistakes of users, bad files and words: each ends at once with its exit code, an error and a hint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inferctl import cli
from inferctl.core.errors import Problem, SpecError
from inferctl.receipts import receipt

SPEC = "name: m\nmodel: {source: org/m}\n"
PLAN = "name: p\nconfigurations: [{name: a, precision: fp32}]\n"
CONFIG = '{"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "max_position_embeddings": 512}'
DEEP = "[" * 100_000
BENCH = "bench --url a=http://127.0.0.1:9"
Content = str | bytes


def sealed(**data: Any) -> str:
    document = {"schema": receipt.SCHEMA, **data}
    return json.dumps({**document, "seal": receipt.seal_of(document)})


SPECS: dict[str, Content] = {
    "empty": "",
    "not yaml": "name: [m\n",
    "many mistakes": "nmae: m\nmodel:\n  source: org/m\n  weights: baked\nserve: {precision: bf61}\nhardware: [a100]\n",
    "key twice": SPEC + "name: n\n",
    "unknown base": SPEC + "image: {base: cuda12.9}\n",
    "revision with a space": "name: m\nmodel: {source: org/m, revision: a b}\n",
    "latin-1": "name: m\n# caf\xe9\nmodel: {source: org/m}\n".encode("latin-1"),
    "nul": b"name: m\x00\n",
    "program": b"\x7fELF\x02\x01\x01\x00" + bytes(range(256)),
    "yes as a name": "name: yes\nmodel: {source: org/m}\n",
    "float as a port": SPEC + "serve: {port: 1e3}\n",
    "number of 5000 digits": SPEC + "serve: {port: " + "9" * 5000 + "}\n",
    "not a number": SPEC + "slo: {p99_ms: .nan}\n",
    "name with a space": "name: my model\nmodel: {source: org/m}\n",
    "two documents": f"{SPEC}---\n{SPEC}",
    "python tag": 'name: !!python/object/apply:os.system ["id"]\n',
    "number as a key": f"1: x\n{SPEC}",
    "list as a key": "? [a, b]\n: c\n",
    "merge of a number": SPEC + "<<: 1\n",
    "alias without anchor": SPEC + "image: *x\n",
    "bad base64": SPEC + "slo: !!binary x\n",
    "text as int": SPEC + "serve: {port: !!int abc}\n",
    "null model": "name: m\nmodel: null\n",
    "empty source": "name: m\nmodel: {source: ''}\n",
    "half a surrogate": 'name: "\\ud800"\nmodel: {source: org/m}\n',
    "registry in upper case": SPEC + "image: {repository: MyOrg/m}\n",
    "repository with a tag": SPEC + "image: {repository: org/m:1}\n",
    "negative size": SPEC + "cache: {size: -1GB}\n",
    "10,000 unknown keys": SPEC + "".join(f"k{number}: 1\n" for number in range(10_000)),
}
PLANS: dict[str, Content] = {
    "empty": "",
    "keys that a URL cannot apply": "name: mine\nconfigurations: [{name: a, precision: fp32, corpus: short}]\n",
    "list": "- a\n",
    "rate of nan": PLAN + "load: {mode: open, rate: .nan}\n",
    "endless stage": PLAN + "load: {stages: [{duration_s: .inf, rate: 1}]}\n",
    "1001 stages": PLAN + "load: {stages: [" + "{duration_s: 1, rate: 1}," * 1001 + "]}\n",
    "latin-1": b"name: p\xe9\n",
    "folder as a corpus": PLAN + "corpus: ./\n",
    "unknown hardware": PLAN + "hardware: [nope]\n",
    "seed of 5000 digits": PLAN + "seed: " + "9" * 5000 + "\n",
}
CORPORA: dict[str, Content] = {
    "empty": "",
    "blank lines": "\n\n",
    "not json": "{x\n",
    "list": "[1]\n",
    "binary": bytes(range(256)),
    "deep": DEEP,
}
CONFIGS: dict[str, Content] = {
    "empty": "",
    "not json": "{x",
    "list": "[]",
    "deep": DEEP,
    "latin-1": b'{"a": "\xe9"}',
    "infinity": "1e999",
    "text as sizes": '{"model_type": "bert", "hidden_size": "x", "num_hidden_layers": null}',
    "negative sizes": '{"model_type": "bert", "hidden_size": -1, "num_hidden_layers": -6}',
    "no layers": '{"model_type": "bert", "hidden_size": 0, "num_hidden_layers": 0}',
}
RECEIPTS: dict[str, tuple[int, Content]] = {
    "empty": (2, ""),
    "not json": (2, "x"),
    "null": (2, "null"),
    "list": (2, "[]"),
    "binary": (2, bytes(range(256))),
    "deep": (2, DEEP),
    "number of 5000 digits": (2, '{"schema": "inferctl.receipt/1", "x": ' + "9" * 5000 + "}"),
    "nan": (2, '{"schema": "inferctl.receipt/1", "x": NaN, "seal": "x"}'),
    "other schema": (2, '{"schema": "inferctl.receipt/9", "seal": "x"}'),
    "number as schema": (2, '{"schema": 5}'),
    "no seal": (5, '{"schema": "inferctl.receipt/1"}'),
    "sealed but empty": (2, sealed()),
    "sealed half": (2, sealed(configuration={"name": "a"}, validity={"valid": True})),
}
URLS = (
    "http://",
    "http://[::1",
    "http://host:port",
    "http://127.0.0.1:99999",
    "http://127.0.0.1:0",
    "file:///etc/passwd",
    "http:// host",
    "http://user:secret@127.0.0.1:9",
    "http://127.0.0.1:9/a b",
    "http://127.0.0.1:9?x=1",
    "http://127.0.0.1:9/#x",
)
LINES: dict[str, tuple[int, str]] = {
    "unknown plan": (2, "bench --model org/absent --plan precison"),
    "no spec": (2, "render"),
    "spec that is a folder": (2, "check --spec ."),
    "absent folder of a model": (2, "serve --model ./nowhere"),
    "model that is not in the cache of the hub": (3, "serve --model org/absent"),
    "init with a name that is not valid": (2, "init new --name\0A B"),
    "server without a name": (2, "bench --url localhost"),
    "verify of a URL without a library": (2, "verify --url http://127.0.0.1:9"),
    "no model": (2, "serve --model="),
    "model with a long name": (2, f"serve --model org/{'m' * 256}"),
    "model with a long name, estimated": (2, f"estimate --hardware t4 --model org/{'m' * 256}"),
    "model with a long name, measured": (2, f"bench --plan quick --model org/{'m' * 256}"),
    "model with a long path": (2, f"serve --model {'m/' * 2200}"),
    "unknown log style": (2, "serve --model ./m --log xml"),
    "unknown precision": (2, "check --model org/m --precision fp17"),
    "unknown hardware": (2, "check --model org/m --hardware="),
    "name that is no slug": (2, "serve --model ./m --name=A_B"),
    "image without a name": (2, "serve --image="),
    "image in upper case": (2, "serve --image UPPER"),
    "image with half a digest": (2, "serve --image x@sha256:zz"),
    "pull of half a digest": (2, "pull x@sha256:zz"),
    "init with an unknown base": (2, "init --base nope"),
    "init with unknown hardware": (2, "init --hardware nope"),
    "init with an unknown CI": (2, "init --ci jenkins"),
    "gateway with a password in the URL": (2, "gateway --server http://u:pa55word@127.0.0.1:9"),
    "gateway with a password and no scheme": (2, "gateway --server u:pa55word@127.0.0.1:9"),
    "lock without wheels": (2, "lock --wheels none"),
    "lock with an index that is no URL": (2, "lock --index pypi"),
    "lock of an unknown base": (2, "lock --base nope"),
    "estimate of a folder": (2, "estimate --config ."),
    "folders without receipts": (2, "compare empty empty2"),
    "plan without a name": (2, f"{BENCH} --plan="),
    "plan that is a folder": (2, f"{BENCH} --plan ./m"),
    "plan that is a URL": (2, f"{BENCH} --plan http://x/y.yaml"),
    "secret that is not there": (2, "build --dry-run --model org/m --pip-conf none"),
    "tag without a name": (2, "build --dry-run --model org/m --tag="),
    "entry without a name": (2, "catalog hardware ="),
    "spec that is a device": (2, "check --spec /dev/null"),
    "spec that is a link to itself": (2, "check --spec loop"),
    "spec below a file": (2, "check --spec m/config.json/x"),
}


# What is run next to a spec, and that spec.
BESIDE: dict[str, tuple[int, str, str]] = {
    "init over a spec": (2, "init", SPEC),
    "incomplete locks": (2, "render", SPEC + "image: {locks: .}\n"),
    "value that escapes the Dockerfile": (2, "render --base-image\0a/b; rm -rf /", SPEC),
    "pin of a spec that is not valid": (2, "pin --check", "nme: m\n"),
    "no Docker": (3, "build --no-verify", SPEC),
}
# Files in place of the weights of a model.
WEIGHTS: dict[str, tuple[str, str]] = {
    "Git LFS pointer": (
        "model.safetensors",
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 90868376\n",
    ),
    "pickle": ("pytorch_model.bin", ""),
}


def put(file: str, content: Content) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def nothing(_: Path) -> None:
    pass


def cases() -> list[Any]:
    found: list[tuple[str, int, str, Callable[[Path], None]]] = []
    found += [(f"spec {name}", 2, "check", put("inferctl.yaml", one)) for name, one in SPECS.items()]
    for command in ("render", "config --json"):  # they read the same file in the same way
        found += [
            (f"{command} {name}", 2, command, put("inferctl.yaml", SPECS[name])) for name in ("nul", "null model")
        ]
    found += [(f"plan {name}", 2, f"{BENCH} --plan p.yaml", put("p.yaml", one)) for name, one in PLANS.items()]
    found.append(("plan without configurations", 2, "bench --model org/m --plan p.yaml", put("p.yaml", "name: p\n")))
    for name, content in CORPORA.items():
        line = f"{BENCH} --plan quick --corpus ./c.jsonl"
        found.append((f"corpus {name}", 2, line, put("c.jsonl", content)))
    for name, content in CONFIGS.items():
        line = "estimate --model ./m --hardware t4 --length 64"
        found.append((f"config {name}", 2, line, put("m/config.json", content)))
    line = "compare r.json r2.json"
    found += [(f"receipt {name}", code, line, put("r.json", one)) for name, (code, one) in RECEIPTS.items()]
    found += [(f"url {url}", 2, f"bench --plan quick --url\0a={url}", nothing) for url in URLS]
    found += [(f"line {name}", code, line, nothing) for name, (code, line) in LINES.items()]
    found += [(name, code, line, put("inferctl.yaml", one)) for name, (code, line, one) in BESIDE.items()]
    found += [(name, 2, "serve --model ./m", put(f"m/{file}", one)) for name, (file, one) in WEIGHTS.items()]
    return [pytest.param(*case, id=name) for name, *case in found]


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("code", "line", "prepare"), cases())
def test_a_bad_input_is_an_error_with_a_hint_at_once(
    code: int,
    line: str,
    prepare: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for folder in ("m", "empty", "empty2"):
        (tmp_path / folder).mkdir()
    (tmp_path / "m" / "config.json").write_text(CONFIG)
    (tmp_path / "r2.json").write_text("{}")
    (tmp_path / "loop").symlink_to("loop")
    prepare(tmp_path)
    # A URL may hold spaces; a lone `=` stands for an empty word.
    before, separator, last = line.partition("\0")
    words = ["" if word == "=" else word for word in before.split()] + ([last] if separator else [])
    assert cli.run(words) == code
    out, err = capsys.readouterr()
    assert "error: " in err
    assert "\nhint: " in err
    assert "Traceback" not in err
    assert "pa55word" not in err, "no message shows a password"
    assert len(err) < 5000, "no one reads more"
    assert out == "" or "error" in json.loads(out)


def test_a_file_with_thousands_of_errors_names_the_first_and_their_number(tmp_path: Path) -> None:
    error = SpecError("x.yaml", [Problem(f"k{n}", f"unknown key k{n}", n) for n in range(1, 1001)])
    assert len(error.problems) == 1000
    assert error.message.splitlines()[0].startswith("1000 ")
    assert error.message.splitlines()[-1] == "and 980 more"
