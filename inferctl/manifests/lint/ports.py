"""Rules on ports: what a server listens on, and what its container, its probes and its Services say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from inferctl.manifests.kubernetes.fields import get, integer, mapping, sequence, text
from inferctl.manifests.lint import models
from inferctl.manifests.lint.finding import Hit, rule
from inferctl.manifests.lint.manifests import ManifestContainer, Manifests

_PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
# Of servers that listen on several ports, such as --metrics-port.
_OTHER_OPTION = re.compile(r"--[\w-]+[-_]port")


@rule(
    "port-name-unknown",
    "error",
    "placement",
    finds="a targetPort of a Service, or the port of a probe, with a name that no port of the pods or container has",
    consequence="the Service has no endpoints for this port, so requests to it fail; the probe fails",
    fix="use the name of a port in ports of the container, or a number",
)
def _port_names(manifests: Manifests) -> Iterator[Hit]:
    for service in manifests.of("Service"):
        known = [workload.port_names for workload in manifests.behind(service)]
        names = set().union(*(each for each in known if each))
        for index, port in enumerate(sequence(service.data, "spec", "ports")):
            target = get(port, "targetPort")
            if known and None not in known and isinstance(target, str) and target not in names:
                what = f"no container of the selected pods has a port named {target!r}{_or(names)}"
                yield Hit(service, ("spec", "ports", index, "targetPort"), what)
    for workload in manifests.workloads:
        for each in workload.all_containers if workload.port_names is not None else ():
            for path, port in (_probe_port(each.data, key) for key in _PROBES):
                # A port may also be a number in quotes.
                if isinstance(port, str) and not port.isdigit() and port not in each.port_names:
                    what = f"{each.name} has no port named {port!r}{_or(each.port_names)}"
                    yield Hit(workload.object, (*each.path, *path), what)


def _or(names: Iterable[str]) -> str:
    """Return the names that there are, as the end of a sentence."""
    return f", but {', '.join(sorted(filter(None, names)))}" if any(names) else ""


@rule(
    "port-mismatch",
    "error",
    "placement",
    finds="a port of a container, a probe or a Service, by number, on which the server does not listen (--port)",
    consequence="probes fail, so the pod never becomes ready or is killed; requests to the Service are refused",
    fix="use the port of the server everywhere; containers, probes and Services can name it",
)
def _mismatch(manifests: Manifests) -> Iterator[Hit]:
    for workload in manifests.model_servers:
        for each in workload.containers:
            if listens := _listens(each):
                shown = f"and {each.name} listens on {' and '.join(map(str, sorted(listens)))}"
                declared = _declared(each)
                if declared and not listens & set(declared.values()):
                    yield Hit(
                        workload.object, (*each.path, "ports", 0), f"containerPort is {_first(declared)}, {shown}"
                    )
                # The containers of a pod have one address.
                others = {port for other in workload.containers if other.path != each.path for port in _ports(other)}
                for key in _PROBES:
                    path, port = _probe_port(each.data, key)
                    port = declared.get(port, port) if isinstance(port, str) else port
                    if isinstance(port, int) and port not in listens | others:
                        yield Hit(workload.object, (*each.path, *path), f"the {key} asks port {port}, {shown}")
    for service in manifests.of("Service"):
        behind = [each for each in manifests.behind(service) if each.is_model_server]
        known = [{port for container in each.containers for port in _ports(container)} for each in behind]
        headless = get(service.data, "spec", "clusterIP") == "None"
        if not known or not all(known) or headless or any(each.port_names is None for each in behind):
            continue
        sure = all(any(_listens(container) for container in each.containers) for each in behind)
        for index, port in enumerate(sequence(service.data, "spec", "ports")):
            target = get(port, "targetPort") or get(port, "port")
            if isinstance(target, int) and target not in set().union(*known):
                shown = ", ".join(map(str, sorted(set().union(*known))))
                what = f"targetPort is {target}, and the pods of {behind[0].object.name} have {shown}"
                yield Hit(service, ("spec", "ports", index), what, level=None if sure else "warning")


def _listens(container: ManifestContainer) -> set[int]:
    """Return the ports that the command line or the environment names; none without that of the server (--port)."""
    if "ray" in container.words:
        return set()  # its --port is that of Ray
    main = _numbers(models.values(container, ("--port",), ("PORT", "INFERCTL_SERVE_PORT")))
    options = [word.partition("=")[0] for word in container.expanded if _OTHER_OPTION.match(word)]
    return main | _numbers(models.values(container, options)) if main else set()


def _numbers(values: Iterable[str]) -> set[int]:
    return {int(value) for value in values if value.isascii() and value.isdigit() and len(value) <= 5}


def _declared(container: ManifestContainer) -> dict[str, int]:
    """Return the ports in the manifest by name, or by their number without one."""
    numbers = [(text(each, "name"), integer(each, "containerPort")) for each in sequence(container.data, "ports")]
    return {name or str(number): number for name, number in numbers if number is not None}


def _ports(container: ManifestContainer) -> set[int]:
    return _listens(container) | set(_declared(container).values())


def _first(declared: dict[str, int]) -> int:
    return next(iter(declared.values()))


def _probe_port(container: Any, key: str) -> tuple[tuple[str, ...], Any]:
    """Return the path of the port of a probe, and the port, by name or number; None if it has none."""
    for handler in ("httpGet", "tcpSocket", "grpc"):
        if mapping(container, key, handler):
            return (key, handler, "port"), get(container, key, handler, "port")
    return (key,), None
