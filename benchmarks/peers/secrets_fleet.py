"""The fleet of `secrets_scan.py`: servers, gateways and stores with marks in all keys, tokens, passwords and texts."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import peers
import psycopg
from secret_marks import Client, Marks, launch, search, search_all, serve, url_of

sys.path.insert(0, str(peers.ROOT))

from inferctl.gateway import admin
from tests.serve.test_generation import FAKE, stand_in
from tests.tenancy.parts import Nats, Postgres

_PAGES = ("config_dump?include_eds", "clusters", "listeners", "stats", "server_info", "memory", "runtime", "certs")
_MIN_EVENTS, _EVENTS_S = 25, 60
# What must be escaped in an address. The stores have passwords with it; addresses that lack the escapes are rejected.
_HOSTILE = "/@:#?% +&"


class Collector(http.server.ThreadingHTTPServer):
    """Keeps the bodies of all requests with traces."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Collected)
        self.folder, self.numbers = folder, itertools.count()
        folder.mkdir()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Collected(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        name = f"{urlsplit(self.path).path.strip('/').replace('/', '-')}-{next(self.server.numbers)}"
        body = self.rfile.read(int(self.headers["content-length"]))
        (self.server.folder / name).write_bytes(body)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Stores:
    """PostgreSQL and NATS, whose addresses have passwords."""

    def __init__(self, folder: Path, marks: Marks) -> None:
        marked = {name: f"pw{secrets.token_hex(10)}" for name in ("postgresql", "nats")}
        marks.keys |= {f"password of {name}": password for name, password in marked.items()}
        passwords = {name: f"{_HOSTILE}{password}{_HOSTILE}" for name, password in marked.items()}
        escaped = {name: quote(password, safe="") for name, password in passwords.items()}
        self.postgres = Postgres(folder / "postgres")
        self.postgres.command += ["-c", "log_statement=all", "-c", "logging_collector=on", "-c", "log_directory=log"]
        self.nats = Nats(folder / "nats")
        user = f"user: scan, password: {json.dumps(passwords['nats'])}"
        with (folder / "nats" / "n.conf").open("a") as config:
            config.write(f"authorization {{ {user} }}\n")
        self.nats_url = self.nats.url.replace("//", f"//scan:{escaped['nats']}@")
        for part in (self.postgres, self.nats):
            part.start()
        (folder / "nats" / "n.conf").unlink()  # it has the password, and was read
        self.keys = self.postgres.url().replace("postgres@", f"postgres:{escaped['postgresql']}@")
        self.ledger = f"{self.postgres.url()}&password={escaped['postgresql']}"
        self._ask_for_password(folder / "postgres" / "data", passwords["postgresql"])

    def _ask_for_password(self, data: Path, password: str) -> None:
        """Let PostgreSQL ask for a password. Its log gets only the hash."""
        with psycopg.connect(self.ledger, autocommit=True) as connection:
            verifier = connection.pgconn.encrypt_password(password.encode(), b"postgres", b"scram-sha-256")
            connection.execute(f"alter role postgres password '{verifier.decode()}'")
            (data / "pg_hba.conf").write_text("local all all scram-sha-256\n")
            connection.execute("select pg_reload_conf()")

    def events(self) -> int:
        """Return how many events the ledger has; 0 before the relay made it."""
        with contextlib.suppress(psycopg.errors.UndefinedTable), psycopg.connect(self.ledger) as connection:
            return int(connection.execute("select count(*) from usage_events").fetchone()[0])
        return 0

    def checkpoint(self) -> None:
        """Let PostgreSQL write its tables: it will be killed."""
        with psycopg.connect(self.ledger, autocommit=True) as connection:
            connection.execute("checkpoint")

    def kill(self) -> None:
        for part in (self.postgres, self.nats):
            part.kill()


class Fleet:
    """All processes, and the environments of those that need an address."""

    def __init__(self, folder: Path, marks: Marks) -> None:
        self.folder, self.marks = folder, marks
        self.running: list[subprocess.Popen[bytes]] = []
        self.pages: dict[str, str] = {}
        self.stores = Stores(folder, marks)
        self.collector = Collector(folder / "collected")
        self._addresses = {
            "INFERCTL_METERING_MODE": "on",
            "INFERCTL_METERING_BROKER": self.stores.nats_url,
            "INFERCTL_METERING_LEDGER": self.stores.ledger,
            "INFERCTL_ACCESS_BROKER": self.stores.nats_url.removeprefix("nats://"),
            "INFERCTL_ACCESS_REPLICAS": "2",
            "INFERCTL_ACCESS_KEYS": self.stores.keys,
            "INFERCTL_CACHE_SIZE": "16MiB",
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.collector.url,
            "OTEL_BSP_SCHEDULE_DELAY": "500",
        }

    def start(self, engine: str | None, vllm: Path | None) -> None:
        """Create keys, and start all processes."""
        self.create_keys()
        self.consumer = launch(self.folder, "consumer.log", "relay", "--consume", **self._addresses)
        self.running.append(self.consumer)
        keys = self.marks.keys
        self.embed = Client(self._embeddings(engine), keys["key"], self.marks)
        self.generate = Client(self._generation(vllm), keys["key of generation"], self.marks)

    def create_keys(self) -> None:
        """Create, rotate and revoke keys with the command line, whose output stays in the folder."""
        marks, keys = self.marks, self.stores.keys
        key, rotated, revoked = (peers.create_key(keys, "--admin") for _ in range(3))
        sqlite = f"sqlite:///{self.folder}/keys.sqlite"
        generation = peers.create_key(sqlite, "--admin")
        marks.add_keys(key, revoked)
        new = self.cli("keys", "rotate", rotated.split("_")[2])
        self.cli("keys", "revoke", "-", given=revoked)
        self.cli("keys", "list")
        self.cli("config", "--json", "--model", str(peers.MODEL))
        marks.keys |= {"rotated key": rotated, "revoked key": revoked, "new key": new, "key of generation": generation}
        self.key_ids = {"PostgreSQL": key.split("_")[2], "SQLite": generation.split("_")[2]}
        assert new.startswith("ik_")

    def cli(self, *arguments: str, given: str = "", **variables: str) -> str:
        """Run a command, keep its messages in the folder, and return its output."""
        environment = {**os.environ, **self._addresses, **variables, "PYTHONPATH": str(peers.ROOT)}
        command = [sys.executable, "-m", "inferctl", *arguments]
        done = subprocess.run(command, input=given, env=environment, capture_output=True, text=True, check=False)
        with (self.folder / "cli.log").open("a") as log:
            log.write(done.stderr if arguments[:2] == ("keys", "rotate") else done.stderr + done.stdout)
        return done.stdout.strip()

    def _embeddings(self, engine: str | None) -> str:
        environment = {
            **self._addresses,
            "INFERCTL_METERING_DATA": str(self.folder / "metering"),
            "INFERCTL_ACCESS_DATA": str(self.folder / "access"),
            "INFERCTL_ACCESS_REQUESTS_PER_MINUTE": "100000",
        }
        arguments = ["--model", str(peers.MODEL), "--name", "minilm", *(["--engine", engine] if engine else [])]
        process, url = serve(self.folder, "embed", *arguments, **environment)
        self.running.append(process)
        return self._gateway("embed", url)

    def _generation(self, vllm: Path | None) -> str:
        (self.folder / "model").mkdir()
        model = vllm.absolute() if vllm else stand_in(self.folder / "model")
        more = {"max_context_tokens": 2048, "kv_cache": "1GiB", "vllm_options": ["--enforce-eager"]} if vllm else {}
        spec = self.folder / "generate.yaml"
        spec.write_text(json.dumps({"name": "m", "model": {"source": str(model)}, "serve": more}))
        environment = {
            **self._addresses,
            "INFERCTL_METERING_DATA": str(self.folder / "metering-generate"),
            "INFERCTL_ACCESS_KEYS": f"sqlite:///{self.folder}/keys.sqlite",
            "INFERCTL_ACCESS_DATA": str(self.folder / "access-generate"),
            "INFERCTL_ACCESS_TOKENS_PER_MINUTE": "10000000",
            "PYTHONPATH": "" if vllm else str(FAKE),
        }
        process, url = serve(self.folder, "generate", "--spec", str(spec), **environment)
        self.running.append(process)
        return self._gateway("generate", url)

    def _gateway(self, name: str, url: str) -> str:
        """Start a gateway, and return its URL."""
        port, announce = peers.free_port(), self.folder / f"gateway-{name}.json"
        command = ["gateway", "--port", "0", "--server", url, "--announce", str(announce)]
        process = launch(self.folder, f"gateway-{name}.log", *command, "--metrics-port", str(port))
        self.running.append(process)
        self.pages |= {f"metrics-{name}": f"{url}/metrics", f"info-{name}": f"{url}/info"}
        self.pages[f"metrics-gateway-{name}"] = f"http://127.0.0.1:{port}/metrics"
        self.port = url.rpartition(":")[2]
        return url_of(process, announce)

    def read_pages(self) -> None:
        """Write what metrics, `/info`, Envoy's admin interface and the list of processes say to files."""
        pids = [pid for process in self.running for pid in peers.processes(process.pid)]
        commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids]
        (self.folder / "commands.txt").write_bytes(b"\n".join(commands))
        for name, url in self.pages.items():
            key = self.marks.keys["key of generation" if name.endswith("generate") else "key"]
            request = urllib.request.Request(url, headers={"authorization": f"Bearer {key}"})
            with urllib.request.urlopen(request) as response:
                (self.folder / f"{name}.txt").write_bytes(response.read())
        for number, path in enumerate(self.folder.glob("inferctl-gateway-*/admin")):
            for page in _PAGES:
                file = self.folder / f"admin-{number}-{page.partition('?')[0]}.txt"
                file.write_text(admin.call(path, f"/{page}")[1])

    def kill(self) -> None:
        """Kill all processes with SIGSEGV, children first."""
        self._signal(signal.SIGSEGV)
        for process in self.running:
            process.wait(60)

    def end(self) -> None:
        """End what is left."""
        self._signal(signal.SIGKILL)
        self.stores.kill()
        self.collector.shutdown()

    def _signal(self, number: int) -> None:
        for process in (each for each in self.running if each.poll() is None):
            peers.send(signal.SIGSTOP, [process.pid])  # a gateway would start its Envoy again
            pids = sorted(peers.processes(process.pid), reverse=True)
            peers.send(number, pids)
            peers.send(signal.SIGCONT, pids)


def chat(client: Client, marks: Marks) -> dict[str, int]:
    """Send marked chats and completions, valid and wrong ones, and return the statuses."""
    text, field, value = (marks.texts[name] for name in ("text", "field", "value"))
    path = "/v1/chat/completions"

    # The first message is the script of the stand-in: the number of tokens.
    def body(script: str = "5", **more: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": script}, {"role": "user", "content": f"{text} hello"}]
        return {"model": "m", "messages": messages, "max_tokens": 5, **more}

    schema = {"type": "object", "properties": {field: {"type": value}}}
    function = {"name": field, "description": text, "parameters": schema}
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}
    found = {
        "valid": client.send(path, body()),
        "stream": client.send(path, body(stream=True, user=value, stop=[value])),
        "logprobs": client.send(path, body(logprobs=True, top_logprobs=2, logit_bias={field: 1})),
        "tools": client.send(path, body(tools=[{"type": "function", "function": function}])),
        "schema": client.send(
            path, body(response_format={"type": "json_schema", "json_schema": {"name": field, "schema": schema}})
        ),
        "regex": client.send(path, body(structured_outputs={"regex": f"({text}["})),
        "grammar": client.send(path, body(structured_outputs={"grammar": f"root ::= {text}"})),
        "image": client.send(path, body(messages=[{"role": "user", "content": [image]}])),
        "template": client.send(
            path, body(chat_template=f"{{{{ {field}.{value}( }}}}", chat_template_kwargs={field: value})
        ),
        "no messages": client.send(path, {"model": "m", "messages": text}),
        "unknown field": client.send(path, body(**{field: value})),
        "unknown model": client.send(path, body() | {"model": f"unknown-{value}"}),
        "no JSON": client.send(path, f'{{"messages": "{text}'.encode()),
        "long": client.send(path, body() | {"messages": [{"role": "user", "content": f"{text} " * 3000}]}),
        "invalid": client.send(path, body("invalid")),
        "busy": client.send(path, body("busy")),
        "echo": client.send("/v1/completions", {"model": "m", "prompt": text, "max_tokens": 1, "echo": True}),
        "token ids": client.send("/v1/completions", {"model": "m", "prompt": marks.token_ids, "max_tokens": 3}),
        "unknown token ids": client.send("/v1/completions", {"model": "m", "prompt": [10**7, *marks.token_ids]}),
        "tokenize": client.send("/tokenize", {"model": "m", "prompt": text}),
        "wrong key": client.send(path, body(), marks.keys["wrong key"]),
        "key in the query": client.send(f"{path}?key={marks.keys['query key']}&q={marks.texts['query']}", body()),
        "key in the path": client.send(f"/{marks.keys['query key']}/{marks.texts['query']}"),
        "unknown header": client.send(path, body(), x_unknown=marks.texts["header"]),
    }
    key = marks.keys["key of generation"]
    content = json.dumps(body("100", stream=True, max_tokens=100))
    head = f"POST {path} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
    client.send_raw(f"{head}content-length: {len(content)}\r\n\r\n{content}".encode())  # the client leaves
    client.send_raw(f"{head}content-length: 1000\r\n\r\n{text}".encode())
    return found


def run(folder: Path, engine: str | None, vllm: Path | None, marks: Marks) -> dict[str, Any]:
    """Run the fleet, send everything, let the stores fail, kill all, and return what was found where."""
    folder.chmod(0o755)  # PostgreSQL runs as another user
    fleet = Fleet(folder, marks)
    path, body = "/v1/embeddings", {"input": f"{marks.texts['text']} a text"}
    try:
        fleet.start(engine, vllm)
        embed, generate, stores = fleet.embed, fleet.generate, fleet.stores
        # Relays copy the keys first, and have the lowest priority.
        peers.wait_until(lambda: embed.send(path, body) == generate.send("/v1/models") == 200, peers.START_SECONDS)
        used = ("rotated key", "new key", "revoked key")
        statuses = {f"key: {name}": embed.send(path, body, marks.keys[name]) for name in used}
        statuses |= {f"chat: {name}": status for name, status in chat(generate, marks).items()}
        statuses |= embed.traffic()
        with contextlib.suppress(AssertionError):
            peers.wait_until(lambda: stores.events() >= _MIN_EVENTS, _EVENTS_S)
        events = stores.events()
        fleet.cli("usage")
        fleet.read_pages()
        fleet.consumer.kill()  # what is published from now on stays in NATS
        statuses["without a consumer"] = generate.send("/v1/chat/completions", {"messages": [{"content": "3"}]})
        embed.send(path, body)
        waiting = {"": fleet.key_ids["SQLite"].encode()}
        peers.wait_until(lambda: any(search(file, waiting) for file in folder.glob("nats/js/**/*.blk")), _EVENTS_S)
        stores.checkpoint()
        stores.kill()
        statuses["without stores"] = embed.send(path, body)
        for command in ("keys list", "usage", "keys create x"):
            fleet.cli(*command.split())
        time.sleep(8)  # relays and servers report it
        long = {"messages": [{"role": "user", "content": "300"}], "max_tokens": 300, "stream": True}
        threading.Thread(target=generate.send, args=("/v1/chat/completions", long), daemon=True).start()
        time.sleep(1)
        fleet.kill()
    finally:
        fleet.end()
    left = search_all(folder, embed.errors + generate.errors, marks)
    return {"statuses": statuses, "events": events, **left, "unseen": unseen(fleet)}


def unseen(fleet: Fleet) -> list[str]:
    """Return the places in which the search does not find what must be there: it would not find a mark either."""
    key, other = (key_id.encode() for key_id in fleet.key_ids.values())
    expected = {
        "postgres/data/base/*/*": key,
        "postgres/data/pg_wal/*": key,
        "postgres/data/log/*": key,
        "keys.sqlite*": other,
        "access/keys-*.json": key,
        "metering/*/events.sqlite*": b"minilm",
        "nats/js/**/*.blk": other,
        "collected/v1-traces-*": b"minilm",
        "embed.log": key,
        "generate.log": other,
        "consumer.log": b"storing the usage events",
        "cli.log": key,
        "commands.txt": b"inferctl.tenancy.relay",
        "metrics-embed.txt": b"inferctl_requests",
        "metrics-generate.txt": b"vllm:",
        "metrics-gateway-*.txt": b"envoy_cluster_upstream_rq",
        "inferctl-gateway-*/**/*.yaml": fleet.port.encode(),
        "admin-*-config_dump.txt": fleet.port.encode(),
    }
    missing = []
    for pattern, needle in expected.items():
        files = [file for file in fleet.folder.glob(pattern) if file.is_file()]
        if not any(search(file, {"": needle}) for file in files):
            missing.append(pattern)
    return missing
