"""Makes the plan of a deployment from specs, clusters and receipts, and checks that each model fits its hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from inferctl.config.deploy_spec import Flavor
from inferctl.config.spec import Spec, Task
from inferctl.config.spec_types import CACHED
from inferctl.core.errors import InferctlError, UsageError
from inferctl.core.sizes import parse_size
from inferctl.deploy import cluster_limits, gpu, key_limits, measured, placement, sizing
from inferctl.deploy.clusters import Cluster
from inferctl.deploy.endpoints import endpoint
from inferctl.deploy.figure import shown
from inferctl.deploy.plan import DeploymentPlan, FlavorPlan, ModelPlan, Rate, Sharing, TrafficPlan, Warned, object_name
from inferctl.facts import catalog
from inferctl.facts.catalog import Hardware
from inferctl.models import fit, generation_fit, image_source
from inferctl.models import model as model_folder
from inferctl.models.fit import Fit, ModelSize, UnknownSize
from inferctl.models.model import IMAGE_FOLDER
from inferctl.models.weights_folders import downloads, weights_folders

T = TypeVar("T")
R = TypeVar("R")

# Findings about the stack of the spec's image, which a flavor with another image does not use.
_OF_THE_IMAGE = ("kernels", "driver")
# From this factor between the tokens of a request, a rate of tokens per second carries over less well.
_DIFFERENT_LENGTHS = 2.0


@dataclass(frozen=True)
class SpecSource:
    """A spec with what is known about its model. `folder` is that of the spec file, for the paths of receipts.

    `models`: the models of a spec with several, each as a source. `size` is then that of all, and `task` of the first.
    `digest`: returns the sha256 of the model, which can take seconds; None if the model is not on this machine.
    `file`: the spec file, for messages.
    """

    spec: Spec
    folder: Path
    size: ModelSize | UnknownSize
    task: Task
    digest: Callable[[], str] | None = None
    file: str | None = None
    models: tuple[SpecSource, ...] = ()


def of_several(spec: Spec, models: Sequence[SpecSource]) -> SpecSource:
    """Return a spec with several models as a source. Its size has no parameters: each model fits with its own."""
    sizes = [each.size for each in models]
    unknown = next((each for each in sizes if isinstance(each, UnknownSize)), None)
    total = ModelSize(0, {}, sum(each.weights_bytes for each in sizes if isinstance(each, ModelSize)))
    return replace(models[0], spec=spec, size=unknown or total, digest=None, models=tuple(models))


def make_plan(
    sources: Sequence[SpecSource], clusters: Sequence[Cluster], kubernetes: str | None = None, *, images: bool = True
) -> DeploymentPlan:
    """Return the plan. `kubernetes`: version of all clusters, instead of theirs.

    `images`: whether each flavor must have an image. Arithmetic needs none: a missing one is then a warning.

    Raises `UsageError` for settings that contradict each other, the receipts or the hardware.
    """
    if kubernetes:
        clusters = [cluster.model_copy(update={"kubernetes": kubernetes}) for cluster in clusters]
    namespaces = {source.spec.deploy.namespace for source in sources}
    if len(namespaces) > 1:
        raise UsageError(
            f"the specs have several namespaces: {', '.join(sorted(namespaces))}",
            "set the same deploy.namespace, or run `inferctl deploy` once per namespace",
        )

    def model_of(source: SpecSource) -> ModelPlan:
        try:
            return _model(source, tuple(clusters), images=images)
        except UsageError as error:
            where = f"{source.file}: " if source.file and len(sources) > 1 else ""
            raise UsageError(f"{where}{error.message}", error.hint) from None

    models = tuple(_each(sources, model_of))
    names = [each.name for each in models]
    if twice := next((name for name in names if names.count(name) > 1), None):
        files = [str(source.file) for source, name in zip(sources, names, strict=True) if name == twice and source.file]
        where = f" ({', '.join(files)})" if files else ""
        raise UsageError(f"two specs have the name {twice}{where}", "give each spec its own `name`")
    bounded, namespace = cluster_limits.within_limits(models, clusters), namespaces.pop()
    warnings = [*bounded.warnings, *_without_hardware(bounded.value, clusters)]
    if shared := _shared_prometheus(clusters, namespace):
        warnings.append(
            f"{' and '.join(shared)} have one Prometheus outside of the cluster. The queries of the autoscalers have "
            "no label of the cluster: each would count the traffic of all. Give each a URL with its own series only"
        )
    return DeploymentPlan(namespace, bounded.value, tuple(clusters), tuple(warnings))


def _without_hardware(models: Sequence[ModelPlan], clusters: Sequence[Cluster]) -> list[str]:
    """Return a warning for each cluster that can run no model at all."""
    return [
        f"{cluster.name} can run no model: all flavors have at most 0 replicas there. Raise its max_replicas, or "
        "remove the cluster"
        for cluster in clusters
        if not any(each.at(cluster).max_replicas.value for model in models for each in model.flavors)
    ]


def _shared_prometheus(clusters: Sequence[Cluster], namespace: str) -> list[str]:
    """Return the clusters with the same Prometheus, which is no Service in each of them; empty if there are none."""
    outside = [each for each in clusters if each.prometheus and endpoint(each.prometheus, namespace).namespace is None]
    urls = [each.prometheus for each in outside]
    return [each.name for each in outside if urls.count(each.prometheus) > 1]


def _each(items: Iterable[T], make: Callable[[T], R]) -> list[R]:
    """Return `make` of each item. Raises `UsageError` with the errors of all items."""
    made: list[R] = []
    errors: list[UsageError] = []
    for item in items:
        try:
            made.append(make(item))
        except UsageError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        lines = [f"{error.message}{f' - {error.hint}' if error.hint else ''}" for error in errors]
        raise UsageError("\n".join([f"{len(lines)} errors", *lines]), "correct all of them, then run it again")
    return made


def _model(source: SpecSource, clusters: tuple[Cluster, ...], *, images: bool) -> ModelPlan:
    spec, settings = source.spec, source.spec.deploy
    name = spec.name.replace(".", "-")
    if not name[0].isalpha():
        raise UsageError(
            f"the name {name} starts with a digit, and the name of a Service must start with a letter",
            f"set `name` in the spec, as in `name: model-{name}`",
        )
    flavors = settings.flavors or [Flavor(hardware=key) for key in spec.hardware]  # type: ignore[call-arg]
    if not flavors:
        raise UsageError(
            f"{spec.name} has no hardware to run on", "set deploy.flavors, or `hardware: [l4]`, in the spec"
        )
    _check_settings(spec)
    # A spec without deploy.flavors has no index that an error could name.
    wheres = [
        f"deploy.flavors[{index}]" if settings.flavors else f"hardware {flavor.hardware}"
        for index, flavor in enumerate(flavors)
    ]
    planned = _each(zip(flavors, wheres, strict=True), lambda each: _flavor(source, name, *each, images=images))
    labels = [each.label for each in planned]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UsageError(f"two flavors of {name} have the name {twice}", "set `name` of one of them")
    rates = [each.rate for each in planned]
    traffic = _traffic(spec, rates)
    for flavor, each, where in zip(flavors, planned, wheres, strict=True):
        _check_limits(flavor, each, where, traffic.value)
    placed = [placement.place(spec, flavors, planned, traffic.value, cluster) for cluster in clusters]
    complete = tuple(
        replace(each, placements=tuple(of_cluster.value[index] for of_cluster in placed))
        for index, each in enumerate(planned)
    )
    servers = key_limits.servers(spec, complete, clusters)
    placing = [warning for each in placed for warning in each.warnings]
    warnings = [*(warning for each in planned for warning in each.warnings), *traffic.warnings, *placing]
    warnings += servers.warnings
    volumes = [each.volume for each in weights_folders(spec) if each.volume]
    warnings += [
        f"{spec.name}: {volume} has no digest, so pods that start later can get other weights: run `inferctl pin`"
        for volume in volumes
        if not image_source.digest(volume)
    ]
    if 0 < spec.serve.port < 1024:
        warnings.append(
            f"{spec.name}: serve.port is {spec.serve.port}, and some container runtimes give ports below 1024 to root "
            "only, which the pods are not: set 8080. The Service has port 80 in any case"
        )
    weights = source.size.weights_bytes if isinstance(source.size, ModelSize) else 0
    warned = tuple(dict.fromkeys(warnings))
    return ModelPlan(spec, name, tasks(source), complete, traffic.value, warned, servers.value, weights)


def tasks(source: SpecSource) -> tuple[Task, ...]:
    """Return the tasks of the models of a server."""
    return tuple(dict.fromkeys(each.task for each in source.models or (source,)))


def _check_settings(spec: Spec) -> None:
    settings = spec.deploy
    for each in weights_folders(spec):
        if each.weights == "mount" and not each.volume and not (each.path == IMAGE_FOLDER and settings.weights.pvc):
            claim = "set deploy.weights: {pvc: NAME}; or " if each.path == IMAGE_FOLDER else ""
            raise UsageError(
                f"{each.name} has mounted weights, but {'deploy.weights names no volume' if claim else 'no volume'}",
                "push the model with `inferctl model push`, and set model.source: oci://REFERENCE; or "
                f"{claim}set model.weights: bake",
            )
    if spec.models and settings.weights.pvc:
        raise UsageError("deploy.weights.pvc is of one model", "remove it, and set weights: bake, or push each model")
    if spec.models and (settings.bench or any(each.receipt for each in settings.flavors)):
        raise UsageError(
            f"{spec.name} has several models, and a receipt does not say how fast a mix of them is",
            "remove receipt and deploy.bench; set tokens_per_second of your mix, or min_replicas and max_replicas",
        )
    if not spec.access.keys and (settings.keys_secret or spec.access.budgets):
        what = "deploy.keys_secret" if settings.keys_secret else "access.budgets"
        raise UsageError(f"{what} is set, but the server asks for no keys", "set access.keys in the spec as well")
    if spec.access.keys and not settings.keys_secret:
        stored = spec.access.key_store is not None
        raise UsageError(
            f"access.keys is set, but no Secret has {'the URL of its database' if stored else 'the key file'} in the "
            "cluster",
            f"create a Secret with {'the URL under `url`' if stored else 'the key file under `keys.json`'} and set "
            "deploy.keys_secret to its name",
        )


def _flavor(source: SpecSource, model_name: str, flavor: Flavor, where: str, *, images: bool) -> FlavorPlan:
    spec = source.spec
    hardware = _hardware(flavor, source.folder, where)
    label = flavor.name or object_name(hardware.key)
    if not label:
        raise UsageError(f"{where}: {hardware.key} has no letter or digit for a name", f"set `name` in {where}")
    name = f"{model_name}-{label}"
    shared = flavor.shared_by > 1
    sharing: Sharing = "mig" if hardware.mig else "time-slicing" if shared else "whole"
    generate = source.task == "generate"
    gpus = spec.serve.gpus if generate else 1
    if gpus > 1 and shared:
        raise UsageError(
            f"{where}: serve.gpus is {gpus}, and with shared_by a pod gets a part of one GPU only",
            "use whole GPUs, or set serve.gpus: 1",
        )
    found = _rate(source, flavor, hardware, where)
    (rate, measured_precision), warnings = found.value, found.warnings
    if rate is None:
        warnings += (
            f"{name} has no rate, so it is not scaled by work: it keeps min_replicas. Set its receipt, or "
            "tokens_per_second",
        )
    image = _image(spec, flavor, where, required=images)
    effective = _fit(source, flavor, hardware, measured_precision or spec.serve.precision, where)
    memory, capacity = effective.memory, effective.capacity
    weights = source.size.weights_bytes if isinstance(source.size, ModelSize) else None
    load_time = sizing.load_s(rate, downloads=downloads(spec), models=len(source.models) or 1)
    period, failures = sizing.startup(load_time, model_folder.longest_start_s(weights) if generate else None)
    stop, drain = sizing.pre_stop_s(), sizing.drain_s(spec.serve.drain_seconds, rate)
    kv_cache = capacity.kv_cache_bytes if capacity else 0
    warnings += _unknown_weights(name, source, rate, fits=memory is not None)
    return FlavorPlan(
        name=name,
        label=label,
        hardware=hardware,
        # A setting of the server, which a model of several may override.
        precision=spec.serve.precision if source.models else effective.precision,
        image=image.value,
        sharing=sharing,
        shared_by=flavor.shared_by,
        rate=rate,
        fit=effective,
        resource=gpu.resource(hardware, gpus, shared_by=flavor.shared_by),
        placements=(),
        load_s=load_time,
        cold_start_s=sizing.cold_start(spec.deploy.cold_start_s, load_time),
        startup_period_s=period,
        startup_failures=failures,
        pre_stop_s=stop,
        drain_s=drain,
        grace_s=sizing.grace_s(stop, spec.serve.grace_seconds, drain),
        memory_bytes=sizing.memory_bytes(
            rate,
            memory.weights if memory else None,
            memory.total + kv_cache if memory and hardware.kind == "cpu" else None,
            cache=parse_size(spec.cache.size) if spec.cache.size and {*CACHED} & {*tasks(source)} else 0,
            gpus=gpus if hardware.kind == "cuda" else 1,
        ),
        cpu=sizing.cores(
            rate,
            sizing.relay_cores(spec),
            gpus if hardware.kind == "cuda" else 1,
            spec.serve.least_api_processes,
        ),
        warnings=warnings + image.warnings,
    )


def _unknown_weights(name: str, source: SpecSource, rate: Rate | None, *, fits: bool) -> tuple[str, ...]:
    """Return a warning about what lacks the size of the weights, if it is unknown. `fits`: whether the fit is known."""
    weights = isinstance(source.size, ModelSize) and source.size.weights_bytes
    lacking = {
        "memory limit": not fits and not (rate and rate.memory_bytes),
        "startup probe": source.task == "generate" and not weights and not (rate and rate.load_s),
        "volume of the download": not weights and downloads(source.spec),
    }
    if not any(lacking.values()):
        return ()
    return (
        f"{name}: the size of the weights is unknown, so they do not count in its "
        f"{' and '.join(what for what, lacks in lacking.items() if lacks)}, and pods can be killed: run "
        "`inferctl deploy` where the model can be read, or set a receipt",
    )


def _hardware(flavor: Flavor, folder: Path, where: str) -> Hardware:
    key = flavor.hardware
    try:
        return catalog.hardware(str(folder / key) if key.endswith((".yaml", ".yml")) else key)
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", error.hint) from None


def _rate(source: SpecSource, flavor: Flavor, hardware: Hardware, where: str) -> Warned[tuple[Rate | None, str | None]]:
    """Return the rate of a flavor, and the precision that its receipt measured."""
    if flavor.receipt is None:
        if flavor.tokens_per_second is None:
            return Warned((None, None))
        formula = f"{shown(flavor.tokens_per_second)} tokens/s assumed in the spec, not measured"
        return Warned((Rate(flavor.tokens_per_second, measured=False, source=formula), None))
    path = Path(flavor.receipt).expanduser()
    try:
        found = measured.read(
            path if path.is_absolute() else source.folder / path, hardware, source.task, source.digest, source.spec.slo
        )
    except InferctlError as error:
        raise type(error)(f"{where}: {error.message}", error.hint) from None
    warnings = found.warnings
    if flavor.shared_by > 1:
        warnings += (
            f"{path.name} does not say how fast a pod is while {flavor.shared_by} pods share its GPU: measure with the "
            "others under load, or set a lower tokens_per_second instead",
        )
    return Warned(found.value, warnings)


def _fit(source: SpecSource, flavor: Flavor, hardware: Hardware, precision: str, where: str) -> Fit:
    """Return how the model fits its part of the GPU. Raises `UsageError` if it does not."""
    part, share = hardware, flavor.shared_by
    if share > 1 and source.task == "generate":
        # vLLM takes serve.gpu_memory_share of the whole GPU, so the part of a pod is already in it.
        _check_memory_share(source, share, where)
    elif share > 1 and hardware.memory_bytes:
        part = replace(hardware, memory_bytes=hardware.memory_bytes // share)
    base, fits = catalog.base(source.spec.image.base), {}
    check = generation_fit.check_part if source.task == "generate" else fit.check_part
    for each in source.models or (source,):
        # One of several models may have its own.
        own = each.spec.serve.precision if source.models else precision
        spec = each.spec.model_copy(update={"serve": each.spec.serve.model_copy(update={"precision": own})})
        fits[spec.name] = check(spec, base, catalog.stack(base.stack), part, each.size)
    found = fit.together(fits, part)
    errors = [each for each in found.findings if each.level == "error"]
    if flavor.image:
        errors = [each for each in errors if each.topic not in _OF_THE_IMAGE]
    if errors:
        first = errors[0]
        raise UsageError(f"{where}: {hardware.key}: {first.what}: {first.why}", first.hint)
    return found


def _check_memory_share(source: SpecSource, share: int, where: str) -> None:
    wanted = source.spec.serve.gpu_memory_share
    if wanted > 1 / share:
        raise UsageError(
            f"{where}: {share} pods share a GPU, but each takes serve.gpu_memory_share: {wanted:g} of its memory",
            f"set serve.gpu_memory_share to at most {int(95 / share) / 100:g}",
        )


def _image(spec: Spec, flavor: Flavor, where: str, *, required: bool) -> Warned[str]:
    if spec.image.tag is None and not flavor.image and not required:
        missing = f"{where} has no image: `--output` needs one (`image` of the flavor, as name@digest)"
        return Warned(spec.repository, (missing,))
    image = flavor.image or f"{spec.repository}:{spec.image.tag}"
    if spec.image.tag is None and not flavor.image:
        raise UsageError(
            f"{where} has no image: image.tag is not set, so the tag depends on the content of the image",
            "set `image` of the flavor to the name@digest that `docker push` prints",
        )
    movable = f"{where}: the image {image} has no digest, so its tag can be moved"
    return Warned(image, () if "@sha256:" in image else (movable,))


def _traffic(spec: Spec, rates: Sequence[Rate | None]) -> Warned[TrafficPlan | None]:
    settings = spec.deploy.traffic
    measured_tokens = [rate for rate in rates if rate and rate.tokens_per_request]
    tokens, source = settings.tokens_per_request, "spec deploy.traffic"
    if tokens is None and measured_tokens:
        tokens, source = measured_tokens[0].tokens_per_request, measured_tokens[0].origin
    if tokens is None:
        if settings.peak_rps is not None:
            raise UsageError(
                f"deploy.traffic of {spec.name} has no tokens_per_request, and no receipt has them",
                "set deploy.traffic.tokens_per_request",
            )
        return Warned(None)
    warnings = []
    for rate in measured_tokens:
        known = rate.tokens_per_request or tokens
        if max(known / tokens, tokens / known) > _DIFFERENT_LENGTHS:
            warnings.append(
                f"{rate.origin} has {shown(known)} tokens per request, the traffic {shown(tokens)}: "
                "measure with requests of that length"
            )
    return Warned(sizing.traffic(settings, tokens, source), tuple(warnings))


def _check_limits(flavor: Flavor, planned: FlavorPlan, where: str, traffic: TrafficPlan | None) -> None:
    """Raise `UsageError` for a flavor whose replicas cannot be computed and are not set."""
    if planned.rate is not None and traffic is not None:
        return
    missing = [key for key in ("min_replicas", "max_replicas") if getattr(flavor, key) is None]
    if missing:
        lacks = "a rate (receipt or tokens_per_second)" if planned.rate is None else "deploy.traffic"
        raise UsageError(
            f"{where if where.endswith(flavor.hardware) else f'{where} ({flavor.hardware})'} has no "
            f"{' and no '.join(missing)}, and without {lacks} they cannot be computed",
            f"set {' and '.join(missing)}, or add {lacks}",
        )
