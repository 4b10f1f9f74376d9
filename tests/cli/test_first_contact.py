"""Tests the commands with a hub model that is not in the local cache, against a hub on 127.0.0.1."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from inferctl import cli
from inferctl.config import settings
from inferctl.core.errors import UsageError
from inferctl.facts.precision import best_precision
from inferctl.image.from_spec import check_model_task
from inferctl.models.model import ModelFolder
from inferctl.serve.engines import cpu
from tests import processes
from tests.hub import Hub, Repository, online, serving
from tests.models.model_folders import stand_in, write_model
from tests.processes import free_port, is_ready, until

DEFAULT = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a valid configuration and unusable weights."""
    folder = write_model(tmp_path_factory.mktemp("tiny") / "m", {"a": [1000, 1000]})
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536, "num_attention_heads": 12}
    config = {"architectures": ["BertModel"], "model_type": "bert", "vocab_size": 30522, **sizes}
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    return folder


@pytest.fixture
def hub(tiny: Path) -> Iterator[Hub]:
    with serving({DEFAULT: tiny, "org/gated": Repository(tiny, gated=True)}) as running:
        yield running


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def inferctl(here: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return processes.inferctl(*arguments, cwd=here, env=environment)


def write_spec(here: Path) -> None:
    """Write what `inferctl init` writes, in this process."""
    assert cli.run(["init", str(here)]) == 0


def weights(hub: Hub) -> list[str]:
    return [name for name in hub.downloads() if name.endswith(".safetensors")]


def whole_weights(hub: Hub) -> bool:
    """Return whether the hub sent the whole weights file, and not only its header."""
    return hub.sent > 4_000_000


def test_a_dry_run_needs_no_weights_and_no_network(here: Path, hub: Hub, tmp_path: Path) -> None:
    environment = online(hub, tmp_path / "home")
    assert inferctl(here, environment, "init").returncode == 0
    done = inferctl(here, environment, "build", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "FROM " in done.stdout
    for nowhere in (online("http://127.0.0.1:9", tmp_path / "home"), {**environment, "HF_HUB_OFFLINE": "1"}):
        assert inferctl(here, nowhere, "build", "--dry-run").returncode == 0
    (here / "inferctl.yaml").write_text(f"name: m\nmodel: {{source: {DEFAULT}, weights: bake}}\n")
    for either in (environment, online("http://127.0.0.1:9", tmp_path / "other")):
        assert inferctl(here, either, "build", "--dry-run", "--allow-floating").returncode == 0
    assert weights(hub) == []
    assert not whole_weights(hub)


def test_check_estimates_the_memory_of_a_hub_model_without_its_weights(here: Path, hub: Hub, tmp_path: Path) -> None:
    environment = online(hub, tmp_path / "home")
    write_spec(here)
    done = inferctl(here, environment, "check", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    # 1,000,000 parameters in 16 bits.
    assert [part["memory"]["weights_bytes"] for part in document["hardware"]] == [2_000_000, 2_000_000]
    assert not whole_weights(hub)


@pytest.mark.parametrize(
    "model",
    [
        "{source: org/absent}",
        f"{{source: {DEFAULT}, revision: v9}}",
        "{source: ./absent}",
        "{source: ./absent, weights: bake}",
        "{source: /absent/folder}",
    ],
)
def test_check_rejects_a_model_that_does_not_exist(here: Path, hub: Hub, tmp_path: Path, model: str) -> None:
    (here / "inferctl.yaml").write_text(f"name: m\nmodel: {model}\nhardware: [t4]\n")
    done = inferctl(here, online(hub, tmp_path / "home"), "check", "--json")
    assert done.returncode == 2, done.stdout
    (found,) = (one for one in json.loads(done.stdout)["findings"] if one["topic"] == "model")
    assert found["level"] == "error"
    assert found["hint"]


def test_estimate_needs_no_weights_and_no_hub_the_second_time(here: Path, hub: Hub, tmp_path: Path) -> None:
    environment = online(hub, tmp_path / "home")
    estimate = ("estimate", "--model", DEFAULT, "--json", "--length", "128", "--hardware", "t4")
    first = inferctl(here, environment, *estimate)
    assert first.returncode == 0, first.stderr
    assert weights(hub) == []
    hub.status = 503
    hub.requests.clear()
    again = inferctl(here, environment, *estimate)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["rows"] == json.loads(first.stdout)["rows"]
    asked = [line for line in hub.requests if "/resolve/" in line]
    assert asked == [f"HEAD /{DEFAULT}/resolve/main/config.json"], "the client does not retry, also for an absent file"


def test_without_network_there_is_one_error_with_a_hint(here: Path, tmp_path: Path) -> None:
    """Of `serve`; `bench` and `estimate` find a model with the same functions, which tests/models/test_hub.py calls."""
    write_spec(here)
    done = inferctl(here, online("http://127.0.0.1:9", tmp_path / "home"), "serve")
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("error:") == 1
    assert not {"Traceback", "Retrying"} & set(done.stderr.split())
    assert "check the network" in done.stderr.partition("hint: ")[2]


def test_the_progress_of_a_download_is_lines_on_stderr_and_a_bar_on_a_terminal(
    here: Path, hub: Hub, tmp_path: Path
) -> None:
    # The engine cannot start with the tiny model. The test needs only the download before it.
    piped = inferctl(here, online(hub, tmp_path / "home"), "serve", "--model", DEFAULT, "--port", "0")
    assert piped.stdout == ""
    assert piped.stderr.startswith(f"downloading {DEFAULT}: 4.0 MB\ndownloaded {DEFAULT}: 4.0 MB\n")
    serve = ("serve", "--model", DEFAULT, "--port", "0", "--log", "json")
    logged = inferctl(here, online(hub, tmp_path / "third"), *serve).stderr.splitlines()[:2]
    assert [json.loads(line)["message"] for line in logged] == piped.stderr.splitlines()[:2]
    master, slave = pty.openpty()
    hub.bytes_per_second = 8_000_000
    environment = {**online(hub, tmp_path / "other"), "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-m", "inferctl", "serve", "--model", DEFAULT, "--port", "0"],
        cwd=here,
        env=environment,
        stderr=slave,
        stdin=slave,
        stdout=subprocess.PIPE,
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            shown += os.read(master, 4096)
        except OSError:
            break
    assert process.stdout is not None
    assert process.stdout.read() == b""
    process.wait()
    os.close(master)
    assert b"/4.0 MB" in shown, shown
    assert f"downloaded {DEFAULT}".encode() in shown


def test_an_interrupted_download_ends_with_130_and_the_next_one_continues(here: Path, hub: Hub, tmp_path: Path) -> None:
    environment = online(hub, tmp_path / "home")
    hub.bytes_per_second = 1_000_000
    command = [sys.executable, "-m", "inferctl", "serve", "--model", DEFAULT, "--port", "0"]
    process = subprocess.Popen(command, cwd=here, env=environment, stderr=subprocess.PIPE, text=True)
    until(lambda: hub.sent > 300_000)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "interrupted"
    assert "Traceback" not in said
    hub.bytes_per_second = None
    hub.requests.clear()
    again = inferctl(here, environment, "serve", "--model", DEFAULT, "--port", "0")
    assert f"downloaded {DEFAULT}" in again.stderr
    assert hub.downloads() == ["model.safetensors"], "what was complete is not sent again"


@pytest.mark.slow
def test_from_an_empty_directory_to_an_embedding_in_three_commands(here: Path, minilm: Path, tmp_path: Path) -> None:
    with serving({DEFAULT: minilm}) as hub:
        environment = online(hub, tmp_path / "home")
        for verb in ("init", "check"):
            done = inferctl(here, environment, verb)
            assert done.returncode == 0, done.stdout + done.stderr
        url = f"http://127.0.0.1:{free_port()}"
        environment["INFERCTL_SERVE_PORT"] = url.rpartition(":")[2]
        server = subprocess.Popen(
            [sys.executable, "-m", "inferctl", "serve"],
            cwd=here,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        try:
            until(lambda: server.poll() is not None or is_ready(url))
            assert server.poll() is None, "the server ended"
            body = json.dumps({"model": "all-minilm-l6-v2", "input": "hello"}).encode()
            request = urllib.request.Request(f"{url}/v1/embeddings", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as response:
                vector = json.load(response)["data"][0]["embedding"]
            assert len(vector) == 384
        finally:
            server.terminate()
            out, _ = server.communicate(timeout=60)
        assert out == b"", "stdout stays data"
    assert weights(hub) == ["model.safetensors"]


@pytest.mark.slow
def test_a_bench_downloads_once_and_measures_the_real_server(here: Path, minilm: Path, tmp_path: Path) -> None:
    plan = {
        "name": "once",
        "load": {"mode": "closed", "users": 1, "duration_s": 1, "warmup_s": 0},
        # bf16 where the CPU has it. Emulated, bf16 would need a minute.
        "configurations": [{"name": "auto", "precision": "auto"}],
        "quality": {"corpus": "mixed", "texts": 20},
        "repeats": 1,
    }
    (here / "once.yaml").write_text(json.dumps(plan))
    with serving({DEFAULT: minilm}) as hub:
        environment = online(hub, tmp_path / "home")
        done = inferctl(here, environment, "bench", "--model", DEFAULT, "--plan", "once.yaml", "--json")
    assert weights(hub) == ["model.safetensors"]
    assert done.stderr.startswith(f"downloading {DEFAULT}"), "before its servers start"
    (row,) = json.loads(done.stdout)["rows"]
    assert done.returncode == (0 if row["valid"] else 5), done.stderr
    assert row["outcome"] == "measured", row["reason"]
    assert row["precision"]["effective"] == best_precision(cpu.detect()[1])
    assert row["cosine_mean"] > 0.999
    assert row["recall_at_10"] > 0.95
    assert row["tokens_per_s"] > row["requests_per_s"]
    assert row["server_peak_bytes"] > 50e6


def test_a_generative_hub_model_gets_its_base_or_a_hint(here: Path, tmp_path: Path) -> None:
    model = stand_in(tmp_path / "llama")
    with serving({"org/llama": model}) as hub:
        assert inferctl(here, online(hub, tmp_path / "home"), "init", "--model", "org/llama").returncode == 0
        assert "base: vllm-cuda13.0 " in (here / "inferctl.yaml").read_text()
        assert weights(hub) == []
    offline = online("http://127.0.0.1:9", tmp_path / "other")
    done = inferctl(here, offline, "init", "--model", "org/llama", "--force")
    assert done.returncode == 0
    assert "`--base vllm-cuda13.0`" in done.stderr
    told = " ".join(inferctl(here, offline, "check").stdout.split())
    assert "`model.task: generate`" in told and "`image.base: vllm-cuda13.0`" in told
    unknown = settings.resolve(settings.read(here / "inferctl.yaml"), {}, {}, {}).spec
    check_model_task(unknown, None)
    with pytest.raises(UsageError, match=r"the base cuda13\.0 is without vLLM"):  # `build`, after the download
        check_model_task(unknown, ModelFolder(model))
