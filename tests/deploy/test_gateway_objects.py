"""The gateway that `inferctl deploy` writes: its autoscaler, and TLS with the real Envoy."""

from __future__ import annotations

import contextlib
import re
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from inferctl.deploy import layout
from tests.deploy import plans
from tests.deploy.conftest import Objects
from tests.deploy.test_layout import OVERLAYS, named
from tests.deploy.validation import VERSIONS, problems
from tests.gateway.test_gateway import ENVOY, Backends, backends, free_port, until  # noqa: F401  # a fixture

Build = Callable[[dict[str, str], str], Objects]


def gateway(build: Build, **deploy: Any) -> Objects:
    return build(layout.files(plans.plan(plans.embed(**deploy))), OVERLAYS[0])


@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])  # test_layout.py has all versions
def test_an_autoscaler_keeps_at_least_two(version: str, build: Build) -> None:
    built = build(layout.files(plans.plan(kubernetes=version)), OVERLAYS[0])
    scaler = named(built, "HorizontalPodAutoscaler", "embed-gateway")
    assert problems(scaler, version) == []
    assert (scaler["spec"]["minReplicas"], scaler["spec"]["maxReplicas"]) == (2, 10)
    assert scaler["spec"]["scaleTargetRef"]["name"] == "embed-gateway"
    deployment = named(built, "Deployment", "embed-gateway")["spec"]
    assert "replicas" not in deployment
    (container,) = deployment["template"]["spec"]["containers"]
    (metric,) = scaler["spec"]["metrics"]
    assert metric["resource"]["name"] in container["resources"]["requests"]
    budget = named(built, "PodDisruptionBudget", "embed-gateway")["spec"]
    assert budget["maxUnavailable"] < scaler["spec"]["minReplicas"]


def test_with_tls_no_client_reaches_another_port(build: Build) -> None:
    built = gateway(build, gateway_tls_secret="embed-tls")
    pod = named(built, "Deployment", "embed-gateway")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"https": 8443, "metrics": 9901}
    (service, _) = named(built, "Service", "embed-gateway")["spec"]["ports"]
    assert (service["port"], service["targetPort"], service["appProtocol"]) == (443, "https", "https")
    ingress = named(built, "NetworkPolicy", "embed-gateway")["spec"]["ingress"]
    assert [port["port"] for rule in ingress for port in rule["ports"]] == ["https"]
    (egress,) = named(built, "NetworkPolicy", "embed-clients")["spec"]["egress"]
    assert [port["port"] for port in egress["ports"]] == [8443]
    (secret,) = (volume["secret"] for volume in pod["volumes"] if "secret" in volume)
    assert secret["secretName"] == "embed-tls"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_tls_without_a_gateway_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no gateway"):
        plans.embed(gateway="none", gateway_tls_secret="embed-tls")


# The real Envoy.


class Pod:
    """Envoy with the rendered configuration, and the folders that a kubelet makes. `url`: of its clients."""

    def __init__(self, built: Objects, root: Path, server: str) -> None:
        self.tls, run = root / "tls", root / "run"
        data = named(built, "ConfigMap", "embed-gateway")["data"]
        (container,) = named(built, "Deployment", "embed-gateway")["spec"]["template"]["spec"]["containers"]
        folders = {"/etc/inferctl-gateway-tls": self.tls, "/run/inferctl-gateway": run}
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {*folders, "/etc/inferctl-gateway", "/run/inferctl-gateway/tls"}
        (run / "tls").mkdir(parents=True)
        self.tls.mkdir()
        self.port = free_port()
        ports = {"8443": self.port, "9901": free_port(), "9902": free_port(), "8080": server.rpartition(":")[2]}
        for name, text in data.items():
            for path, folder in folders.items():
                text = text.replace(path, str(folder))
            for old, new in ports.items():
                text = re.sub(rf"port_value: {old}\b", f"port_value: {new}", text)
            text = text.replace("address: embed-pods", "address: localhost")
            (run / ("tls" if name == "certificate.yaml" else ".") / name).write_text(text)
        self.url = f"https://127.0.0.1:{self.port}"
        command = [ENVOY, "--config-path", run / "envoy.yaml", "--concurrency", "1", *container["args"]]
        self.command = [str(each) for each in command]
        self.log = root / "log"

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stderr=self.log.open("wb"))

    def renew(self, authority: trustme.CA, version: int) -> None:
        """Write a certificate as a kubelet does: a new folder, to which a link is moved."""
        issued = authority.issue_cert("127.0.0.1")
        folder = self.tls / f"..{version}"
        folder.mkdir()
        issued.cert_chain_pems[0].write_to_path(str(folder / "tls.crt"))
        issued.private_key_pem.write_to_path(str(folder / "tls.key"))
        (self.tls / "..new").symlink_to(folder.name)
        (self.tls / "..new").rename(self.tls / "..data")
        for name in ("tls.crt", "tls.key"):
            with contextlib.suppress(FileExistsError):
                (self.tls / name).symlink_to(f"..data/{name}")

    def status(self, authority: trustme.CA) -> int:
        """Return the status of a request of a client that trusts only `authority`; 0 without a connection."""
        context = ssl.create_default_context()
        authority.configure_trust(context)
        try:
            return httpx.post(f"{self.url}/v1/embeddings", json={}, verify=context, timeout=5).status_code
        except httpx.HTTPError:
            return 0


@pytest.fixture
def pod(build: Build, backends: Backends, tmp_path: Path) -> Iterator[Pod]:  # noqa: F811  # the fixture
    found = Pod(gateway(build, gateway_tls_secret="embed-tls"), tmp_path / "pod", backends.start("a"))
    yield found
    if hasattr(found, "process"):
        found.process.kill()
        found.process.wait()


@pytest.mark.skipif(not ENVOY.exists(), reason="Envoy is not installed: pip install '.[gateway]'")
def test_a_renewed_certificate_is_used_without_a_restart(pod: Pod) -> None:
    first, second = trustme.CA(), trustme.CA()
    pod.renew(first, 1)
    pod.start()
    until(lambda: pod.status(first) == 200)
    assert pod.status(second) == 0
    with pytest.raises(httpx.HTTPError):
        httpx.get(pod.url.replace("https", "http"), timeout=5)
    pod.renew(second, 2)
    until(lambda: pod.status(second) == 200)
    assert pod.status(first) == 0
    assert pod.process.poll() is None
