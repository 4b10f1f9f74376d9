"""What `inferctl.yaml` says: the `Spec`, its JSON Schema and its digest. `inferctl/settings.py` reads the file."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

DEFAULT_FILE = "inferctl.yaml"
HUB_ID = r"[A-Za-z0-9][\w.-]*/[\w.-]+"

Precision = Literal["auto", "fp32", "fp16", "bf16", "int8"]
Task = Literal["embed"]
Weights = Literal["mount", "bake", "download"]
# A part of an image name as Docker takes it, and the names made of such parts.
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
# The first part is a registry if it has a dot or a port, or is localhost. All else is a name on Docker Hub.
_LABELS = r"[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)"
IMAGE_NAME = rf"(?:(?:{_LABELS}+|localhost)/|{_LABELS}*:\d+/)?{_PART}(?:/{_PART})*"
IMAGE_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
IMAGE_REFERENCE = rf"{IMAGE_NAME}(?::{IMAGE_TAG})?(?:@sha256:[0-9a-f]{{64}})?"
# Operating system, architecture and variant, as in linux/amd64 and linux/arm/v7.
PLATFORM = r"[a-z0-9]+/[a-z0-9_]+(?:/[a-z0-9_.]+)?"
Slug = Annotated[str, Field(pattern=r"^[a-z0-9]+(?:(?:\.|-+)[a-z0-9]+)*$", max_length=63)]
Size = Annotated[str, Field(pattern=r"^\d+(?:\.\d+)? ?[kKmMgGtT]?i?[bB]?$")]
# What ends up in a Dockerfile or a label must stay on its line.
OneLine = Annotated[str, Field(pattern=r"^[^\r\n\x00]+$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(_Section):
    """Which model, and how its weights reach the container."""

    source: OneLine = Field(
        description="Hub id (`org/name`) or a local folder with config.json and safetensors weights."
    )
    revision: OneLine | None = Field(
        None, description="Commit of a hub model; `inferctl build` refuses a floating one unless told."
    )
    task: Task = Field("embed", description="What the server does with it.")
    weights: Weights = Field(
        "mount",
        description="`mount`: a volume at /model. `bake`: a layer of the image. `download`: fetched when the container starts.",
    )

    @model_validator(mode="after")
    def _downloaded_from_a_hub(self) -> Self:
        if self.weights == "download" and not re.fullmatch(HUB_ID, self.source):
            raise ValueError(f"weights: download needs a hub id (org/name), and {self.source!r} is none")
        return self


class Serve(_Section):
    """How the server runs. Every field can be overridden when it starts."""

    precision: Precision = Field(
        "auto", description="Number format of the forward pass; `auto` takes the best the hardware runs natively."
    )
    host: OneLine = Field("127.0.0.1", description="Address to listen on. In a container it is always 0.0.0.0.")
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    max_batch_tokens: int = Field(16384, ge=64, le=1_048_576, description="Tokens of one forward pass at most.")
    max_input_tokens: int | None = Field(
        None, ge=8, le=1_048_576, description="Tokens of one input at most; default is what the model was made for."
    )
    max_queue_tokens: int = Field(
        262_144, ge=64, le=1_000_000_000, description="Tokens waiting at most; beyond it the server answers 429."
    )
    max_client_batch: int = Field(2048, ge=1, le=65536, description="Inputs in one request at most.")
    grace_seconds: float = Field(
        1.0,
        ge=0,
        le=86_400,
        description="After SIGTERM, how long the server still takes requests while it says it is not ready.",
    )
    drain_seconds: float = Field(
        30.0, ge=0, le=86_400, description="After SIGTERM, how long accepted requests may take to finish."
    )


class Image(_Section):
    """The container image."""

    repository: Annotated[str, Field(pattern=rf"^{IMAGE_NAME}$")] | None = Field(
        None, description="Where the image is pushed: `registry/namespace/name`, without a tag."
    )
    tag: Annotated[str, Field(pattern=rf"^{IMAGE_TAG}$")] | None = Field(
        None, description="Tag of the image. Default: `<precision>-<hash of what is in the image>`."
    )
    base: OneLine = Field("cuda13.0", description="An entry of base-images/.")
    base_image: Annotated[str, Field(pattern=rf"^{IMAGE_REFERENCE}$")] | None = Field(
        None, description="Your mirror of the base, best with a digest: `registry/cuda@sha256:...`."
    )
    platform: Annotated[str, Field(pattern=rf"^{PLATFORM}$")] = Field(
        "linux/amd64", description="Platform to build for: `os/architecture` or `os/architecture/variant`."
    )
    wheels: OneLine | None = Field(
        None, description="Folder of wheels that stands in for the package index (air-gapped builds)."
    )
    locks: OneLine | None = Field(None, description="Folder with your own hashed locks, written by `inferctl lock`.")
    frontend: OneLine | None = Field(
        None,
        description="Dockerfile frontend to pull, as in `docker/dockerfile:1`. Default is the builder's own: air-gapped builders cannot pull.",
    )
    max_size: Size | None = Field(None, description="Refuse to build an image forecast to be larger, as in `6GB`.")


class Slo(_Section):
    """What must hold."""

    p99_ms: float | None = Field(
        None, gt=0, le=3_600_000, description="99th percentile of the request latency, milliseconds."
    )


class Bench(_Section):
    """What is measured by default."""

    plan: OneLine = Field("precision", description="An entry of benchmarks/plans/, or a YAML file.")


class Deploy(_Section):
    """Reserved for Kubernetes settings."""


class Spec(_Section):
    """One model container: what it serves, how it is built, what it must hold."""

    name: Slug = Field(
        description="Name of the model in the API and of the image: lower-case letters, digits, `-` and `.`."
    )
    model: Model
    serve: Serve = Field(default_factory=Serve)  # type: ignore[arg-type]  # pydantic fills the defaults
    image: Image = Field(default_factory=Image)  # type: ignore[arg-type]
    hardware: list[OneLine] = Field(
        default_factory=list, description="It must run on all of these: entries of benchmarks/hardware/."
    )
    slo: Slo = Field(default_factory=Slo)  # type: ignore[arg-type]
    bench: Bench = Field(default_factory=Bench)  # type: ignore[arg-type]
    deploy: Deploy = Field(default_factory=Deploy)

    @field_validator("serve", "image", "slo", "bench", "deploy", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        """`serve:` with nothing under it is null in YAML, and means the defaults."""
        return {} if value is None else value

    # Paths as the file has them, where the working directory makes them others: dotted path -> JSON.
    _written: dict[str, str] = PrivateAttr(default_factory=dict)

    def written_as(self, written: dict[str, str]) -> Self:
        """This spec, whose digest does not depend on the directory that a command is started in."""
        self._written = written
        return self

    def digest(self) -> str:
        """sha256 (hex) over the canonical JSON of what differs from the defaults: equal for equal specs, also after a new setting."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        for path, value in self._written.items():
            section, _, key = path.rpartition(".")
            if key in (inner := data.get(section, {}) if section else data):
                inner[key] = json.loads(value)
        canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def repository(self) -> str:
        """Name of the built image without its tag; `inferctl/<name>` by default."""
        return self.image.repository or f"inferctl/{self.name}"


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of `inferctl.yaml`, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "inferctl.yaml",
        **Spec.model_json_schema(),
    }


def slug(source: str) -> str:
    """A valid `name` out of a hub id or a folder: `sentence-transformers/all-MiniLM-L6-v2` -> `all-minilm-l6-v2`."""
    last = source.rstrip("/").rsplit("/", 1)[-1].lower()
    return re.sub(r"[^a-z0-9.-]+", "-", last).strip("-.")[:63] or "model"
