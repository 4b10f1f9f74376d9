"""What protects the servers: namespace, priorities, quota, disruption budgets and network policies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from inferctl.deploy.endpoints import Endpoint
from inferctl.deploy.figure import Noted
from inferctl.deploy.objects.metadata import (
    CLIENTS,
    HTTP_PORT,
    NAMESPACE_NAME,
    SERVER,
    Object,
    labels_of,
    metadata,
)
from inferctl.manifests.label_keys import CLIENT, COMPONENT

OVERFLOW_PRIORITY = "inferctl-overflow"
# Cluster Autoscaler ignores pods below -10 by default (--expendable-pods-priority-cutoff).
_OVERFLOW_VALUE = -5
# CoreDNS is pods, but EKS Auto Mode resolves names on the node, and GKE with Cloud DNS and NodeLocal DNSCache at
# link-local addresses (169.254.169.254, 169.254.20.10): no selector is right everywhere.
_DNS_NOTE = "to all addresses: name servers are pods, the node, or 169.254.x.x, as the cloud has them"


def namespace(name: str) -> Object:
    """Return the namespace, which admits only pods of the Pod Security level `restricted`."""
    levels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "audit", "warn")}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata(name, None, levels)}


def overflow_priority() -> Object:
    """Return the priority of placeholders. Servers have none of their own, so 0: they preempt placeholders only."""
    return {
        "apiVersion": "scheduling.k8s.io/v1",
        "kind": "PriorityClass",
        "metadata": metadata(OVERFLOW_PRIORITY, None, {}),
        "value": Noted(_OVERFLOW_VALUE, "below 0: gives way to every pod; above -10: Cluster Autoscaler counts it"),
        "globalDefault": False,
        "preemptionPolicy": "Never",
        "description": "Placeholders that keep nodes alive and empty for servers.",
    }


def quota(namespace: str, hard: Mapping[str, Noted]) -> Object:
    """Return the quota of a namespace. `hard`: name of an extended resource -> the most that pods may request."""
    return {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": metadata("accelerators", namespace, {}),
        "spec": {"hard": {f"requests.{name}": limit for name, limit in sorted(hard.items())}},
    }


def disruption_budget(name: str, namespace: str, selector: Mapping[str, str]) -> Object:
    """Return a budget that lets one pod at a time be evicted, and broken pods always."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(name, namespace, selector),
        "spec": {
            "maxUnavailable": 1,
            # Otherwise, pods that never become ready block the drain of their node.
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": dict(selector)},
        },
    }


def service_account(name: str, namespace: str) -> Object:
    """Return an account without permissions, and without a token in the pods."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata(name, namespace, {}),
        "automountServiceAccountToken": False,
    }


def deny_all(namespace: str) -> Object:
    """Return the policy that forbids all connections of the namespace which no other policy allows."""
    return _policy("default-deny", namespace, {}, [], [])


def allow_dns(namespace: str, components: Sequence[str] = ()) -> Object:
    """Return the policy that lets pods resolve names: all of the namespace, or those of some components.

    It forbids other connections of the pods that it selects, so without `deny_all` it must select no pods of others.
    """
    rule = {"ports": [{"protocol": protocol, "port": Noted(53, _DNS_NOTE)} for protocol in ("UDP", "TCP")]}
    found = _policy("allow-dns", namespace, {}, None, [rule])
    if components:
        chosen = {"key": COMPONENT, "operator": "In", "values": list(components)}
        found["spec"]["podSelector"] = {"matchExpressions": [chosen]}
    return found


def client_policy(model: str, namespace: str, port: int) -> Object:
    """Return what lets clients in this namespace, pods with the label `inferctl.io/client: "true"`, reach servers.

    Everywhere else, the policies of the other namespace apply. `port`: of the servers' pods.
    """
    to = [{"podSelector": {"matchLabels": labels_of(model, SERVER)}}]
    rule = {"to": to, "ports": [{"protocol": "TCP", "port": port}]}
    return _policy(f"{model}-clients", namespace, {CLIENT: "true"}, None, [rule])


def server_policy(model: str, namespace: str, egress: Iterable[Endpoint]) -> Object:
    """Return what the servers of `model` may connect to, and who may connect to them.

    Clients come from this namespace, and from those with the label `inferctl.io/clients: "true"`.
    """
    clients: list[Object] = [{"podSelector": {}}, {"namespaceSelector": {"matchLabels": {CLIENTS: "true"}}}]
    return _policy(f"{model}-server", namespace, labels_of(model, SERVER), [_ingress(clients)], egress_rules(egress))


def scrape_policy(namespace: str, sources: Sequence[str]) -> Object:
    """Return the policy that lets Prometheus in the namespaces `sources` read the metrics of servers."""
    ingress = _ingress([_in_namespace(each) for each in sources])
    return _policy("allow-prometheus", namespace, {COMPONENT: SERVER}, [ingress], None)


def egress_policy(name: str, namespace: str, selector: Mapping[str, str], egress: Iterable[Endpoint]) -> Object:
    """Return the policy of pods that only connect to others."""
    return _policy(name, namespace, selector, [], egress_rules(egress))


def egress_rules(endpoints: Iterable[Endpoint]) -> list[Object]:
    """Return one rule for each endpoint, without duplicates."""
    rules = []
    for each in sorted(set(endpoints), key=lambda found: (found.namespace or "", found.port)):
        to = {"to": [_in_namespace(each.namespace)]} if each.namespace else {}
        rules.append({**to, "ports": [{"protocol": "TCP", "port": each.port}]})
    return rules


def _in_namespace(name: str) -> Object:
    return {"namespaceSelector": {"matchLabels": {NAMESPACE_NAME: name}}}


def _ingress(sources: Sequence[Object]) -> Object:
    return {"from": list(sources), "ports": [{"protocol": "TCP", "port": HTTP_PORT}]}


def _policy(
    name: str,
    namespace: str,
    selector: Mapping[str, str],
    ingress: list[Object] | None,
    egress: list[Object] | None,
) -> Object:
    """Return a NetworkPolicy. None: it says nothing about this direction; an empty list: it allows nothing."""
    rules = {"Ingress": ingress, "Egress": egress}
    spec: Object = {
        "podSelector": {"matchLabels": dict(selector)} if selector else {},
        "policyTypes": [direction for direction, found in rules.items() if found is not None],
    }
    if ingress:
        spec["ingress"] = ingress
    if egress:
        spec["egress"] = egress
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(name, namespace, selector),
        "spec": spec,
    }
