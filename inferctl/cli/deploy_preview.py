"""The preview of `inferctl deploy --preview`: on which nodes pods fit, what a spike evicts, what a loss costs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from inferctl.cli import console, deploy_files
from inferctl.core.errors import InferctlError, UsageError
from inferctl.deploy.plan import DeploymentPlan
from inferctl.manifests.preview import drills, nodes_file, overlays, report, simulation, workloads
from inferctl.manifests.preview.simulation import natural

_SHOWN_NAMES = 4
_SHOWN_NODES = 12
# Filters that look only at the node and the pod.
_LASTING = ("NodeUnschedulable", "TaintToleration", "NodeAffinity")


def preview(nodes: Sequence[Path], manifests: Sequence[Path], *, as_json: bool) -> int:
    """Print the preview of `manifests` on the clusters of the nodes files, and return the exit code.

    Raises `InferctlError` (exit code 1) if pods do not fit at rest, `UsageError` and `SpecError`.
    """
    outcomes = _simulate(nodes, manifests)
    if not any(outcome.workloads for outcome in outcomes):
        raise UsageError("the manifests have no Deployment and no Job", "name files or folders with some")
    result = report.document(outcomes, drills.run(outcomes))
    if as_json:
        console.document(result)
    else:
        console.report(Group(*_pieces(result)))
    if result["fits_at_rest"]:
        return 0
    waiting = sum(
        len(group["names"])
        for cluster in result["clusters"]
        for deployment in cluster["deployments"]
        if not deployment["placeholder"]  # may wait: it then makes an autoscaler add a node
        for group in deployment["pods"]
        if group["phase"] == "rest" and (group["refused"] or not (group["feasible"] or group["preemption"]))
    )
    raise InferctlError(
        f"{_count(waiting, 'pod')} at rest {'does' if waiting == 1 else 'do'} not fit on the nodes",
        "add nodes to the nodes file, or lower min_replicas",
    )


def of_plan(plan: DeploymentPlan, nodes: Sequence[Path], *, as_json: bool) -> int:
    """Print the preview of the manifests of `plan`, and return the exit code of `preview`."""
    with tempfile.TemporaryDirectory(prefix="inferctl-deploy-") as folder:
        deploy_files.write(plan, Path(folder))
        return preview(nodes, [Path(folder)], as_json=as_json)


def _simulate(nodes: Sequence[Path], manifests: Sequence[Path]) -> list[Any]:
    names = [cluster.name for cluster in nodes_file.read(nodes)]
    objects = overlays.read(manifests, names)
    outcomes = []
    for cluster in nodes_file.read(nodes, objects):
        found = workloads.find([each.data for each in objects[cluster.name]])
        try:
            outcomes.append(simulation.run(cluster, found))
        except ValueError as error:
            raise UsageError(
                f"a Deployment cannot be read: {error}", "check it with `inferctl deploy --lint`"
            ) from None
    return outcomes


def _pieces(result: Mapping[str, Any]) -> Iterator[RenderableType]:
    for cluster in result["clusters"]:
        yield Text(f"Cluster {cluster['name']}: {_count(cluster['nodes'], 'node')}", style="bold")
        for deployment in cluster["deployments"]:
            yield Text()
            yield Text(_title(deployment), style="bold")
            yield _table(deployment)
        for line in _evictions(cluster):
            yield Text()
            yield Text(line)
        for note in cluster["notes"]:
            yield Text(f"note: {note}")
        yield Text()
    if result["drills"]:
        yield from _drills(result["drills"])


def _title(deployment: Mapping[str, Any]) -> str:
    least, most = deployment["min_replicas"], deployment["max_replicas"]
    replicas = f"{least} to {most} replicas" if most > least else _count(most, "replica")
    requests = ", ".join(f"{amount} {name}" for name, amount in deployment["requests"].items())
    running = f"{deployment['running']} exist" if deployment["running"] else ""
    parts = (replicas, f"each {requests}" if requests else "", running)
    kind = " (placeholders)" if deployment["placeholder"] else ""
    return f"{deployment['name']}{kind}: {'; '.join(part for part in parts if part)}"


def _table(deployment: Mapping[str, Any]) -> RenderableType:
    """Return one row for each group of pods with the same result: when, which pods, and where they fit."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in ("indent", "when", "pods"):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    shown: list[tuple[object, set[str]]] = []
    for group in deployment["pods"]:
        when = "at rest" if group["phase"] == "rest" else "spike"
        # Pods of one Deployment differ only in what earlier ones took, so that most reasons repeat.
        new = [each for each in _decisive(group["infeasible"]) if not _known(each, shown)]
        shown += [(each["reasons"], set(each["nodes"])) for each in new]
        lines = [_where(group), *_not_feasible(new)]
        # As `Text`, since Rich reads [ ] in a string as markup.
        table.add_row("", when, Text(_numbers(group["names"], deployment["name"])), Text(lines[0]))
        for line in lines[1:]:
            table.add_row("", "", "", Text(line))
    if not deployment["pods"]:
        table.add_row("", "no new pods", "", "")
    return table


def _decisive(infeasible: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the reasons by nodes. What keeps a pod off a node in any state hides what else is missing there."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for each in infeasible:
        lasting = [reason for reason in each["reasons"] if reason["filter"] in _LASTING]
        reasons = lasting or each["reasons"]
        key = tuple(reason["text"] for reason in reasons)
        found.setdefault(key, {"nodes": [], "reasons": reasons})["nodes"] += each["nodes"]

    return [{**each, "nodes": sorted(each["nodes"], key=natural)} for each in found.values()]


def _known(entry: Mapping[str, Any], shown: Sequence[tuple[object, set[str]]]) -> bool:
    return any(reasons == entry["reasons"] and nodes >= set(entry["nodes"]) for reasons, nodes in shown)


def _where(group: Mapping[str, Any]) -> str:
    if group["refused"]:
        return f"refused at admission: {group['refused']}"
    if group["feasible"]:
        one = "" if len(group["feasible"]) == 1 else "one of "
        return f"{one}{_some(group['feasible'])}"
    if group["preemption"]:
        return f"no free node; {'evict' if len(group['names']) > 1 else 'evicts'} {_victims(group)}"
    why = f" ({group['no_preemption']})" if group["no_preemption"] else ""
    return f"{'wait' if len(group['names']) > 1 else 'waits'}: no feasible node, and no pods to evict{why}"


def _not_feasible(infeasible: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for each in infeasible[:_SHOWN_NODES]:
        reasons = "; ".join(f"{reason['filter']}: {reason['text']}" for reason in each["reasons"])
        yield f"not {_some(each['nodes'])}: {reasons}"
    if len(infeasible) > _SHOWN_NODES:
        yield f"and {len(infeasible) - _SHOWN_NODES} more kinds of nodes; `--json` has all"


def _victims(group: Mapping[str, Any]) -> str:
    evicted = _some(group["evicted"])
    first = group["preemption"][0]
    lowest = f"priority {first['priorities'][0]}"
    budgets = f", against {_count(first['violated_budgets'], 'disruption budget')}" if first["violated_budgets"] else ""
    equal = [each["node"] for each in group["preemption"]]
    where = f"one of {_some(equal)}" if len(equal) > 1 else equal[0]
    return f"{_count(len(group['evicted']), 'pod')} ({lowest}{budgets}), first on {where}: {evicted}"


def _evictions(cluster: Mapping[str, Any]) -> Iterator[str]:
    for each in cluster["evicted"]:
        name = each["deployment"] or "other Deployments"
        total = each["placed_again"] + each["waiting"]
        text = f"The spike evicts {_count(total, 'pod')} of {name}: {each['placed_again']} fit elsewhere, "
        signal = " for new nodes of an autoscaler" if each["waiting"] else ""
        yield f"{text}{each['waiting']} wait{signal}."


def _drills(losses: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    of = sorted({loss["share"]["of"] for loss in losses})
    yield Text(f"Losses at the peak: share of {' or '.join(of)} that is served at once", style="bold")
    figures = ("pods", "before", "at once")
    table = console.table(("lost", "model", *figures), right=figures)
    several = len({loss["cluster"] for loss in losses}) > 1
    worst = report.worst(losses)
    shown = [loss for loss in worst if loss["share"]["at_once"] < 1]
    cluster = None
    for loss in shown:
        if several and loss["cluster"] != cluster and loss["scope"] in ("node", "zone"):
            cluster = loss["cluster"]
            table.add_row(Text(f"in {cluster}"), style="bold")
        share = loss["share"]
        place = f"{loss['scope']} {loss['place']}" + (" (the worst)" if loss["scope"] == "node" else "")
        cells = (Text(place), Text(loss["model"]), str(loss["lost"]))
        table.add_row(*cells, _percent(share["before"]), _percent(share["at_once"]))
    if shown:
        yield table
    if rest := len(worst) - len(shown):
        yield Text(f"{_count(rest, 'other loss')} of a node, zone or cluster leave all of it served at once.")
    yield Text("To see where their pods fit, remove lost nodes and their pods from the nodes file, and preview again.")


def _numbers(names: Sequence[str], deployment: str) -> str:
    """Return the pods of a group by their numbers: `pods 3-5`. A pod that exists already has its name."""
    numbers = [name.removeprefix(f"{deployment}-") for name in names]
    if not all(number.isdigit() for number in numbers):
        return ", ".join(names)
    return f"pod {numbers[0]}" if len(numbers) == 1 else f"pods {numbers[0]}-{numbers[-1]}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN_NAMES])
    return shown if len(names) <= _SHOWN_NAMES else f"{shown} and {len(names) - _SHOWN_NAMES} more"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 'es' if what.endswith('s') else 's'}"


def _percent(share: float) -> str:
    # Rounded down, so that 99.9% is not shown as all.
    return f"{int(share * 100 + 1e-9)}%"
