"""Defines the content of `inferctl.yaml`: the `Spec`, its JSON Schema and its digest. `settings.py` reads the file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from inferctl.config.deploy_spec import Deploy
from inferctl.config.sharing_spec import Access as Access
from inferctl.config.sharing_spec import Cache as Cache
from inferctl.config.sharing_spec import Metering as Metering
from inferctl.config.spec_types import IMAGE_NAME as IMAGE_NAME
from inferctl.config.spec_types import (
    IMAGE_REFERENCE,
    ModelAlias,
    OneLine,
    Precision,
    Revision,
    Section,
    Size,
    Slug,
    Weights,
)
from inferctl.config.spec_types import IMAGE_SCHEME as IMAGE_SCHEME
from inferctl.config.spec_types import IMAGE_TAG as IMAGE_TAG
from inferctl.config.spec_types import PLATFORM as PLATFORM
from inferctl.config.spec_types import Task as Task
from inferctl.config.spec_types import TaskSetting as TaskSetting

DEFAULT_FILE = "inferctl.yaml"
DEFAULT_PORT = 8080
MOST_API_PROCESSES = 64
MAX_CLIENT_BATCH = 2048  # inputs in one request, as OpenAI accepts
# The hub accepts at most 96 characters. A longer name is a path.
HUB_ID = r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}"

# Options of `vllm serve` that the edge depends on, or that a setting is for. With them, `GET /info` would be wrong.
_EDGE_OPTIONS = (
    "--api-server-count",
    "-asc",
    "--grpc",
    "--headless",
    "--host",
    "--port",
    "--served-model-name",
    "--uds",
)
_SETTING_OF_OPTION = {
    "--dtype": "serve.precision",
    "--enable-lora": "model.adapters",
    "--lora-modules": "model.adapters",
    "--lora-target-modules": "model.adapters",
    "--max-cpu-loras": "model.adapters",
    "--max-lora-rank": "model.adapters",
    "--max-loras": "model.adapters",
    "--quantization": "serve.precision",
    "-q": "serve.precision",
    "--gpu-memory-utilization": "serve.gpu_memory_share",
    "--kv-cache-memory-bytes": "serve.kv_cache",
    "--max-model-len": "serve.max_context_tokens",
    "--max-num-queued-tokens": "serve.max_queue_tokens",
    "--max-num-seqs": "serve.max_sequences",
    "--tensor-parallel-size": "serve.gpus",
    "-tp": "serve.gpus",
}


class Adapter(Section):
    """An adapter of PEFT (LoRA) on the model, which requests use by its name."""

    name: ModelAlias = Field(description="Name of the adapter in the API.")
    source: OneLine = Field(
        description="Hub id, local folder with adapter_config.json and safetensors weights, or image of "
        "`inferctl model push` (`oci://registry/name@sha256:...`)."
    )
    revision: Revision | None = Field(None, description="Commit of an adapter on a hub.")


class Model(Section):
    """The model to serve, and how the container gets its weights."""

    source: OneLine = Field(
        description="Hub id (`org/name`), local folder with config.json and safetensors weights, or image of "
        "`inferctl model push` (`oci://registry/name@sha256:...`)."
    )
    revision: Revision | None = Field(
        None,
        description="Commit of a hub model. `inferctl build` rejects a branch or tag without `--allow-floating`.",
    )
    task: TaskSetting = Field(
        "auto",
        description="Task of the server. `embed`: embeddings. `rerank`: scores of a reranker. "
        "`classify`: scores of each label. `generate`: chat, Responses and Messages with vLLM. `auto`: for a "
        "`...ForSequenceClassification` in config.json rerank if it has one label, else classify; rerank for a "
        "`CrossEncoder` of sentence-transformers; generate for a `...ForCausalLM`, `...LMHeadModel` or "
        "`...ForConditionalGeneration` without modules.json; else embed.",
    )
    weights: Weights = Field(
        "mount",
        description="`mount`: a volume at /model. `bake`: a layer of the image. "
        "`download`: the container downloads them when it starts.",
    )
    adapters: list[Adapter] = Field(
        default_factory=list, max_length=256, description="Generation: adapters on the model, each with a name."
    )

    @model_validator(mode="after")
    def _downloaded_from_a_hub(self) -> Self:
        if self.weights == "download" and not re.fullmatch(HUB_ID, self.source):
            raise ValueError(f"weights: download requires a hub id (org/name), not {self.source!r}")
        return self

    @model_validator(mode="after")
    def _named_by_an_image(self) -> Self:
        if self.source.startswith(IMAGE_SCHEME):
            if not re.fullmatch(IMAGE_REFERENCE, self.source.removeprefix(IMAGE_SCHEME)):
                raise ValueError(f"{self.source!r} is not the name of an image: oci://registry/name@sha256:...")
            if self.revision is not None:
                raise ValueError("revision is for hub ids: the digest in the source pins an image")
        return self


class ModelSettings(Section):
    """Settings of the server that each of several models can have for itself."""

    precision: Precision = Field(
        "auto",
        description="Number format of the forward pass. `auto` selects the best one that is native. `fp8`: generation "
        "only; weights and, where the GPU can, activations in 8 bits.",
    )
    allow_inaccurate: bool = Field(
        False,
        description="Not for generation: start also if a reduced precision is farther from fp32 than its limit.",
    )
    max_batch_tokens: int = Field(
        16384, ge=64, le=1_048_576, description="Maximum number of tokens in one forward pass."
    )
    max_input_tokens: int | None = Field(
        None, ge=8, le=1_048_576, description="Maximum number of tokens in one input. Default: the model's own limit."
    )
    max_queue_tokens: int = Field(
        262_144,
        ge=64,
        le=1_000_000_000,
        description="Maximum number of queued tokens. The server rejects further requests with 429.",
    )
    max_wait_seconds: float = Field(
        10.0,
        gt=0,
        le=86_400,
        description="Maximum predicted time in the queue. The server rejects requests with a longer one with 429.",
    )
    aliases: list[ModelAlias] = Field(
        default_factory=list,
        max_length=32,
        description="Further names that requests may use for the model, such as `text-embedding-3-small`.",
    )


class Batches(Section):
    """`/v1/files` and `/v1/batches` of OpenAI."""

    folder: OneLine | None = Field(
        None, description="Folder for files and batches, on a local disk. Default: the server has no batches."
    )


class Serve(ModelSettings):
    """Settings of the server. Each one can be overridden when the server starts."""

    host: OneLine = Field("127.0.0.1", description="Address to listen on. In a container always 0.0.0.0.")
    port: int = Field(DEFAULT_PORT, ge=0, le=65535, description="Port to listen on; 0 selects a free port.")
    api_processes: Literal["auto"] | Annotated[int, Field(ge=1, le=MOST_API_PROCESSES)] = Field(
        1,
        description="Processes for HTTP, parsing and tokenization, in addition to one for limits, queue and cache. "
        "1: one process for all. `auto`: one per 4 cores, at most 4. Generation has one, and rejects a number above 1.",
    )
    max_context_tokens: int | None = Field(
        None,
        ge=16,
        le=16_777_216,
        description="Generation: maximum number of tokens of a prompt and its answer together. "
        "Default: the model's own limit.",
    )
    max_sequences: int | None = Field(
        None, ge=1, le=65536, description="Generation: maximum number of sequences in one step. Default: vLLM's own."
    )
    kv_cache: Size | None = Field(
        None,
        description="Generation: memory of the KV cache, such as `4GB`. Default: on GPUs what remains of "
        "`gpu_memory_share`, on CPUs 4 GiB or what the longest context requires.",
    )
    gpu_memory_share: float = Field(
        0.9, gt=0, le=1, description="Generation: share of the GPU's memory for weights, activations and KV cache."
    )
    gpus: int = Field(
        1, ge=1, le=64, description="Generation: number of GPUs that share the weights (tensor parallelism)."
    )
    adapter_folders: list[OneLine] = Field(
        default_factory=list,
        description="Generation: folders of the server, below which `inferctl adapters add` may find adapters.",
    )
    spare_adapters: int = Field(
        4,
        ge=1,
        le=256,
        description="Generation: with `adapter_folders`, how many adapters can be added, in memory that is reserved.",
    )
    spare_rank: int = Field(16, ge=1, le=512, description="Generation: maximum rank of adapters that are added.")
    vllm_options: list[OneLine] = Field(
        default_factory=list,
        description="Generation: further words for `vllm serve`. Those that inferctl sets are rejected.",
    )
    batches: Batches = Field(default_factory=Batches)  # type: ignore[arg-type]  # pydantic fills the defaults
    grace_seconds: float = Field(
        1.0,
        ge=0,
        le=86_400,
        description="After SIGTERM, the server reports that it is not ready but accepts requests for this long.",
    )
    drain_seconds: float = Field(
        25.0, ge=0, le=86_400, description="After SIGTERM, how long the server waits for accepted requests to finish."
    )

    @property
    def least_api_processes(self) -> int:
        """The number of API processes; with `auto`, that of a server with few cores."""
        return 1 if self.api_processes == "auto" else self.api_processes

    @property
    def spare(self) -> int:
        """The number of adapters that can be added to a running server."""
        return self.spare_adapters if self.adapter_folders else 0

    @field_validator("api_processes", mode="wrap")
    @classmethod
    def _one_error(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        """Report one error, where pydantic has one for each kind of value."""
        with contextlib.suppress(ValidationError):
            if not isinstance(value, bool):
                return validate(value)
        raise PydanticCustomError("count_or_auto", f"must be a number from 1 to {MOST_API_PROCESSES}, or `auto`")

    @field_validator("vllm_options")
    @classmethod
    def _free_options(cls, words: list[str]) -> list[str]:
        """Reject an option of vLLM that would show a secret, go around the edge or contradict a setting."""
        for name in (word.partition("=")[0].replace("_", "-") for word in words if word.startswith("-")):
            if name.startswith("--api-key"):
                reason = "which the log and the list of processes would show: set `access.keys` instead"
                raise ValueError(f"serve.vllm_options has --api-key, {reason}")
            if name in _EDGE_OPTIONS:
                raise ValueError(f"serve.vllm_options has {name}, which inferctl sets: remove it")
            if setting := _SETTING_OF_OPTION.get(name):
                raise ValueError(f"serve.vllm_options has {name}: set {setting} instead")
        return words


class Image(Section):
    """Settings of the container image."""

    repository: Annotated[str, Field(pattern=rf"^{IMAGE_NAME}$")] | None = Field(
        None, description="Repository to push the image to: `registry/namespace/name`, without a tag."
    )
    tag: Annotated[str, Field(pattern=rf"^{IMAGE_TAG}$")] | None = Field(
        None, description="Tag of the image. Default: `<precision>-<hash of the image content>`."
    )
    base: OneLine = Field("cuda13.0", description="Base image: an entry of base-images/ or a YAML file.")
    base_image: Annotated[str, Field(pattern=rf"^{IMAGE_REFERENCE}$")] | None = Field(
        None, description="Your mirror of the base image, preferably with a digest: `registry/cuda@sha256:...`."
    )
    platform: Annotated[str, Field(pattern=rf"^{PLATFORM}$")] = Field(
        "linux/amd64", description="Platform of the image: `os/architecture` or `os/architecture/variant`."
    )
    wheels: OneLine | None = Field(
        None, description="Folder of wheels to use instead of a package index (air-gapped builds)."
    )
    locks: OneLine | None = Field(None, description="Folder with your own hashed locks, from `inferctl lock`.")
    embed: bool = Field(
        False, description="Install the command line and pyarrow too, so that the image can run `inferctl embed`."
    )


class Slo(Section):
    """Service level objective of the server."""

    p99_ms: float | None = Field(
        None, gt=0, le=3_600_000, description="Maximum 99th percentile of the request latency, in milliseconds."
    )
    ttft_ms: float | None = Field(
        None,
        gt=0,
        le=3_600_000,
        description="Generation: maximum time to the first token of a good response, in milliseconds.",
    )
    itl_ms: float | None = Field(
        None,
        gt=0,
        le=3_600_000,
        description="Generation: maximum gap between the tokens of a good response, in milliseconds.",
    )


class NamedModel(Section):
    """One of several encoder models that a server has. What `serve` and `slo` do not set is as for the whole server."""

    name: Slug = Field(description="Name of the model in the API.")
    model: Model
    serve: ModelSettings = Field(default_factory=ModelSettings)  # type: ignore[arg-type]  # pydantic fills the defaults
    slo: Slo = Field(default_factory=Slo)  # type: ignore[arg-type]
    weight: float = Field(
        1.0,
        ge=0.01,
        le=100,
        description="Share of the device's time, relative to the other models, while several have requests.",
    )


class Spec(Section):
    """One container: the model or models, the server, the image, the target hardware and the SLO."""

    name: Slug = Field(
        description="Name of the model in the API and of the image: lower-case letters, digits, `-` and `.`."
    )
    models: list[NamedModel] = Field(
        default_factory=list,
        max_length=16,
        description="In place of `model`: several models of tasks other than `generate` on one server, each with a "
        "`name`, a `model`, and its own settings in `serve`, `slo` and `weight`.",
    )
    # None if there are `models`.
    model: Model = Field(default_factory=lambda: None, validate_default=True)
    serve: Serve = Field(default_factory=Serve)  # type: ignore[arg-type]  # pydantic fills the defaults
    image: Image = Field(default_factory=Image)  # type: ignore[arg-type]
    hardware: list[OneLine] = Field(
        default_factory=list,
        description="Hardware that the container must run on: entries of benchmarks/hardware/ or YAML files.",
    )
    slo: Slo = Field(default_factory=Slo)  # type: ignore[arg-type]
    access: Access = Field(default_factory=Access)  # type: ignore[arg-type]
    metering: Metering = Field(default_factory=Metering)  # type: ignore[arg-type]
    cache: Cache = Field(default_factory=Cache)  # type: ignore[arg-type]
    deploy: Deploy = Field(default_factory=Deploy)  # type: ignore[arg-type]

    @field_validator("serve", "image", "slo", "access", "metering", "cache", "deploy", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        """Replace null, which YAML reads for `serve:` without content, with an empty section."""
        return {} if value is None else value

    @field_validator("model", mode="wrap")
    @classmethod
    def _one_or_several(cls, value: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        several = info.data.get("models", True)  # absent if they are not valid
        if value is None:
            if several:
                return None
            raise PydanticCustomError("missing", "Field required")
        if several and several is not True:
            raise PydanticCustomError("one_or_several", "must not be set together with `models`")
        return validate(value)

    @model_validator(mode="after")
    def _different_names(self) -> Self:
        names = [name for one in self.each() for name in one.names]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"several models or adapters are named {', '.join(repeated)}")
        # A key or a request may name a model by its source too.
        for one in self.each():
            if one.model.source in set(names) - {one.name, *one.serve.aliases}:
                raise ValueError(f"{one.model.source} is the source of {one.name}, and the name of another model")
        return self

    @property
    def names(self) -> list[str]:
        """The names that requests may use for the model, its own first, and those of its adapters."""
        adapters = [adapter.name for adapter in self.model.adapters]
        return [*dict.fromkeys([self.name, *self.serve.aliases]), *adapters]

    def each(self) -> list[Spec]:
        """Return a spec of one model for each model. All of a spec that has one."""
        if not self.models:
            return [self]
        found = []
        for one in self.models:
            own = {"serve": one.serve, "slo": one.slo}
            merged = {
                name: getattr(self, name).model_copy(update={key: getattr(of, key) for key in of.model_fields_set})
                for name, of in own.items()
            }
            found.append(self.model_copy(update={"name": one.name, "model": one.model, "models": [], **merged}))
        return found

    # Dotted path -> value in the file (JSON), for paths that `settings.py` made relative to the working directory.
    _written: dict[str, str] = PrivateAttr(default_factory=dict)

    def written_as(self, written: dict[str, str]) -> Self:
        """Set the paths as written in the file, so that the digest does not depend on the working directory."""
        self._written = written
        return self

    def digest(self) -> str:
        """Return the sha256 (hex) over the canonical JSON of all values that differ from the defaults.

        Equal specs have equal digests, also in a later version that adds a setting.
        """
        data = self.model_dump(mode="json", exclude_defaults=True)
        for path, value in self._written.items():
            *sections, key = path.split(".")
            inner: Any = data
            for section in sections:
                inner = inner[int(section)] if isinstance(inner, list) else inner.get(section, {})
            if key in inner:
                inner[key] = json.loads(value)
        canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def repository(self) -> str:
        """Name of the built image without its tag. Default: `inferctl/<name>`."""
        return self.image.repository or f"inferctl/{self.name}"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of `inferctl.yaml`, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "inferctl.yaml",
        **Spec.model_json_schema(),
    }


def slug(source: str) -> str:
    """Return a valid `name` for a hub id, a folder or an image: `org/all-MiniLM-L6-v2` -> `all-minilm-l6-v2`."""
    if source.startswith(IMAGE_SCHEME):
        source = _image_name(source)
    last = source.rstrip("/").rsplit("/", 1)[-1].lower()
    return re.sub(r"[^a-z0-9.-]+", "-", last).strip("-.")[:63] or "model"


def _image_name(image: str) -> str:
    """Return an image without its scheme, tag and digest."""
    return re.sub(r":[^/]*$", "", image.removeprefix(IMAGE_SCHEME).partition("@")[0])
