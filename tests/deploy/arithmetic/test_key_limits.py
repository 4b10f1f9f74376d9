"""Among how many servers the limit of a key is divided, with a broker. Without one: test_planning.py."""

from __future__ import annotations

from typing import Any

from inferctl.deploy.plan import ModelPlan
from inferctl.tenancy.access.limits import Limiter
from tests.deploy.arithmetic.sources import IMAGE, plan, spec

TRAFFIC = {"base_rps": 100, "peak_rps": 1000, "tokens_per_request": 250}


def model(clusters: list[dict[str, Any]], broker: str = "nats://nats.example.com", **flavor: Any) -> ModelPlan:
    flavors = [{"hardware": "l4", "image": IMAGE, "tokens_per_second": 50_000, **flavor}]
    deploy = {"flavors": flavors, "traffic": TRAFFIC, "keys_secret": "keys"}
    access = {"keys": "keys.json", "broker": broker, "requests_per_minute": 1000}
    return plan(spec(deploy, access=access), clusters=clusters).models[0]


def test_servers_of_one_broker_are_those_that_always_run() -> None:
    # Half of the peak in each cluster: 125,000 / 35,000 = 3.6 -> 4. The minima are 2.
    found = model([{"name": "a"}, {"name": "b"}])
    assert found.key_servers
    assert (found.key_servers.value, found.key_servers.formula) == (4, "2 + 2")
    (warning,) = (each for each in found.warnings if "broker" in each)
    assert "at the peak of 8 servers, each applies 1/4 of the limit of a key" in warning
    assert "up to 2.0 times the limit" in warning


def test_each_cluster_with_its_own_broker_has_the_limit() -> None:
    found = model([{"name": "a", "share": 0.75}, {"name": "b"}], "nats://nats.messaging:4222", min_replicas=3)
    assert found.key_servers
    assert (found.key_servers.value, found.key_servers.formula) == (3, "min(3, 3)")
    first, second = (each for each in found.warnings if "broker" in each or "each of the" in each)
    assert "a key gets its limit in each of the 2 clusters" in first
    # 0.75 x 250,000 / 35,000 = 5.4 -> 6
    assert "at the peak of 6 servers" in second


def test_a_cluster_without_servers_does_not_count() -> None:
    found = model([{"name": "a"}, {"name": "b", "max_replicas": {"l4": 0}, "share": 0}], "nats://nats.messaging:4222")
    assert found.key_servers
    assert (found.key_servers.value, found.key_servers.formula) == (2, "")


def test_every_server_at_the_peak_can_be_heard() -> None:
    found = model([{"name": "a"}], tokens_per_second=5_000, min_replicas=2)
    # 250,000 / 3,500 = 71.4 -> 72 at the peak. (72 - 17) / 2 = 27.5
    assert found.key_servers
    assert (found.key_servers.value, found.key_servers.formula) == (28, "max(2, ceil((72 - 17) / 2))")

    def heard(replicas: int) -> int:
        limiter = Limiter(replicas, exchanges=True)
        for number in range(71):
            limiter.heard(f"{number:016x}", 100.0, 100.0)
        limiter.update(100.0)
        return 1 + limiter.others

    assert heard(28) == 72
    assert heard(27) < 72


def test_without_limits_there_is_no_warning() -> None:
    flavors = [{"hardware": "l4", "image": IMAGE, "tokens_per_second": 50_000}]
    deploy = {"flavors": flavors, "traffic": TRAFFIC, "keys_secret": "keys"}
    found = plan(spec(deploy, access={"keys": "keys.json", "broker": "nats://nats"}), clusters=[{"name": "a"}])
    assert not [each for each in found.models[0].warnings if "broker" in each]
