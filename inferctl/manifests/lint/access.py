"""Rules on what a pod has and who may reach it: secrets, tokens, network policies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from inferctl.manifests.kubernetes import selectors
from inferctl.manifests.kubernetes.fields import get, integer, mapping, sequence, text
from inferctl.manifests.lint.finding import Hit, rule
from inferctl.manifests.lint.manifests import ManifestContainer, Manifests, ManifestWorkload, same_namespace
from inferctl.manifests.manifests_file import Located

_SECRET_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|PASSWORD|PASSWD|SECRET|API_?KEYS?|(?:SECRET_)?ACCESS_KEY|SECRET_KEY|PRIVATE_KEY|CREDENTIALS?)$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(r"(?:hf_|sk-|nvapi-|ghp_|AKIA|xox[bp]-|eyJ)[A-Za-z0-9_-]{12,}|://[^:/@\s]+:[^@/\s$]+@")
_SECRET_OPTION = re.compile(r"--(?:api-key|hf-token|token|password|auth-token)$")
# Values that only mark a place, such as <your token>, ${TOKEN} or CHANGEME.
_PLACE = re.compile(
    r"[<$({].*|.*(?:your|change-?me|example|replace|xxx|\*\*\*).*|empty|none|null|dummy|fake|not-?needed|true|false|",
    re.IGNORECASE,
)
# The value of GOOGLE_APPLICATION_CREDENTIALS and the like: where the secret is mounted.
_FILE = re.compile(r"/(?:app|config|data|etc|home|mnt|opt|root|run|secrets?|tmp|usr|var)/[\w./-]+")


@rule(
    "secret-in-manifest",
    "error",
    "access",
    finds="the value of a secret in an environment variable, an argument or a Secret",
    consequence="everyone who can read the pod or the repository has the secret, and its history keeps it",
    fix="refer to it with valueFrom.secretKeyRef or a mounted file, and make the Secret outside of the repository",
)
def _secret(manifests: Manifests) -> Iterator[Hit]:
    for workload in manifests.workloads:
        for each in workload.all_containers:
            for index, variable in enumerate(sequence(each.data, "env")):
                name, value = text(variable, "name"), text(variable, "value")
                named = _SECRET_NAME.search(name) and not _PLACE.fullmatch(value) and not value.isdigit()
                if (named and not _FILE.fullmatch(value)) or _SECRET_VALUE.search(value):
                    yield Hit(workload.object, (*each.path, "env", index), f"{name} has its value in the manifest")
            yield from _in_words(workload, each)
    for secret in manifests.of("Secret"):
        for key in ("data", "stringData"):
            values = {name: value for name, value in mapping(secret.data, key).items() if isinstance(value, str)}
            shown = [name for name, value in values.items() if not _PLACE.fullmatch(value)]
            if shown:
                yield Hit(secret, (key, shown[0]), f"it has the value of {', '.join(shown)}", level="warning")


def _in_words(workload: ManifestWorkload, container: ManifestContainer) -> Iterator[Hit]:
    words = container.words
    for index, word in enumerate(words):
        option, _, value = word.partition("=")
        value = value or (words[index + 1] if index + 1 < len(words) else "")
        if _SECRET_OPTION.match(option) and not _PLACE.fullmatch(value.strip("'\"")) and not value.startswith("-"):
            key = "args" if get(container.data, "args") else "command"
            yield Hit(workload.object, (*container.path, key), f"{option} has its value in the manifest")


@rule(
    "service-links",
    "error",
    "life",
    finds="vLLM in the namespace of a Service named vllm",
    consequence="Kubernetes sets VLLM_PORT=tcp://... in its pods; vLLM reads it as its own setting and does not start",
    fix="set enableServiceLinks: false, or rename the Service",
)
def _links(manifests: Manifests) -> Iterator[Hit]:
    for workload in manifests.model_servers:
        words = " ".join(f"{each.image} {' '.join(each.words)}" for each in workload.containers)
        for service in manifests.of("Service"):
            if (
                service.name == "vllm"
                # A headless Service has no address to tell.
                and get(service.data, "spec", "clusterIP") != "None"
                and "vllm" in words
                and same_namespace(service, workload.object)
                and (get(workload.spec, "enableServiceLinks") is not False)
            ):
                path = (*workload.spec_path, "enableServiceLinks")
                yield Hit(workload.object, path, "the Service vllm sets VLLM_PORT in the pods")


def _policies(manifests: Manifests, workload: ManifestWorkload) -> list[Located]:
    """Return the NetworkPolicies that restrict the incoming traffic of a workload."""
    return [
        each
        for each in manifests.of("NetworkPolicy")
        if same_namespace(each, workload.object)
        and selectors.matches(mapping(each.data, "spec", "podSelector"), workload.labels)
        and "Ingress" in (sequence(each.data, "spec", "policyTypes") or ["Ingress"])
    ]


def _admits(policy: Located, workload: ManifestWorkload, port: Any, *, from_elsewhere: bool) -> bool:
    """Return whether a policy admits traffic to a port, `from_elsewhere`: of another namespace."""
    for each in sequence(policy.data, "spec", "ingress"):
        ports = sequence(each, "ports")
        if ports and not any(_covers(workload, item, port) for item in ports):
            continue
        peers = sequence(each, "from")
        if not peers or not from_elsewhere or any(get(peer, "namespaceSelector") is not None for peer in peers):
            return True
        if any(get(peer, "ipBlock") is not None for peer in peers):
            return True
    return False


def _covers(workload: ManifestWorkload, item: Any, port: Any) -> bool:
    """Return whether `item` of a policy (all ports, a port or a range) has `port`, each by name or number."""
    ports = [each for container in workload.containers for each in sequence(container.data, "ports")]
    numbers = {text(each, "name"): get(each, "containerPort") for each in ports}
    first, last = get(item, "port"), integer(item, "endPort")
    if first is None:
        return True
    first, port = numbers.get(str(first), first), numbers.get(str(port), port)
    if last is not None and isinstance(first, int) and isinstance(port, int):
        return first <= port <= last
    return bool(first == port)


@rule(
    "policy-blocks-port",
    "error",
    "access",
    finds="a NetworkPolicy that lets no traffic through to the port of a Service",
    consequence="the Service has endpoints that are ready, and every connection to it times out",
    fix="add an ingress rule for the port",
)
def _blocked(manifests: Manifests) -> Iterator[Hit]:
    for service in manifests.of("Service"):
        for workload in manifests.behind(service):
            policies = _policies(manifests, workload)
            for port in sequence(service.data, "spec", "ports"):
                target = get(port, "targetPort") or get(port, "port")
                if policies and not any(_admits(each, workload, target, from_elsewhere=False) for each in policies):
                    name = text(port, "name") or integer(port, "port")
                    what = f"port {name} of the Service {service.name} is not in its ingress rules"
                    yield Hit(policies[0], ("spec", "ingress"), what)


@rule(
    "policy-hides-metrics",
    "error",
    "observability",
    finds="a NetworkPolicy that keeps Prometheus from the metrics of a model server",
    consequence="dashboards are empty, alerts are silent, and an autoscaler on these metrics does nothing",
    fix="admit the namespace of Prometheus (namespaceSelector) to the port of /metrics",
)
def _hidden(manifests: Manifests) -> Iterator[Hit]:
    for workload in manifests.model_servers:
        policies, port = _policies(manifests, workload), _metrics_port(manifests, workload)
        if (
            policies
            and port is not None
            and not any(_admits(each, workload, port, from_elsewhere=True) for each in policies)
        ):
            what = f"no rule admits another namespace to port {port} of {workload.object.name}"
            yield Hit(policies[0], ("spec", "ingress"), what)


def _metrics_port(manifests: Manifests, workload: ManifestWorkload) -> str | int | None:
    """Return the port that Prometheus scrapes in another namespace; None if nothing says so."""
    services = [service for service in manifests.of("Service") if workload in manifests.behind(service)]
    for monitor in manifests.of("ServiceMonitor") if services else ():
        for service in services:
            if selectors.matches(mapping(monitor.data, "spec", "selector"), service.labels):
                name = get(monitor.data, "spec", "endpoints", 0, "port")
                for port in sequence(service.data, "spec", "ports"):
                    if get(port, "name") == name:
                        found = get(port, "targetPort") or get(port, "port")
                        return found if isinstance(found, (str, int)) else None
    annotations = mapping(workload.template, "metadata", "annotations")
    if str(annotations.get("prometheus.io/scrape")).lower() == "true":
        number = str(annotations.get("prometheus.io/port") or "")
        return int(number) if number.isdigit() else None
    return None
