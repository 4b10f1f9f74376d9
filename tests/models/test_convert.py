"""Tests the conversion of models without safetensors or without tokenizer.json. transformers is the oracle."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer

from inferctl.core.errors import InferctlError, NotReadyError, UsageError
from inferctl.models import conversion, convert, model
from tests.hub import online, serving
from tests.processes import execute, inferctl, python, until
from tests.tiny_models import make_tokenizer

if TYPE_CHECKING:
    import torch
    import transformers
    from safetensors.torch import load_file


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """Import what takes seconds when the first test runs, not in each process that collects tests."""
    global torch, transformers, load_file
    import torch
    import transformers
    from safetensors.torch import load_file


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
# Model type -> class with a head, settings, and the class that an embeddings server loads.
TIED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("BertForMaskedLM", SIZES, "BertModel"),
    "roberta": ("RobertaForMaskedLM", SIZES, "RobertaModel"),
    "xlm-roberta": ("XLMRobertaForMaskedLM", SIZES, "XLMRobertaModel"),
    "mpnet": ("MPNetForMaskedLM", SIZES, "MPNetModel"),
    "electra": ("ElectraForMaskedLM", SIZES | {"embedding_size": 32}, "ElectraModel"),
    "albert": ("AlbertForMaskedLM", SIZES | {"embedding_size": 32}, "AlbertModel"),
    "deberta-v2": ("DebertaV2ForMaskedLM", SIZES, "DebertaV2Model"),
    "modernbert": ("ModernBertForMaskedLM", SIZES, "ModernBertModel"),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"dim": 32, "hidden_dim": 64, "n_heads": 4, "n_layers": 2},
        "DistilBertModel",
    ),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4}, "GPT2Model"),
    "opt": ("OPTForCausalLM", {"hidden_size": 32, "ffn_dim": 64, **SIZES, "word_embed_proj_dim": 32}, "OPTModel"),
    "qwen3": (
        "Qwen3ForCausalLM",
        SIZES | {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
        "Qwen3Model",
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        "T5EncoderModel",
    ),
    "bart": (
        "BartForConditionalGeneration",
        {
            "d_model": 32,
            **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
            **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
            **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
        },
        "BartModel",
    ),
}  # fmt: skip


def folder_of(path: Path, config: dict[str, Any] | None = None) -> Path:
    """Write a model folder without weights: a configuration and a tokenizer."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config or {"architectures": ["BertModel"], "model_type": "bert"}))
    make_tokenizer("bert").save_pretrained(path)
    return path


def save(tensors: dict[str, Any], file: Path, *, legacy: bool = False) -> None:
    file.parent.mkdir(exist_ok=True)
    torch.save(tensors, file, _use_new_zipfile_serialization=not legacy)


def converted(source: Path, name: str = "new") -> Path:
    """Convert in this process."""
    target = source.parent / name
    target.mkdir()
    conversion.convert(source, target)
    model.find(str(target))
    return target


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("kind", TIED)
def test_transformers_loads_all_weights_and_ties_heads_again(kind: str, tmp_path: Path) -> None:
    head, settings, base = TIED[kind]
    common = {"vocab_size": 60, "max_position_embeddings": 40, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, **common, **settings)
    torch.manual_seed(0)
    original = getattr(transformers, head)(config).eval()
    source = folder_of(tmp_path / "source")
    config.architectures = [head]
    config.save_pretrained(source)
    save(original.state_dict(), source / "pytorch_model.bin")
    target = converted(source)
    again, report = getattr(transformers, head).from_pretrained(target, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    expected, found = original.state_dict(), again.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert sum(tensor.numel() for tensor in again.parameters()) == sum(each.numel() for each in original.parameters())
    _, report = getattr(transformers, base).from_pretrained(target, output_loading_info=True)
    assert all("pooler" in name for name in report["missing_keys"]), report


def odd_tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(24, dtype=torch.float32)
    return {
        "transposed": base.reshape(4, 6).T,
        "first": base[:12],
        "overlapping": base[6:18],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "second_empty": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        **{str(kind): torch.ones(3).to(kind) for kind in (torch.bfloat16, torch.float16, torch.int64, torch.bool)},
        "nan": torch.tensor([float("nan"), float("inf")]),
        # Layers that share their weights, which no class of transformers ties again.
        "layer.0.weight": base.reshape(4, 6),
        "layer.1.weight": base.reshape(4, 6),
    }


@pytest.mark.parametrize("legacy", [False, True])
def test_views_number_formats_and_shared_layers_survive(tmp_path: Path, legacy: bool) -> None:
    source = folder_of(tmp_path / "source")
    save(odd_tensors(), source / "pytorch_model.bin", legacy=legacy)
    target = converted(source)
    found, expected = load_file(target / "model.safetensors"), odd_tensors()
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"parameter"}:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name].nan_to_num(9), expected[name].nan_to_num(9)), name
    assert (target / "model.safetensors").stat().st_mode & 0o777 == (target / "config.json").stat().st_mode & 0o777


def sharded(source: Path) -> Path:
    parts = {f"pytorch_model-0000{n}-of-00002.bin": {f"layer.{n}.weight": torch.full((3, 3), float(n))} for n in (1, 2)}
    for name, tensors in parts.items():
        save(tensors, source / name)
    names = {tensor: file for file, tensors in parts.items() for tensor in tensors}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return source


def test_shards_and_modules_are_converted_and_a_second_run_is_identical(tmp_path: Path) -> None:
    source = sharded(folder_of(tmp_path / "source"))
    save({"linear.weight": torch.eye(3)}, source / "2_Dense" / "pytorch_model.bin")
    (source / "2_Dense" / "config.json").write_text('{"in_features": 3}')
    (source / "README.md").write_text("hello")
    (source / "modules.json").write_text(
        json.dumps([{"path": "", "type": "x.Transformer"}, {"path": "2_Dense", "type": "x.Dense"}])
    )
    target = converted(source)
    found = model.find(str(target))
    assert [file.name for file in found.weight_files] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert found.parameters == 18
    assert torch.equal(load_file(target / "2_Dense" / "model.safetensors")["linear.weight"], torch.eye(3))
    written = content(target)
    assert not [name for name in written if name.endswith((".bin", ".bin.index.json"))]
    assert (target / "2_Dense" / "config.json").read_text() == '{"in_features": 3}'
    assert content(converted(source, "again")) == written


@pytest.mark.parametrize("problem", ["absent-shard", "absent-tensor", "tensor-twice"])
def test_shards_that_do_not_fit_their_index_are_rejected(problem: str, tmp_path: Path) -> None:
    source = sharded(folder_of(tmp_path / "source"))
    second = source / "pytorch_model-00002-of-00002.bin"
    if problem == "absent-shard":
        second.unlink()
    else:
        save({"other" if problem == "absent-tensor" else "layer.1.weight": torch.ones(2)}, second)
    with pytest.raises(UsageError, match="incomplete" if problem.startswith("absent") else "in two files"):
        converted(source)


TEXTS = ["", "Hello, World!", "ÀÉÎ öäü", "東京 is big", "[CLS] [MASK] text", "a" * 300, "x\ty\n z"]


def test_a_tokenizer_of_a_vocabulary_gives_the_ids_of_the_published_one(minilm: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("*.safetensors", "tokenizer.json")
    shutil.copytree(minilm, source, ignore=ignore)
    outside = tmp_path / "outside.txt"
    outside.write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\nhidden-word\n")
    # Published configurations have paths of the machines that wrote them. They are not read.
    settings = json.loads((source / "tokenizer_config.json").read_text())
    names = {"vocab_file": str(outside), "tokenizer_file": str(outside), "name_or_path": str(tmp_path)}
    (source / "tokenizer_config.json").write_text(json.dumps(settings | names | {"auto_map": {"AutoTokenizer": "x.Y"}}))
    save({"w": torch.ones(2)}, source / "pytorch_model.bin")
    target = converted(source)
    expected, found = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (minilm, target))
    for tokenizer in (expected, found):
        tokenizer.no_truncation()
        tokenizer.no_padding()
    assert [found.encode(text).ids for text in TEXTS] == [expected.encode(text).ids for text in TEXTS]
    assert b"hidden-word" not in b"".join(content(target).values())
    assert (target / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    assert content(converted(source, "again")) == content(target)


def test_a_tokenizer_of_sentencepiece_gives_the_ids_of_sentencepiece(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = [f"the {word} river flows through the {word} city" for word in ("old", "new", "blue", "cold", "quiet")]
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"architectures": ["XLMRobertaModel"], "model_type": "xlm-roberta"}')
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(source / "sentencepiece.bpe"), vocab_size=26, minloglevel=2
    )
    (source / "sentencepiece.bpe.vocab").unlink()
    save({"w": torch.ones(2)}, source / "pytorch_model.bin")
    found = Tokenizer.from_file(str(converted(source) / "tokenizer.json"))
    processor = sentencepiece.SentencePieceProcessor(str(source / "sentencepiece.bpe.model"))
    for text in texts:
        # <s>, <pad>, </s>, <unk> come first, and sentencepiece has three special pieces.
        assert found.encode(text).ids == [0, *(piece + 1 for piece in processor.encode(text)), 2]


def test_a_model_without_a_vocabulary_is_rejected(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "source")
    (source / "tokenizer.json").unlink()
    save({"w": torch.ones(2)}, source / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"no tokenizer\.json can be made"):
        converted(source)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model with a pickle, in its own folder."""
    folder = folder_of(tmp_path / "source")
    save({"w": torch.ones(500, 500)}, folder / "pytorch_model.bin")
    return folder


def test_the_command_names_the_new_folder_which_can_be_served(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "new"
    with pytest.raises(UsageError) as refused:
        model.find(str(source))
    command = (refused.value.hint or "").split("`")[1].replace("NEW_FOLDER", str(target)).split()
    done = inferctl(*command[1:], "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["model_sha256"] == model.find(document["folder"]).digest
    assert f"converted {source}" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source", "new"] or not list(tmp_path.glob(".*"))
    again = inferctl("convert", source, target)
    assert (again.returncode, "already exists" in again.stderr) == (2, True)
    nothing = inferctl("convert", target, tmp_path / "x")
    assert (nothing.returncode, "nothing to convert" in nothing.stderr) == (2, True)


def test_a_killed_conversion_leaves_no_folder_and_the_next_one_succeeds(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "new"
    command = [sys.executable, "-m", "inferctl", "convert", str(source), str(target)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    until(lambda: list(tmp_path.glob(".new.*.partial")) or process.poll() is not None)
    os.killpg(process.pid, signal.SIGKILL)  # also what converts for it, which would write on for a moment
    process.wait()
    assert not target.exists()
    (partial,) = tmp_path.glob(".new.*.partial")
    with pytest.raises(InferctlError):
        model.find(str(partial))
    os.utime(partial, (0, 0))
    # Two at a time: both have the model of the first one that is complete.
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(convert.convert, source, target, lambda *_: None) for _ in range(2)]
        assert {run.result().path for run in runs} == {target}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "source"]


@pytest.mark.parametrize("name", [".new.partial", "new", f".new.{'0' * 32}.partial"])
def test_a_conversion_into_a_shared_folder_follows_no_link(
    source: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user knows the names that are not random. The last one is guessed."""
    shared, victim = tmp_path / "shared", tmp_path / "victim"
    shared.mkdir()
    victim.mkdir()
    (victim / "file").write_text("of somebody")
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=0))
    (shared / name).symlink_to(victim)
    with nullcontext() if name == ".new.partial" else pytest.raises(NotReadyError, match="cannot be written"):
        assert convert.convert(source, shared / "new", lambda *_: None).path == shared / "new"
    assert {file.name: file.read_text() for file in victim.iterdir()} == {"file": "of somebody"}


def test_what_another_user_puts_in_the_place_of_a_conversion_is_not_used(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save({"w": torch.zeros(1)}, tmp_path / "new" / "model.safetensors")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(NotReadyError, match="cannot be written"):
        convert.convert(source, tmp_path / "new", lambda *_: None)


def test_an_interrupted_conversion_ends_its_process(source: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "inferctl", "convert", str(source), str(tmp_path / "new")],
        stderr=subprocess.PIPE,
        text=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until(lambda: children.read_text())
    child = children.read_text().split()[0]
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.splitlines()[-1]) == (130, "interrupted")
    until(lambda: not Path(f"/proc/{child}").exists())  # it may have been started, but not yet known
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_full_disk_is_an_error_that_leaves_nothing(source: Path, tmp_path: Path) -> None:
    done = inferctl("convert", source, tmp_path / "new", preexec_fn=limit_files)
    assert done.returncode == 3, done.stderr
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_output_that_cannot_be_written_and_too_little_space_are_errors(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert inferctl("convert", source, "/proc/new").returncode in (2, 3)
    with pytest.raises(NotReadyError, match="cannot be written"):
        convert.convert(source, Path("/proc/new"), lambda *_: None)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(NotReadyError, match="the disk is too full"):
        convert.convert(source, tmp_path / "new", lambda *_: None)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_time_and_memory_are_bounded(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "_START_S", 0.3)
    with pytest.raises(NotReadyError, match="did not end within"):
        convert.convert(source, tmp_path / "new", lambda *_: None)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    code = "from inferctl.models import conversion as c; c.bound_memory(0); bytearray({}); print('allocated')"
    runs = {size: python("-c", code.format(size)) for size in (1 << 20, 6 << 30)}
    assert [run.stdout for run in runs.values()] == ["allocated\n", ""]
    assert "MemoryError" in runs[6 << 30].stderr


def test_a_hub_model_with_a_pickle_is_converted_when_it_is_fetched(source: Path, tmp_path: Path) -> None:
    code = (
        "from inferctl.models import hub\nlines = lambda *_: None\nprint(hub.fetch('org/m', None, lines, print).path)\n"
    )

    def fetch(environment: dict[str, str]) -> list[str]:
        done = python("-c", code, env=environment, timeout=300, code=0)
        return done.stdout.splitlines()

    (source / "onnx").mkdir()
    (source / "onnx" / "pytorch_model.bin").write_bytes(b"not the model")
    with serving({"org/m": source}) as hub:
        environment = online(hub, tmp_path / "home")
        spec = tmp_path / "inferctl.yaml"
        spec.write_text("name: m\nmodel: {source: org/m, weights: bake}\nimage: {base: cpu}\n")
        build = ("build", "--dry-run", "--allow-floating", "--no-verify", "--spec", spec)
        refused = [inferctl(*build, env=environment)]
        *progress, path = fetch(environment)
        assert hub.downloads()[-1] == "pytorch_model.bin"
        assert "onnx/pytorch_model.bin" not in hub.downloads()
        counts = [tuple(map(int, line.split())) for line in progress]
        assert counts == sorted(counts)
        assert counts[0][0] < counts[-1][0] == counts[-1][1] > (source / "pytorch_model.bin").stat().st_size
        assert torch.equal(load_file(Path(path) / "model.safetensors")["w"], torch.ones(500, 500))
        hub.requests.clear()
        assert fetch(environment) == [path]
        assert hub.requests == []
        # A build would download the pickle again.
        refused.append(inferctl(*build, env=environment))
        assert [(done.returncode, "inferctl convert org/m" in done.stderr) for done in refused] == [(2, True)] * 2
    # Without the hub, what was downloaded is sufficient.
    shutil.rmtree(path)
    assert fetch(environment | {"HF_HUB_OFFLINE": "1"})[-1] == path


def test_code_in_the_current_folder_is_not_imported(source: Path, tmp_path: Path) -> None:
    """Processes start with `python -m`, which would search the current folder first."""
    trap = "import os; open(os.environ['MARK'], 'a').write(__file__)"
    for name in ("torch", "transformers", "safetensors", "numpy", "tokenizers", "orjson", "inferctl", "resource"):
        (source / f"{name}.py").write_text(trap)
    program = str(Path(sys.executable).with_name("inferctl"))
    environment = os.environ | {"MARK": str(tmp_path / "mark")}
    command = [program, "convert", ".", str(tmp_path / "new")]
    execute(*command, cwd=source, env=environment, code=0)
    for file in source.glob("*.py"):
        shutil.copy(file, tmp_path / "new")
    announced = tmp_path / "ready.json"
    command = [program, "serve", "--model", ".", "--engine", "echo", "--port", "0", "--announce", str(announced)]
    server = subprocess.Popen(command, cwd=tmp_path / "new", env=environment)
    try:
        until(lambda: announced.exists() or server.poll() is not None)
        assert server.poll() is None
    finally:
        server.terminate()
        server.wait(60)
    assert not (tmp_path / "mark").exists()
