"""What adapters compute in fp32, and models with adapters in their weights. PEFT is the oracle of both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from inferctl.core.errors import UsageError
from inferctl.models import adapter, adapter_effect, conversion
from inferctl.models.adapter_effect import Effect
from inferctl.models.model import ModelFolder
from inferctl.serve.reference import reference
from tests import tiny_models
from tests.processes import inferctl

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 8, "lora_alpha": 2, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ALL,
        "rank_pattern": {"layers.1.mlp.up_proj": 2, "q_proj": 8},
        "alpha_pattern": {"down_proj": 1, r"^model.layers.0.self_attn.q_proj": 16},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_generator(tmp_path_factory.mktemp("base"))


def peft_model(base: Path, options: dict[str, Any], dtype: Any = None) -> Any:
    """Return a model with a random adapter, the same for the same base and options."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype or torch.float32)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)).eval()


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, options in ADAPTERS.items():
        peft_model(base, options).save_pretrained(folder / name)
    return folder


def test_the_reference_computes_what_peft_does(base: Path, saved: Path) -> None:
    import torch

    found = reference(str(base), ["one loaf of bread"], adapters=[saved / name for name in ADAPTERS])
    ids = found["texts"][0]["ids"]
    for options, texts in zip(ADAPTERS.values(), found["adapters"], strict=True):
        with torch.inference_mode():
            rows = torch.log_softmax(peft_model(base, options)(torch.tensor([ids])).logits[0, :-1], dim=-1)
        listed = rows.gather(1, torch.tensor(texts[0]["top_ids"]))
        assert torch.allclose(listed, torch.tensor(texts[0]["top_logprobs"]), atol=1e-4)
        assert torch.allclose(listed[:, 0], rows.amax(dim=-1), atol=1e-4)
        assert texts[0]["logprobs"] != found["texts"][0]["logprobs"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_weights_are_those_of_peft(base: Path, saved: Path, tmp_path: Path, name: str, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    number_format = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=number_format)
    model.save_pretrained(tmp_path / "base", max_shard_size="300KB")
    folder, target = ModelFolder(tmp_path / "base"), tmp_path / "merged"
    assert len(folder.weight_files) > 2
    target.mkdir()
    conversion.merge(folder, adapter.read(name, saved / name, folder), target)
    expected = peft_model(base, ADAPTERS[name]).merge_and_unload().state_dict()
    found = {key: tensor for file in target.glob("*.safetensors") for key, tensor in load_file(file).items()}
    assert found.keys() == folder.number_formats.keys()
    for key, tensor in found.items():
        assert tensor.dtype == number_format
        # In bf16, base and sum are rounded once each, to 8 bits.
        largest = expected[key].abs().max().item() + model.state_dict()[key].abs().max().item()
        assert (tensor.float() - expected[key]).abs().max().item() <= largest * (1e-6 if dtype == "float32" else 2**-8)


def test_the_command_writes_a_model_that_check_names_and_serve_reads(base: Path, saved: Path, tmp_path: Path) -> None:
    done = inferctl("merge", base, saved / "rslora", "--output", tmp_path / "new", "--json", code=0)
    found = json.loads(done.stdout)
    assert found["next_tokens"]["kl"] < 1e-4 < 1e-2 < found["next_tokens"]["kl_base"]
    assert (found["base_sha256"], found["model_sha256"]) == (
        ModelFolder(base).digest,
        ModelFolder(tmp_path / "new").digest,
    )
    names = {file.name for file in base.iterdir()}
    assert {file.name for file in (tmp_path / "new").iterdir()} == {*names, "merged.json"}
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "new" / name).read_bytes() == (base / name).read_bytes()
    checked = json.loads(inferctl("check", "--model", tmp_path / "new", "--json").stdout)
    assert checked["model"]["merged"]["adapter_sha256"] == found["adapter_sha256"]
    again = inferctl("merge", base, saved / "rslora", "--output", tmp_path / "new")
    assert (again.returncode, "already exists" in again.stderr) == (2, True)


def test_quantized_weights_are_not_merged(base: Path, saved: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, tmp_path / "base" / "model.safetensors")
    folder = ModelFolder(tmp_path / "base")
    with pytest.raises(UsageError, match="F8_E4M3, which is quantized"):
        conversion.merge(folder, adapter.read("attention", saved / "attention", folder), tmp_path)


def served(model: Any, texts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what a server that computes with `model` lists: the 20 most likely tokens, as vLLM does."""
    import torch

    found = []
    for text in texts:
        with torch.inference_mode():
            rows = torch.log_softmax(model(torch.tensor([text["ids"]])).logits[0, :-1].float(), dim=-1)
        best = rows.topk(20)
        following = [row[token].item() for row, token in zip(rows, text["ids"][1:], strict=True)]
        lists = {"top_ids": best.indices.tolist(), "top_logprobs": best.values.tolist()}
        found.append({"ids": text["ids"], "logprobs": following, **lists})
    return found


def scale(factor: float, layers: str = "") -> Any:
    def change(model: Any) -> None:
        for name, module in model.named_modules():
            if layers in name and isinstance(getattr(module, "scaling", None), dict):
                module.scaling = {key: value * factor for key, value in module.scaling.items()}

    return change


@pytest.mark.parametrize(
    ("trained", "error", "reason"),
    [
        (1, scale(1), None),
        (1, scale(0), "is not applied"),
        (1, scale(0.5), "is not applied"),
        (1, scale(1.5), "is not applied"),
        (1, scale(8**0.5), "is not applied"),
        (1, scale(0, "mlp"), "is not applied"),
        (1, scale(0, "layers.2"), "is not applied"),
        (1, scale(-1), "is not applied"),
        (1e-6, scale(1), "changes nothing"),
        (0.02, scale(1), None),  # less than rounding to bf16
        (0.02, scale(0), None),
    ],
)
def test_an_adapter_that_is_not_applied_in_bf16_is_found(
    base: Path, saved: Path, tmp_path: Path, trained: float, error: Any, reason: str | None
) -> None:
    import torch

    folder = tmp_path / "adapter"
    shutil.copytree(saved / "rslora", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * trained}))
    model = peft_model(base, ADAPTERS["rslora"], torch.bfloat16)
    scale(trained)(model)
    expected = reference(str(base), list(adapter_effect.PROMPTS), adapters=[folder])
    with model.disable_adapter():
        plain = adapter_effect.texts(served(model, expected["texts"]))
    error(model)
    found = adapter_effect.texts(served(model, expected["texts"]))
    effect = Effect.of(expected["texts"], expected["adapters"][0], plain, found)
    assert (effect.failure("bf16") or "")[: len(reason or "")] == (reason or ""), effect
    assert (effect.failure("bf16") is None) == (reason is None), effect
    assert effect.is_hidden == (trained < 1), effect
