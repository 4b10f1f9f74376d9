"""The tables of `inferctl deploy --explain`."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from inferctl.cli import console
from inferctl.core.sizes import size
from inferctl.deploy import explain
from inferctl.deploy.figure import Figure, shown
from inferctl.deploy.placement import running_at_peak
from inferctl.deploy.plan import DeploymentPlan, ModelPlan


def report(plan: DeploymentPlan) -> None:
    """Print each figure of the plan with its formula and source, and the replicas of all flavors."""
    pieces: list[RenderableType] = [
        piece for model in plan.models for piece in (_title(model), _table(model, plan), Text())
    ]
    pieces += [Text("Replicas", style="bold"), _summary(plan)]
    console.report(Group(*pieces))


def _title(model: ModelPlan) -> RenderableType:
    flavors = ", then ".join(f"{flavor.hardware.key} in {flavor.precision}" for flavor in model.flavors)
    return Text(f"{model.name}: {model.task} on {flavors}", style="bold")


def _table(model: ModelPlan, plan: DeploymentPlan) -> RenderableType:
    # Formula and source share a column: side by side, they would leave a few letters per line on a narrow terminal.
    table = console.table(("figure", "value", "formula and source"))
    scope = None
    for where, figure in explain.rows(model, plan.clusters):
        if where != scope:
            table.add_row(where, "", "", style="bold")
            scope = where
        origin = Text(figure.formula)
        origin.append(f"\n{figure.source}" if figure.formula else figure.source, style="dim")
        # The name may need two lines, which both have the indentation.
        table.add_row(Padding(figure.name, (0, 0, 0, 2)), _value(figure), origin)
    return table


def _summary(plan: DeploymentPlan) -> RenderableType:
    figures = ("min", "peak", "max", "overflow")
    table = console.table(("flavor", "cluster", *figures), right=figures)
    for model in plan.models:
        for flavor in model.flavors:
            for cluster in plan.clusters:
                placed = flavor.at(cluster)
                if not placed.max_replicas.value:
                    continue
                counts = [placed.min_replicas.value, running_at_peak(placed), placed.max_replicas.value]
                if placed.replicas:
                    counts = [placed.replicas.value] * 3
                overflow = placed.overflow.value if placed.overflow else 0
                table.add_row(flavor.name, cluster.name, *map(str, counts), str(overflow))
    return table


def _value(figure: Figure) -> str:
    if figure.unit == "bytes":
        return size(int(figure.value), 1)
    unit = figure.unit
    if figure.value == 1 and unit in ("replicas", "probes", "cores", "servers"):
        unit = unit.removesuffix("s")
    return f"{shown(figure.value)} {unit}"
