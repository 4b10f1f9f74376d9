"""`inferctl model`: push, inspect and pull models as images of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from inferctl.cli import build_view, console, download, options
from inferctl.cli.build import tag_reference
from inferctl.cli.options import Json
from inferctl.core import outputs
from inferctl.core.errors import UsageError
from inferctl.core.sizes import size
from inferctl.models import adapter, image_source
from inferctl.models.adapter import AdapterFolder
from inferctl.models.model import ModelFolder, is_hub_id

_Image = Annotated[
    str, typer.Argument(metavar="REF", help="Name of the model image, with or without `oci://`; a digest pins it.")
]

app = options.group("model", "Push, inspect and pull models as images of their own.")


_PUSH_EPILOG = """\b
Examples:
  # Push a folder, then serve it by digest on another machine
  inferctl model push ./all-MiniLM-L6-v2 registry.example.com/models/minilm:v1
  inferctl serve --model oci://registry.example.com/models/minilm@sha256:...
  # Push a commit of a hub model
  inferctl model push org/name registry.example.com/models/name:v1 --revision COMMIT
"""

_PULL_EPILOG = """\b
Examples:
  # Write ./minilm, then serve it
  inferctl model pull registry.example.com/models/minilm:v1 --output ./minilm
  inferctl serve --model ./minilm
"""


@app.command(epilog=_PUSH_EPILOG)
def push(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a model or adapter, hub id or model image (`oci://REF`).")
    ],
    reference: Annotated[
        str, typer.Argument(metavar="REF", help="Name of the image, such as registry.example.com/models/name:tag.")
    ],
    revision: options.Revision = None,
    license_id: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="License of the model (SPDX). [default: from its README.md]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Push a model or an adapter as an image and print oci://name@digest.

    The image has no base. Each weight file is a layer, and all other files are one. Equal files make equal layers, so
    that a registry stores them once.
    """
    from inferctl.image import model_transfer

    if revision is not None and not is_hub_id(model):
        raise UsageError(f"{model} has no revision {revision}: it is no hub id", "remove `--revision`")
    name = tag_reference(reference.removeprefix("oci://"))
    if (Path(model) / adapter.WEIGHTS).is_file() and not (Path(model) / "config.json").is_file():
        folder: ModelFolder = AdapterFolder(Path(model))
    else:
        folder = download.fetch(model, revision)
    found = build_view.follow(model_transfer.push(folder, model, name, license_id))
    console.result(found.document(), f"oci://{found.reference}", as_json=as_json)


@app.command()
def inspect(image: _Image, as_json: Json = False) -> None:
    """Print what a model image contains.

    Reads the labels of the image in its registry, and pulls nothing.

    Example: inferctl model inspect registry.example.com/models/minilm:v1
    """
    from inferctl.image import model_image

    found = model_image.inspect(image)
    if as_json:
        console.document(found.document())
        return
    facts = {
        "image": f"oci://{found.reference}",
        "source": found.source,
        "revision": found.revision,
        "license": found.license,
        "sha256": found.sha256,
        "architecture": f"{found.architecture}, {found.task}, {found.parameters:,} parameters",
        "numbers": found.number_formats + (f", {found.quantization}" if found.quantization else ""),
        "files": f"{size(found.bytes)}, {size(sum(each for _, each in found.layers))} in the registry",
    }
    lines = [f"{name:<13} {value}" for name, value in facts.items() if value]
    lines += [f"  {size(bytes_):>10}  {name}" for name, bytes_ in found.files.items()]
    console.data("\n".join(map(console.plain, lines)))


@app.command(epilog=_PULL_EPILOG)
def pull(
    image: _Image,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Write a new folder. [default: the cache of this machine]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Pull the files of a model image and print their folder.

    Checks their hash. The folder gets its name when it is complete.
    """
    from inferctl.image import model_image, model_transfer

    if output is None:
        folder = download.pull_image(image)
    else:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UsageError(f"{output} already exists", "name a new folder with `--output`")
        if output.exists() and (output.is_symlink() or output.is_mount() or output.samefile(Path.cwd())):
            raise UsageError(
                f"{output} is a link, a mount point or the current folder, which a pull cannot replace",
                f"name a new folder in it: `--output {output / 'model'}`",
            )
        outputs.check_folder(output.absolute().parent, "--output")
        folder = build_view.follow(model_transfer.pull(model_image.inspect(image), output))
    console.result({"image": image_source.reference(image), "folder": str(folder)}, str(folder), as_json=as_json)
