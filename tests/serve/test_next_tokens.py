"""The reference of generation equals transformers, and damaged weights exceed the limits of every precision."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inferctl.core.errors import UsageError
from inferctl.models import divergence
from inferctl.models.divergence import Divergence, Scored
from inferctl.serve.reference import reference
from tests import tiny_models
from tests.processes import python

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "prepare_int8.py"


def texts(count: int = 6) -> list[str]:
    return [json.loads(line)["text"] for line in tiny_models.CORPUS.read_text().splitlines()[:count]]


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_generator(tmp_path_factory.mktemp("generator"))


@pytest.fixture(scope="module")
def expected(generator: Path) -> list[Scored]:
    """The fp32 reference of the undamaged model."""
    return [text for text in divergence.read_reference(reference(str(generator), texts())["texts"]) if text]


def distributions(model: Any, ids: list[int]) -> Any:
    import torch

    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)


def test_the_reference_prints_what_transformers_computes(generator: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(generator)
    chat = [{"role": "user", "content": "which bread"}]
    inputs = ["one loaf of bread", "x " * 600, chat]
    done = python("-m", "inferctl.serve.reference", generator, input=json.dumps(inputs), code=0)
    document = json.loads(done.stdout)
    assert document["tokens"][1] == 256
    assert document["texts"][0]["ids"] == tokenizer(inputs[0])["input_ids"]
    assert tokenizer.decode(document["texts"][2]["ids"]) == "[CLS]which bread[SEP][CLS]"
    model = AutoModelForCausalLM.from_pretrained(generator)
    for text in document["texts"]:
        found = distributions(model, text["ids"])[:-1]
        following = [row[token].item() for row, token in zip(found, text["ids"][1:], strict=True)]
        assert text["logprobs"] == pytest.approx(following, abs=1e-4)
        assert text["top_logprobs"][0] == pytest.approx(found[0].topk(64).values.tolist(), abs=1e-4)
        assert [ids[0] for ids in text["top_ids"]] == found.argmax(dim=-1).tolist()


def test_it_ends_after_the_tokens_that_are_asked_for(generator: Path) -> None:
    document = reference(str(generator), texts(), max_tokens=150)
    assert sum(document["tokens"][:-1]) < 150 <= sum(document["tokens"])
    assert len(document["texts"]) == len(document["tokens"]) < 6
    assert reference(str(generator), texts(1), max_input_tokens=9)["texts"][0]["ids"] == document["texts"][0]["ids"][:9]


def test_chat_messages_without_a_template_have_no_tokens(tmp_path: Path) -> None:
    folder = tiny_models.make_generator(tmp_path, "gpt_neox", chat=False)
    document = reference(str(folder), [[{"role": "user", "content": "hi"}], "a loaf"])
    assert document["texts"][0] is None
    assert document["tokens"][0] == 0
    assert document["texts"][1]["logprobs"]


def test_pairs_are_not_for_a_generative_model(generator: Path) -> None:
    with pytest.raises(UsageError, match="is a model for generate"):
        reference(str(generator), [["a query", "a document"]])


def served(model: Any, reference: list[Scored]) -> Divergence:
    """Return the divergence of `model` if a server lists its 20 most likely tokens, as vLLM does."""
    found = []
    for text in reference:
        rows = distributions(model, list(text.ids))[:-1]
        best = rows.topk(20)
        found.append(
            Scored(
                text.ids,
                [
                    dict(zip(tokens, values, strict=True)) | {token: row[token].item()}
                    for tokens, values, token, row in zip(
                        best.indices.tolist(), best.values.tolist(), text.ids[1:], rows, strict=True
                    )
                ],
            )
        )
    return divergence.compare(reference, found)


def undamaged(model: Any) -> None:
    pass


def add_noise(model: Any) -> None:
    import torch

    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * parameter.std() * 0.3


def zero_a_layer(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()


def swap_layers(model: Any) -> None:
    first, second = model.model.layers[0].mlp, model.model.layers[2].mlp
    model.model.layers[0].mlp, model.model.layers[2].mlp = second, first


@pytest.mark.parametrize(
    ("damage", "precision", "passes"),
    [
        (undamaged, "fp32", True),
        (undamaged, "bf16", True),
        (undamaged, "fp16", True),
        (add_noise, "int8", False),
        (zero_a_layer, "int8", False),
        (swap_layers, "int8", False),
    ],
)
def test_damaged_weights_exceed_the_limits_of_8_bits(
    generator: Path, expected: list[Scored], damage: Callable[[Any], None], precision: str, passes: bool
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(generator, dtype=dtype).eval()
    damage(model)
    found = served(model, expected)
    assert (divergence.failure(found, divergence.limits_of(precision)) is None) == passes, found


def test_an_int8_checkpoint_is_close_to_its_weights(generator: Path, expected: list[Scored], tmp_path: Path) -> None:
    """The reference dequantizes the weights of the checkpoint, so it differs from the original by their rounding."""
    import torch
    from safetensors.torch import load_file

    folder = tmp_path / "int8"
    subprocess.run([sys.executable, str(SCRIPT), str(generator), str(folder)], check=True, capture_output=True)
    assert load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].dtype == torch.int8
    rounded = [text for text in divergence.read_reference(reference(str(folder), texts())["texts"]) if text]
    assert [text.ids for text in rounded] == [text.ids for text in expected]
    found = divergence.compare(expected, rounded)
    assert 1e-5 < found.kl_mean < 0.05


def test_other_quantized_weights_have_no_reference(generator: Path, tmp_path: Path) -> None:
    shutil.copytree(generator, tmp_path, dirs_exist_ok=True)
    config = json.loads((generator / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="cannot read weights in awq"):
        reference(str(tmp_path), texts(1))
