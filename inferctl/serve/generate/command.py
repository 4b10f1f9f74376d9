"""The command line and the environment of `vllm serve`, derived from the spec. Pure functions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from inferctl.config.spec import Spec
from inferctl.core.errors import NotReadyError, shown
from inferctl.core.sizes import parse_size, size
from inferctl.facts import vllm_api
from inferctl.models import decoder
from inferctl.models.adapter import Adapter, Slots
from inferctl.models.model import is_hub_id
from inferctl.serve.engine_process.engine_protocol import DeviceInfo, PrecisionInfo

MIDDLEWARE = "inferctl.serve.generate.vllm_middleware.VllmMiddleware"
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_GIB = 1024**3
# Variables with passwords of stores, which only the supervisor and the relay connect to.
_STORES = ("INFERCTL_ACCESS_", "INFERCTL_CACHE_", "INFERCTL_METERING_", "PGPASSWORD")


@dataclass(frozen=True)
class VllmModel:
    """What vLLM serves. `context`: the largest one, in tokens. `dtype`: number format of the activations.

    `kv_bytes`: the KV cache of one such context; 0 if unknown.
    """

    folder: Path
    context: int
    precision: PrecisionInfo
    dtype: str
    quantization: str | None = None
    kv_bytes: int = 0
    adapters: tuple[Adapter, ...] = ()


@dataclass(frozen=True)
class Derived:
    """One option of vLLM, with the setting that it comes from."""

    option: str
    value: str
    source: str


def options(
    spec: Spec, model: VllmModel, device: DeviceInfo, socket: Path, cpp_compiler: bool = True
) -> Iterator[Derived]:
    """Yield the options of `vllm serve`. `socket`: where vLLM's own server listens; clients do not use it.

    `cpp_compiler`: whether this machine has one, so that the model can be compiled for a CPU.
    """
    serve = spec.serve
    yield Derived("--dtype", _DTYPES[model.dtype], f"precision {model.precision.effective}")
    if model.quantization:
        yield Derived("--quantization", model.quantization, f"precision {model.precision.effective}")
    context = "serve.max_context_tokens" if serve.max_context_tokens else "the model's own limit"
    yield Derived("--max-model-len", str(model.context), context)
    if serve.max_sequences:
        yield Derived("--max-num-seqs", str(serve.max_sequences), "serve.max_sequences")
    if device.kind == "cuda":
        if serve.kv_cache:
            yield Derived("--kv-cache-memory-bytes", str(parse_size(serve.kv_cache)), "serve.kv_cache")
        # Also with a KV cache of a given size: vLLM does not start unless this share of the GPU is free.
        yield Derived("--gpu-memory-utilization", f"{serve.gpu_memory_share:g}", "serve.gpu_memory_share")
        if serve.gpus > 1:
            yield Derived("--tensor-parallel-size", str(serve.gpus), "serve.gpus")
    elif not cpp_compiler:
        yield Derived("--enforce-eager", "", "no C++ compiler")
    if slots := slots_of(spec, model, device):
        yield Derived("--enable-lora", "", "model.adapters")
        yield Derived("--max-loras", str(slots.count), "model.adapters")
        yield Derived("--max-lora-rank", str(slots.rank), "model.adapters")
        most = max(slots.count, len(model.adapters), most_adapters(spec))
        yield Derived("--max-cpu-loras", str(most), "model.adapters")
    if model.adapters:
        links = (f"{each.name}={adapter_link(socket.parent, each)}" for each in model.adapters)
        yield Derived("--lora-modules", " ".join(links), "links to the adapters")
    yield Derived("--max-num-queued-tokens", str(serve.max_queue_tokens), "serve.max_queue_tokens")
    yield Derived("--served-model-name", " ".join(base_names(spec)), "name, model.source, serve.aliases")
    # vLLM's default is `--data-parallel-size`. Each process would have an edge, with limits of its own.
    yield Derived("--api-server-count", "1", "the edge of inferctl")
    yield Derived("--middleware", MIDDLEWARE, "the edge of inferctl")
    yield Derived("--uds", str(socket), "the edge of inferctl, which has the port")
    yield Derived("--enable-prompt-tokens-details", "", "usage of each request")
    yield Derived("--disable-uvicorn-access-log", "", "the log of the edge")


def most_adapters(spec: Spec) -> int:
    """Return how many adapters the server has memory for. They can be others than those of the spec."""
    return len(spec.model.adapters) + spec.serve.spare


def slots_of(spec: Spec, model: VllmModel, device: DeviceInfo) -> Slots | None:
    """Return what vLLM reserves for adapters: for as many while the server runs, whichever it has."""
    spare = max(0, most_adapters(spec) - len(model.adapters))
    if not (model.adapters or spare):
        return None
    return Slots.of(model.adapters, device.kind, spare, spec.serve.spare_rank if spec.serve.spare else 1)


def adapter_link(folder: Path, adapter: Adapter) -> Path:
    """Return where vLLM finds an adapter. Its prefix cache has the path as a key, so new weights need a new path."""
    return folder / adapter.digest


def base_names(spec: Spec) -> list[str]:
    """Return the names that requests may use for the model itself. A folder of this machine is none of them."""
    source = [spec.model.source] if is_hub_id(spec.model.source) else []
    return list(dict.fromkeys([spec.name, *source, *spec.serve.aliases]))


def arguments(spec: Spec, model: VllmModel, derived: list[Derived]) -> list[str]:
    """Return the arguments of `vllm serve`: the derived options, then those of `serve.vllm_options`."""
    found = [word for each in derived for word in (each.option, *each.value.split())]
    return ["serve", str(model.folder), *found, *spec.serve.vllm_options]


def environment(
    spec: Spec,
    model: VllmModel,
    device: DeviceInfo,
    settings: Path,
    style: str,
    base: Mapping[str, str],
    cpp_compiler: bool = True,
) -> dict[str, str]:
    """Return the environment of vLLM, without addresses of stores. `style`: text or json.

    `settings`: a folder with the settings of the edge, which connects to no store.
    """
    variables = {
        # OpenAI's limit of `n`. One request with vLLM's default, 16384, blocked its API process for more than 20 s.
        "VLLM_MAX_N_SEQUENCES": "128",
        **{name: value for name, value in base.items() if not name.startswith(_STORES)},
        "INFERCTL_EDGE": str(settings),
        # The model is a local folder, so nothing is downloaded, and nothing is reported to vLLM's project.
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_RUST_FRONTEND": "0",  # it loads no middleware, so it has no edge
        "VLLM_RPC_BASE_PATH": str(settings),  # sockets that a killed vLLM leaves
        "PYTHONUNBUFFERED": "1",
    }
    if device.kind == "cpu":
        variables["VLLM_CPU_KVCACHE_SPACE"] = str(kv_gib(spec, model))
        if not cpp_compiler:
            # With `--enforce-eager`, vLLM still compiles functions for log-probabilities when a request has them.
            variables["TORCHDYNAMO_DISABLE"] = "1"
    if style == "json":
        file = settings / "logging.json"
        file.write_text(json.dumps(_JSON_LOGGING))
        variables["VLLM_LOGGING_CONFIG_PATH"] = str(file)
    return variables


def visible_gpu(device: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variable that limits vLLM to the GPU of `cuda:N`, counted among those that are visible; else nothing.

    vLLM has no option for it.
    """
    index = device.partition(":")[2]
    if not index:
        return {}
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return {"CUDA_VISIBLE_DEVICES": visible[int(index)] if int(index) < len(visible) else index}


def check_visible(device: DeviceInfo, environment: Mapping[str, str]) -> None:
    """Raise `NotReadyError` if `CUDA_VISIBLE_DEVICES` names a MIG slice.

    vLLM asks NVML for the index of the slice, which counts the slices of one GPU, and takes it for that of a GPU.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if device.kind == "cuda" and any(name.strip().startswith("MIG-") for name in visible.split(",")):
        raise NotReadyError(
            f"vLLM cannot use a MIG slice that CUDA_VISIBLE_DEVICES names: {shown(visible)}",
            "unset CUDA_VISIBLE_DEVICES, and give only the slice to the container: "
            f"NVIDIA_VISIBLE_DEVICES={visible.strip()}",
        )


def kv_gib(spec: Spec, model: VllmModel) -> int:
    """Return the memory of the KV cache on a CPU in GiB, rounded up, because vLLM accepts only whole ones.

    Without `serve.kv_cache`, it is 4 GiB, or what one sequence of the largest context requires.
    """
    wanted = parse_size(spec.serve.kv_cache) if spec.serve.kv_cache else max(decoder.CPU_KV_CACHE_BYTES, model.kv_bytes)
    return math.ceil(wanted / _GIB)


def lines(derived: list[Derived], spec: Spec, model: VllmModel, device: DeviceInfo) -> Iterator[str]:
    """Yield what is printed about the derived options: those that a user can change."""
    user = ("precision", "serve.", "the model", "model.adapters", "no C++")
    shown = [each for each in derived if each.source.startswith(user)]
    for each in shown:
        yield f"vllm       {each.option} {each.value}  ({each.source})"
    for adapter in model.adapters:
        yield f"adapter    {adapter.name}: rank {adapter.rank}, {len(adapter.layers)} layers, {size(adapter.bytes)}"
    if device.kind == "cpu":
        source = "serve.kv_cache" if spec.serve.kv_cache else "default"
        yield f"vllm       KV cache {kv_gib(spec, model)} GiB  ({source})"
    else:
        limit = vllm_api.tokens_per_s(decoder.TYPICAL_ANSWER)
        yield f"vllm       one API process, which streams about {limit:,.0f} tokens/s on a core of {vllm_api.MACHINE}"
    if spec.serve.vllm_options:
        yield f"vllm       {' '.join(spec.serve.vllm_options)}  (serve.vllm_options)"


_JSON_LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"json": {"()": "inferctl.serve.observe.logs.JsonFormatter"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stderr"}},
    "loggers": {"vllm": {"handlers": ["stderr"], "level": "INFO", "propagate": False}},
}
