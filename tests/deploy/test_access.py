"""Keys in a database and limits through a broker: what the manifests have, with the real PostgreSQL and NATS."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from inferctl.config import settings
from inferctl.config.spec import Spec
from inferctl.core.addresses import NatsAddress
from inferctl.core.errors import UsageError
from inferctl.deploy import layout
from inferctl.tenancy.access import channel
from inferctl.tenancy.access.key_file import ApiKey
from inferctl.tenancy.fleet.key_store import KeyStore
from tests.deploy import plans
from tests.deploy.test_layout import OVERLAYS, Build, egress, named, pod_of
from tests.deploy.validation import problems
from tests.processes import free_port, until
from tests.tenancy.parts import Part, Postgres

STORE = "postgresql://keys@db.databases:6432/keys"
NATS = "nats://nats.messaging:4222"


def spec(access: dict[str, Any], **deploy: Any) -> Spec:
    data = plans.embed(**deploy).model_dump(exclude_unset=True)
    return Spec.model_validate(data | {"access": {"keys": "keys.json", "tokens_per_minute": 100_000, **access}})


def variables(container: dict[str, Any]) -> dict[str, Any]:
    return {
        each["name"]: each["value"] if "value" in each else each["valueFrom"]["secretKeyRef"]
        for each in container["env"]
    }


def test_the_relay_gets_the_addresses_and_the_server_none(build: Build) -> None:
    access = {"keys": "postgresql://keys:hunter2@db.databases:6432/keys", "broker": NATS}
    access["budgets"] = {"team:a": "5 EUR/day"}
    made = spec(access, broker_secret="nats")
    priced = made.metering.model_copy(update={"prices": "sub/prices.yaml"})
    files = layout.files(plans.plan(made.model_copy(update={"metering": priced})))
    assert not [name for name, text in files.items() if "hunter2" in text]
    built = build(files, OVERLAYS[0])
    assert [problem for each in built for problem in problems(each, "1.36")] == []
    pod = pod_of(built)
    (relay,), (server,) = pod["initContainers"], pod["containers"]
    assert variables(relay) == {
        "INFERCTL_METERING_LEDGER": {"name": "inferctl-ledger", "key": "url"},
        "INFERCTL_ACCESS_BROKER": {"name": "nats", "key": "url"},
        "INFERCTL_ACCESS_KEYS": {"name": "inferctl-keys", "key": "url"},
        "INFERCTL_ACCESS_DATA": "/access",
    }
    found = variables(server)
    assert found["INFERCTL_ACCESS_KEYS"] == STORE
    assert (found["INFERCTL_ACCESS_BROKER"], found["INFERCTL_ACCESS_DATA"]) == ("nats://relay", "/access")
    assert json.loads(found["INFERCTL_ACCESS_BUDGETS"]) == access["budgets"], "also if the image has others"
    assert found["INFERCTL_METERING_PRICES"] == "/keys/prices.yaml"
    mounts = [{mount["mountPath"]: mount["name"] for mount in each["volumeMounts"]} for each in (relay, server)]
    assert mounts[0]["/access"] == mounts[1]["/access"] == "access"
    (shown,) = (volume["secret"]["items"] for volume in pod["volumes"] if "secret" in volume)
    assert shown == [{"key": "prices.yaml", "path": "prices.yaml"}], "without the URL"
    assert egress(built) == [(None, 5432), ("databases", 6432), ("messaging", 4222)]


def test_events_through_a_broker_have_a_relay_that_stores_them(build: Build) -> None:
    made = spec({"broker": NATS}, broker_secret="nats")
    both = made.model_copy(update={"metering": made.metering.model_copy(update={"broker": NatsAddress(NATS)})})
    built = build(layout.files(plans.plan(both)), OVERLAYS[0])
    assert [problem for each in built for problem in problems(each, "1.36")] == []
    url, ledger = {"name": "nats", "key": "url"}, {"name": "inferctl-ledger", "key": "url"}
    sidecar = variables(pod_of(built)["initContainers"][0])
    assert sidecar["INFERCTL_METERING_BROKER"] == sidecar["INFERCTL_ACCESS_BROKER"] == url
    assert "INFERCTL_METERING_LEDGER" not in sidecar
    (consumer,) = pod_of(built, "usage-relay")["containers"]
    assert consumer["command"] == ["inferctl", "relay", "--consume"]
    assert variables(consumer) == {"INFERCTL_METERING_BROKER": url, "INFERCTL_METERING_LEDGER": ledger}
    assert egress(built) == [("messaging", 4222)]
    assert egress(built, "usage-relay") == [(None, 5432), ("messaging", 4222)]


def test_a_key_file_and_a_broker_need_a_relay_too(build: Build) -> None:
    made = spec({"broker": "nats://nats.shared.example.com:4333"}, bench=False)
    made = made.model_copy(update={"metering": made.metering.model_copy(update={"mode": "off"})})
    built = build(layout.files(plans.plan(made)), OVERLAYS[0])
    pod = pod_of(built)
    (relay,), (server,) = pod["initContainers"], pod["containers"]
    assert relay["command"] == ["inferctl", "relay"]
    assert "startupProbe" not in relay
    assert variables(relay)["INFERCTL_ACCESS_BROKER"] == "nats://nats.shared.example.com:4333"
    assert variables(server)["INFERCTL_ACCESS_KEYS"] == "/keys/keys.json"
    assert {"name": "keys", "mountPath": "/keys", "readOnly": True} in server["volumeMounts"]
    # The name of the host says nothing about its pods, so only the port is known.
    assert egress(built) == [(None, 4333)]


@pytest.mark.parametrize(
    ("access", "deploy", "message"),
    [
        ({"keys": "sqlite:///keys.sqlite"}, {}, "SQLite, a file of one machine"),
        ({"keys": "postgresql://keys@/keys?host=/run/postgresql"}, {}, "names a Unix socket"),
        ({"keys": "postgresql:///keys"}, {}, "names a Unix socket"),
        ({"broker": "nats://user:pw@nats:4222"}, {}, r"access\.broker has credentials"),
        ({}, {"broker_secret": "nats"}, "nothing uses a broker"),
        ({"keys": None, "budgets": {"model:a": "5 EUR/day"}}, {"keys_secret": None}, "access.budgets is set"),
    ],
    ids=["sqlite", "socket", "no-host", "credentials", "unused-secret", "budgets"],
)
def test_what_pods_cannot_use_is_refused(access: dict[str, Any], deploy: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        layout.files(plans.plan(spec(access, **deploy)))


@pytest.mark.parametrize(
    ("broker", "secret", "message"),
    [("nats://user:pw@nats", None, r"metering\.broker has credentials"), ("nats://other", "nats", "differ")],
)
def test_a_broker_of_events_that_pods_cannot_use_is_refused(broker: str, secret: str | None, message: str) -> None:
    made = spec({"broker": NATS}, broker_secret=secret)
    metering = made.metering.model_copy(update={"broker": NatsAddress(broker)})
    with pytest.raises(UsageError, match=message):
        layout.files(plans.plan(made.model_copy(update={"metering": metering})))


def test_a_relay_needs_an_image() -> None:
    made = spec({"keys": STORE}, tools_image=None, bench=False)
    made = made.model_copy(update={"metering": made.metering.model_copy(update={"mode": "off"})})
    with pytest.raises(UsageError, match="keys in a database require a relay in each pod"):
        layout.files(plans.plan(made))


def test_a_bench_job_asks_for_no_keys(build: Build) -> None:
    files = layout.files(plans.plan(spec({"keys": STORE, "broker": NATS})))
    job = named(build(files, "bench/aws-us-east-1"), "Job", "bench-embed-a100-half")["spec"]["template"]["spec"]
    (server,) = job["initContainers"]
    found = variables(server)
    assert (found["INFERCTL_ACCESS_KEYS"], found["INFERCTL_ACCESS_BROKER"]) == ("null", "null")
    assert {volume["name"] for volume in job["volumes"]} >= {mount["name"] for mount in server["volumeMounts"]}
    assert "access" not in {volume["name"] for volume in job["volumes"]}


# The real parts.


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Callable[[str], None]]]:
    """An empty database on a port: its URL, without a password, and what runs SQL in it."""
    if not list(Path("/usr/lib/postgresql").glob("*/bin")):
        pytest.skip("PostgreSQL is not installed")
    port = free_port()
    monkeypatch.setenv("PGPORT", str(port))
    started = Postgres(tmp_path / "postgres")
    started.command += ["-c", "listen_addresses=127.0.0.1"]
    started.start()
    name = started.url().partition("?")[0].rpartition("/")[2]

    def execute(sql: str) -> None:
        subprocess.run([*started._psql, "-d", name, "-c", sql], check=True)

    yield f"postgresql://postgres@127.0.0.1:{port}/{name}", execute
    started.kill()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[str]:
    """A NATS server with a user and a password: its URL with both."""
    if shutil.which("nats-server") is None:
        pytest.skip("nats-server is not installed")
    port, config = free_port(), tmp_path / "nats.conf"
    config.write_text(f'listen: 127.0.0.1:{port}\nauthorization {{ user: inferctl, password: "s3cret" }}\n')
    started = Part(["nats-server", "-c", str(config)])
    started.start()
    yield f"nats://inferctl:s3cret@127.0.0.1:{port}"
    started.kill()


class RunningPod:
    """The relay of a pod as a process, with the folders of the pod in `root`. `url`: of the Secret with the keys."""

    def __init__(self, pod: dict[str, Any], root: Path, secrets: dict[str, str]) -> None:
        self.pod, self.root, self.access = pod, root, root / "access"
        (relay,) = pod["initContainers"]
        values = {
            name: value if isinstance(value, str) else secrets[f"{value['name']}/{value['key']}"]
            for name, value in variables(relay).items()
        }
        self.access.mkdir(parents=True)
        assert relay["command"][0] == "inferctl"
        self.process = subprocess.Popen(
            [sys.executable, "-m", *relay["command"]],
            env={**os.environ, **values, "INFERCTL_ACCESS_DATA": str(self.access)},
            cwd=root,
            stderr=(root / "log").open("wb"),
        )

    def started(self) -> bool:
        """Run the startup probe of the relay once, as a kubelet does."""
        shell, option, script = self.pod["initContainers"][0]["startupProbe"]["exec"]["command"]
        script = script.replace("/access/", f"{self.access}/")
        return subprocess.run([shell, option, script], capture_output=True, check=False).returncode == 0

    def key_file(self) -> Path:
        """Return the file that the server of the pod reads."""
        environment = {name: value for name, value in variables(self.pod["containers"][0]).items() if value}
        environment["INFERCTL_ACCESS_DATA"] = str(self.access)
        found = settings.resolve(None, environment, {"model.source": str(self.root)}).spec.access.key_file
        assert found
        return Path(found)

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.mark.slow
def test_a_server_finds_the_keys_that_its_relay_copies(
    database: tuple[str, Callable[[str], None]], broker: str, build: Build, tmp_path: Path
) -> None:
    administrator, execute = database
    store = KeyStore.open(administrator)
    with store.edit() as found:
        found["team-a"] = ApiKey(id="0" * 12, name="team-a", digests=[], created=datetime.now(UTC))
    reader = administrator.replace("postgres@", "reader:s3cret@")
    execute("create role reader login password 's3cret'; grant select on all tables in schema public to reader")
    access = {"keys": reader.replace(":s3cret", ""), "broker": "nats://nats"}
    made = spec(access, broker_secret="nats", bench=False)
    made = made.model_copy(update={"metering": made.metering.model_copy(update={"mode": "off"})})
    pod = pod_of(build(layout.files(plans.plan(made)), OVERLAYS[0]))
    assert variables(pod["containers"][0])["INFERCTL_ACCESS_KEYS"] == access["keys"]
    secrets = {"inferctl-keys/url": reader, "nats/url": broker}
    pods = [RunningPod(pod, tmp_path / name, secrets) for name in ("first", "second")]
    try:
        for each in pods:
            until(each.started, 30)
            keys = json.loads(each.key_file().read_text())["keys"]
            assert [key["name"] for key in keys] == ["team-a"]
        assert asyncio.run(exchanged(*pods)) == {"counters": {}}
    finally:
        for each in pods:
            each.end()
        store.close()


async def exchanged(first: RunningPod, second: RunningPod) -> object:
    """Return what the server of `second` receives of what that of `first` sends, through relays and broker."""
    servers = []
    for each in (first, second):
        reader, writer = await asyncio.open_unix_connection(channel.address(each.access))
        writer.write(b"embed\n")
        servers.append((reader, writer))
    (_, sender), (receiver, _) = servers
    message = b'{"counters": {}}\n'
    try:
        async with asyncio.timeout(20):
            while True:  # until both relays have subscribed
                sender.write(message)
                try:
                    async with asyncio.timeout(0.5):
                        while (line := await receiver.readline()) == channel.AGAIN:
                            pass
                        return json.loads(line)
                except TimeoutError:
                    continue
    finally:
        for _, writer in servers:
            writer.close()
