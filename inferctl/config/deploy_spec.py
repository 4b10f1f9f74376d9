"""The section `deploy` of `inferctl.yaml`: what `inferctl deploy` needs to know about traffic, hardware and cluster."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from inferctl.config.spec_types import IMAGE_REFERENCE, OneLine, Section
from inferctl.core.addresses import StoreAddress

# A name of an object in Kubernetes, and of a label or a Service (DNS label).
DNS_NAME = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$"
DNS_LABEL = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"
DnsLabel = Annotated[str, Field(pattern=DNS_LABEL, max_length=63)]
ObjectName = Annotated[str, Field(pattern=DNS_NAME, max_length=253)]


class _ClusterAddress(StoreAddress):
    """A server that manifests name."""

    what = "a server in the clusters"
    example = "http://host:9090"
    schemes = ("http", "https")

    @classmethod
    def _valid(cls, found: re.Match[str]) -> bool:
        return super()._valid(found) and bool(found["host"]) and "," not in found["host"] and found["port"] != ":0"


def _public(text: str) -> str:
    """Return an address. Raises an error of pydantic if it has a user or a password, which manifests would show."""
    address = _ClusterAddress.of(text)
    if address.hidden:
        raise PydanticCustomError(
            "address",
            "the URL has a user or a password, which the manifests would show: remove it, and add it from a Secret in "
            "an overlay of your own",
            {"hint": None},
        )
    return str(address)


Url = Annotated[str, Field(max_length=2000), AfterValidator(_public)]
Image = Annotated[str, Field(pattern=rf"^{IMAGE_REFERENCE}$")]
Omitted = Literal[
    "Namespace",
    "NetworkPolicy",
    "NetworkPolicy/default-deny",
    "PriorityClass",
    "PrometheusRule",
    "ResourceQuota",
    "ServiceMonitor",
]
Replicas = Annotated[int, Field(ge=0, le=10_000)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class Flavor(Section):
    """One kind of hardware, with its image, precision and measured rate. Each flavor becomes one Deployment."""

    hardware: OneLine = Field(description="Hardware: an entry of benchmarks/hardware/ or a YAML file.")
    name: DnsLabel | None = Field(
        None, description="Name of the flavor in object names. Default: the hardware, with `-` in place of `.`."
    )
    receipt: OneLine | None = Field(
        None, description="Receipt of `inferctl bench` on this hardware, from which the measured rate is read."
    )
    tokens_per_second: float | None = Field(
        None,
        ge=0.001,
        le=1e9,
        description="Rate of one replica without a receipt. It is called assumed in every output.",
    )
    image: Image | None = Field(
        None, description="Image of this flavor, preferably with a digest. Default: `image.repository` and `image.tag`."
    )
    shared_by: int = Field(
        1, ge=1, le=48, description="Number of pods that share one GPU by time slicing. 1: each has its own."
    )
    min_replicas: Replicas | None = Field(
        None, description="Minimum number of replicas in each cluster. Default: from the base traffic."
    )
    max_replicas: Replicas | None = Field(
        None, description="Maximum number of replicas in each cluster. Default: from the peak traffic."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.receipt and self.tokens_per_second:
            raise ValueError(
                f"the flavor {self.hardware} has receipt and tokens_per_second: the receipt has the measured rate, "
                "so remove tokens_per_second"
            )
        if "-mig-" in self.hardware and self.shared_by > 1:
            raise ValueError(f"the MIG slice {self.hardware} is not shared further: remove shared_by")
        least, most = self.min_replicas, self.max_replicas
        if least is not None and most is not None and least > most:
            raise ValueError(f"the flavor {self.hardware} has min_replicas {least} above max_replicas {most}")
        return self


class Traffic(Section):
    """The traffic that the replicas must serve."""

    base_rps: float | None = Field(None, gt=0, le=1e7, description="Usual requests per second, in all clusters.")
    peak_rps: float | None = Field(None, gt=0, le=1e7, description="Requests per second at the peak, in all clusters.")
    tokens_per_request: float | None = Field(
        None,
        gt=0,
        le=1e7,
        description="Mean tokens of one request; for generation, prompt and answer together. Default: the receipt's.",
    )
    rise_s: float = Field(60.0, gt=0, le=86_400, description="Seconds in which the traffic rises from base to peak.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.base_rps and self.peak_rps and self.base_rps > self.peak_rps:
            raise ValueError(f"deploy.traffic: base_rps {self.base_rps:g} is above peak_rps {self.peak_rps:g}")
        if (self.base_rps is None) != (self.peak_rps is None):
            raise ValueError("deploy.traffic requires base_rps and peak_rps together")
        return self


class WeightsVolume(Section):
    """Where the pods get mounted weights from, for `model.weights: mount`. Default: the image in `model.source`."""

    pvc: ObjectName | None = Field(None, description="Name of a PersistentVolumeClaim with the model folder.")


class Deploy(Section):
    """Kubernetes: traffic, flavors of hardware and options of `inferctl deploy`."""

    clusters: OneLine | None = Field(
        None, description="File with the clusters (docs/deploy.md). Default: one cluster `default`."
    )
    namespace: DnsLabel = Field("inference", description="Namespace of all objects.")
    omit: list[Omitted] = Field(
        default_factory=list,
        max_length=7,
        description="Objects to leave out, because others make them: `Namespace`, `NetworkPolicy` (all), "
        "`NetworkPolicy/default-deny`, `PriorityClass`, `PrometheusRule`, `ResourceQuota` or `ServiceMonitor`. What "
        "one spec omits is omitted for all.",
    )
    flavors: list[Flavor] = Field(
        default_factory=list,
        max_length=10,
        description="Kinds of hardware in order of preference (docs/deploy.md). Default: one per `hardware`.",
    )
    traffic: Traffic = Field(default_factory=Traffic)  # type: ignore[arg-type]  # pydantic fills the defaults
    cold_start_s: Seconds | None = Field(
        None,
        description="Seconds until a replica on a new node is ready. Default: 120 for node and image and the load "
        "time, at least 240.",
    )
    utilization: float = Field(
        0.7, ge=0.01, le=1, description="Share of the measured rate of a replica that is planned for."
    )
    scaling: Literal["keda", "none"] = Field("keda", description="Autoscaler: `keda` (ScaledObject) or `none`.")
    overflow: int | str = Field(
        "auto",
        description="Replicas to keep ready to start, on nodes that are alive and empty: `auto` (from the rise of "
        "the traffic), `none` or a number per cluster.",
    )
    weights: WeightsVolume = Field(default_factory=WeightsVolume)  # type: ignore[arg-type]
    keys_secret: ObjectName | None = Field(
        None,
        description="Secret with the key file, under `keys.json`, or, if `access.keys` is a database, with its URL, "
        "under `url`. Also the price book. Requires `access.keys`.",
    )
    broker_secret: ObjectName | None = Field(
        None,
        description="Secret with the URL of `access.broker` and `metering.broker`, with its credentials, under `url`. "
        "Default: NATS asks for none.",
    )
    ledger_secret: ObjectName | None = Field(
        None, description="Secret with the URL of the ledger, under `url`, for the relay of usage events."
    )
    tools_image: Image | None = Field(
        None,
        description="Image with `inferctl[ledger,broker,bench]` for the relays of usage events and for bench Jobs.",
    )
    bench: bool = Field(False, description="Write a Job per flavor that runs `inferctl bench` in the cluster.")

    @field_validator("overflow")
    @classmethod
    def _number_or_word(cls, value: int | str) -> int | str:
        if value in ("auto", "none") or (isinstance(value, int) and 0 <= value <= 1000):
            return value
        raise ValueError(f"deploy.overflow: {value!r} is not auto, none or a number of replicas up to 1000")

    @field_validator("namespace")
    @classmethod
    def _own_namespace(cls, name: str) -> str:
        """Reject a namespace with pods of others: the manifests forbid all connections that they do not name."""
        if name == "default" or name.startswith("kube-"):
            raise ValueError(
                f"deploy.namespace: {name} has pods of others, and the network policies would cut their connections: "
                "use a namespace of its own"
            )
        return name

    @field_validator("traffic", "weights", mode="before")
    @classmethod
    def _empty_section(cls, value: object) -> object:
        """Replace null, which YAML reads for `traffic:` without content, with an empty section."""
        return {} if value is None else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        keys = [(each.name or each.hardware) for each in self.flavors]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise ValueError(f"deploy.flavors has {twice} twice: give each flavor its own name")
        return self
