"""NATS as `inferctl deploy` writes it: its objects, and three real servers with its configuration."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nats
import nats.errors
import pytest

from inferctl.config.spec import Spec
from inferctl.core.errors import UsageError
from inferctl.deploy import layout
from inferctl.tenancy.metering.broker import STREAM, BrokerUnavailableError, connect
from inferctl.tenancy.metering.outbox import EventBatch
from tests.deploy import plans
from tests.deploy.conftest import Objects
from tests.deploy.test_access import variables
from tests.deploy.test_layout import OVERLAYS, named
from tests.deploy.validation import VERSIONS, problems
from tests.metering.parts import Part, batch
from tests.processes import execute, until

Build = Callable[[dict[str, str], str], Objects]
NATS = {"storage": "10GiB"}
# The second one would be a number of NATS's configuration without quotes.
SECRETS = {"nats/password": "3e5", "nats/cluster-password": "12"}
URL = "nats://inferctl:3e5@{}:4222"
has_nats = pytest.mark.skipif(shutil.which("nats-server") is None, reason="nats-server is not installed")


def spec(make: Callable[..., Spec] = plans.embed, **deploy: Any) -> Spec:
    return make(**{"broker": None, "broker_secret": "nats", "nats": NATS, **deploy})


def rendered(build: Build) -> Objects:
    return build(layout.files(plans.plan(spec())), OVERLAYS[0])


def stateful_set(built: Objects) -> dict[str, Any]:
    found: dict[str, Any] = named(built, "StatefulSet", "nats")["spec"]
    return found


@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])  # a field is in all from its first on
def test_three_servers_keep_a_quorum(version: str, build: Build) -> None:
    built = build(layout.files(plans.plan(spec(), kubernetes=version)), OVERLAYS[0])
    assert [problem for each in built for problem in problems(each, version)] == []
    found = stateful_set(built)
    assert (found["replicas"], found["podManagementPolicy"]) == (3, "Parallel")
    labels = found["selector"]["matchLabels"]
    budget = named(built, "PodDisruptionBudget", "nats")["spec"]
    assert (budget["maxUnavailable"], budget["selector"]["matchLabels"]) == (1, labels)
    (apart,) = found["template"]["spec"]["affinity"]["podAntiAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]
    assert (apart["topologyKey"], apart["labelSelector"]["matchLabels"]) == ("kubernetes.io/hostname", labels)
    headless = named(built, "Service", found["serviceName"])["spec"]
    assert (headless["clusterIP"], headless["publishNotReadyAddresses"]) == ("None", True)
    (claim,) = found["volumeClaimTemplates"]
    assert claim["spec"] == {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "10240Mi"}}}
    text = named(built, "ConfigMap", "nats")["data"]["nats.conf"]
    assert int(re.findall(r"max_file_store: (\d+)", text)[0]) == 10 * 2**30 * 9 // 10
    hosts = {
        re.findall(r"@([a-z0-9.-]+):6222", each["value"])[0]
        for each in found["template"]["spec"]["containers"][0]["env"]
        if each["name"].startswith("ROUTE_")
    }
    assert hosts == {f"nats-{number}.nats-pods" for number in range(3)}


def test_who_may_connect(build: Build) -> None:
    built = rendered(build)
    policy = named(built, "NetworkPolicy", "nats")["spec"]
    labels = stateful_set(built)["selector"]["matchLabels"]
    clients, routes = policy["ingress"]
    component = "app.kubernetes.io/component"
    assert [each["podSelector"]["matchLabels"][component] for each in clients["from"]] == ["server", "usage-relay"]
    assert clients["ports"] == [{"protocol": "TCP", "port": 4222}]
    assert policy["egress"] == [{"to": routes["from"], "ports": routes["ports"]}]
    assert routes["from"] == [{"podSelector": {"matchLabels": labels}}]
    assert routes["ports"] == [{"protocol": "TCP", "port": 6222}]
    for name in ("embed-l4", "usage-relay"):
        pod = named(built, "Deployment", name)["spec"]["template"]
        assert pod["metadata"]["labels"][component] in ("server", "usage-relay")
        (relay,) = pod["spec"].get("initContainers") or pod["spec"]["containers"]
        assert list(variables(relay))[:1] == ["NATS_PASSWORD"], "before the variable that refers to it"
        assert variables(relay)["INFERCTL_METERING_BROKER"] == "nats://inferctl:$(NATS_PASSWORD)@nats.inference:4222"


def test_two_models_have_one_nats(build: Build) -> None:
    def second(**deploy: Any) -> Spec:
        made = spec(plans.generate, tools_image="t:1", **deploy)
        return made.model_copy(update={"metering": plans.embed().metering})

    built = build(layout.files(plans.plan(spec(), second())), OVERLAYS[0])
    assert len([each for each in built if each["kind"] == "StatefulSet"]) == 1
    with pytest.raises(UsageError, match="of embed and chat differ"):
        layout.files(plans.plan(spec(), second(nats={"storage": "20GiB"})))


@pytest.mark.parametrize(
    ("deploy", "message"),
    [
        ({"nats": {"storage_class": "fast"}}, "deploy.nats has no storage"),
        ({"broker": "nats://nats.messaging:4222"}, "two brokers"),
        ({"broker_secret": None}, "has no passwords"),
    ],
)
def test_half_a_broker_is_refused(deploy: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec(**deploy)


def test_a_broker_without_use_or_room_is_refused() -> None:
    with pytest.raises(UsageError, match="too small"):
        layout.files(plans.plan(spec(nats={"storage": "500MiB"})))
    with pytest.raises(UsageError, match="nothing uses a broker"):
        layout.files(plans.plan(spec(plans.generate)))
    with pytest.raises(UsageError, match="the name nats is that of the broker"):
        layout.files(plans.plan(spec().model_copy(update={"name": "nats"})))


# Three real servers.


class Server(Part):
    """A server of the StatefulSet on an address of its own, as `127.0.1.1`."""

    def __init__(self, built: Objects, number: int, folder: Path) -> None:
        self.address, self.container = f"127.0.1.{number + 1}", stateful_set(built)["template"]["spec"]["containers"][0]
        folder.mkdir(parents=True)
        text = named(built, "ConfigMap", "nats")["data"]["nats.conf"]
        for path in ("/data", "/run/nats"):
            (folder / path[1:]).mkdir(parents=True)
            text = text.replace(f'"{path}', f'"{folder}{path}')
        self.config, self.pid_file = folder / "nats.conf", folder / "run/nats/nats.pid"
        self.config.write_text(text.replace("0.0.0.0", self.address))
        assert self.container["command"][:2] == ["nats-server", "--config"]
        super().__init__(["nats-server", "--config", str(self.config)])
        self.environment = environment(self.container, f"nats-{number}")

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, env=self.environment, stderr=(self.config.parent / "log").open("ab"), start_new_session=True
        )

    def probe(self, kind: str) -> bool:
        get = self.container[kind]["httpGet"]
        ports = {port["name"]: port["containerPort"] for port in self.container["ports"]}
        with contextlib.suppress(urllib.error.URLError, OSError):
            url = f"http://{self.address}:{ports[get['port']]}{get['path']}"
            with urllib.request.urlopen(url, timeout=5) as response:
                return bool(response.status == 200)
        return False

    def leave(self) -> None:
        """Run the preStop hook, then send SIGTERM, as a kubelet does."""
        hook = self.container["lifecycle"]["preStop"]["exec"]["command"]
        subprocess.run([each.replace("/run/nats", str(self.pid_file.parent)) for each in hook], check=True)
        self.signal(signal.SIGTERM)


def environment(container: dict[str, Any], pod: str) -> dict[str, str]:
    """Return the variables of a container, as a kubelet makes them."""
    found = {"PATH": os.environ["PATH"]}
    for each in container["env"]:
        source = each.get("valueFrom", {})
        if "fieldRef" in source:
            value = pod
        elif source:
            value = SECRETS["{name}/{key}".format(**source["secretKeyRef"])]
        else:
            value = re.sub(r"\$\((\w+)\)", lambda match: found[match[1]], each["value"])
        # Kubernetes resolves names of pods; here they are addresses.
        found[each["name"]] = re.sub(r"@nats-(\d)\.nats-pods", lambda match: f"@127.0.1.{int(match[1]) + 1}", value)
    return found


@pytest.fixture
def servers(build: Build, tmp_path: Path) -> Iterator[list[Server]]:
    built = rendered(build)
    found = [Server(built, number, tmp_path / f"nats-{number}") for number in range(3)]
    yield found
    for each in found:
        each.kill()


@has_nats
def test_nats_accepts_the_configuration(servers: list[Server]) -> None:
    for each in servers:
        execute(*each.command, "-t", env=each.environment, code=0)


@has_nats
@pytest.mark.slow
def test_a_server_may_leave_without_a_lost_event(servers: list[Server]) -> None:
    for each in servers:
        each.start()
    for each in servers:
        until(lambda each=each: each.probe("startupProbe"), 60)  # type: ignore[misc]
        assert each.probe("readinessProbe")
        assert each.probe("livenessProbe")
    assert asyncio.run(rejected("nats://127.0.1.1:4222"))
    assert asyncio.run(rejected("nats://inferctl:wrong@127.0.1.1:4222"))
    # A client of the port of routes needs their password too.
    assert asyncio.run(rejected("nats://127.0.1.1:6222"))

    async def publish(server: Server, numbers: range) -> Any:
        broker = await connect(URL.format(server.address))
        try:
            for number in numbers:
                async with asyncio.timeout(60):
                    while True:  # as a relay does: after the start, servers have not found each other
                        try:
                            await broker.publish(made(number))
                            break
                        except BrokerUnavailableError:
                            await asyncio.sleep(0.5)
            return await broker._stream.stream_info(STREAM)
        finally:
            await broker.close()

    info = asyncio.run(publish(servers[0], range(1, 4)))
    assert info.config.num_replicas == 3
    servers[1].leave()
    until(lambda: servers[1].process is not None and servers[1].process.poll() is not None, 60)
    assert not servers[1].probe("livenessProbe")
    servers[2].kill()
    servers[2].start()
    until(lambda: servers[2].probe("startupProbe"), 60)
    assert asyncio.run(publish(servers[0], range(4, 7))).state.messages == 6


def made(number: int) -> EventBatch:
    return batch("host/1", number, number)


async def rejected(url: str) -> bool:
    async def ignore(_: Exception) -> None:
        """The error of `connect` is enough."""

    try:
        connection = await nats.connect(url, allow_reconnect=False, connect_timeout=2, error_cb=ignore)
    except (TimeoutError, nats.errors.Error, OSError):
        return True
    await connection.close()
    return False
