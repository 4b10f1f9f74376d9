"""Tests the rendered Dockerfile, labels and tag of a spec."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inferctl.config import settings
from inferctl.config.spec import Spec
from inferctl.core.errors import UsageError
from inferctl.facts import catalog
from inferctl.image import locks, render, serve_image
from inferctl.image.records import ImageInfo
from inferctl.models.weights_folders import WeightsFolder, weights_folders
from tests.project.test_imports import imports

LOCKS = locks.Locks(torch="torch==2.13.0 --hash=sha256:aa\n", server="numpy==2.4.6 --hash=sha256:bb\n")
VLLM_LOCKS = replace(LOCKS, vllm="vllm==0.33.0 --hash=sha256:cc\n")
PROVENANCE = render.Provenance("https://example.com/team/minilm", "0123abc", "2026-01-02T03:04:05+00:00", "0.1.0")


def known(spec: Spec, **facts: Any) -> list[WeightsFolder]:
    """Return the folder of the weights of the only model, with these facts."""
    return [replace(each, **facts) for each in weights_folders(spec)]


def rendered(
    base: str = "cuda13.0", chosen: locks.Locks = LOCKS, weights: str | None = None, **flags: Any
) -> render.Rendered:
    """Return what a spec renders. `flags`: its keys, as serve__precision. `weights`: the digest of its model."""
    paths = {"model.source": "sentence-transformers/all-MiniLM-L6-v2", "name": "minilm", "image.base": base}
    spec = settings.resolve(None, {}, {**paths, **{k.replace("__", "."): v for k, v in flags.items()}}).spec
    entry = catalog.base(spec.image.base)
    folders = known(spec, sha256=weights)
    return render.render(spec, entry, catalog.stack(entry.stack), chosen, PROVENANCE, folders)


@pytest.mark.parametrize("base", ["cuda13.0", "ngc25.12", "cpu", "vllm-cuda13.0"])
def test_each_base_renders_its_golden_dockerfile(base: str, golden: Callable[[str, str], None]) -> None:
    chosen = LOCKS if base != "ngc25.12" else locks.Locks(torch=None, server=LOCKS.server)
    chosen = VLLM_LOCKS if base.startswith("vllm") else chosen
    # The hash changes with each change of the server code.
    hashed = r'(image\.version="auto-|content\.sha256=")[0-9a-f]+'
    golden(f"render/{base}.Dockerfile", re.sub(hashed, r"\1HASH", rendered(base, chosen).dockerfile))


def test_heavy_layers_come_first_and_the_config_last() -> None:
    chosen, baked = replace(LOCKS, int8="bitsandbytes==1\n"), {"model__weights": "bake", "model__revision": "abc"}
    text = rendered(chosen=chosen, serve__precision="int8", **baked).dockerfile
    stages = re.findall(r"^COPY --link --from=(\S+) /layer /$", text[text.rindex("\nFROM ") :], re.MULTILINE)
    assert stages == ["torch", "server-dependencies", "int8", "model", "server", "config"]


def test_the_labels_have_the_source_of_the_image() -> None:
    labels = rendered(serve__precision="bf16").labels
    names = ("source", "revision", "base.name", "version")
    assert [labels[f"org.opencontainers.image.{name}"] for name in names] == [
        *(PROVENANCE.source, PROVENANCE.revision, "nvidia/cuda:13.0.3-base-ubuntu24.04"),
        f"bf16-{labels['io.inferctl.content.sha256'][:12]}",
    ]
    assert labels["io.inferctl.precision"] == "bf16"


@pytest.mark.parametrize(
    ("base", "weights_bytes", "seconds"),
    [
        ("cuda13.0", 10**12, 180),
        ("vllm-cuda13.0", 269_060_552, 960),
        ("vllm-cuda13.0", 14_000_000_000, 1080),
        ("vllm-cuda13.0", None, 2400),
    ],
)
def test_the_start_period_grows_with_the_weights_of_a_generator(
    base: str, weights_bytes: int | None, seconds: int
) -> None:
    spec = settings.resolve(None, {}, {"model.source": "org/m", "image.base": base}).spec
    entry = catalog.base(base)

    def made(size: int | None) -> render.Rendered:
        return render.render(spec, entry, catalog.stack(entry.stack), VLLM_LOCKS, PROVENANCE, known(spec, bytes=size))

    found = made(weights_bytes)
    assert f"--start-period={seconds}s " in found.dockerfile
    assert found.tag == made(1).tag, "the tag does not depend on what is on this machine"


def test_secrets_are_mounted_and_never_passed_as_arguments() -> None:
    found = rendered(model__weights="bake", model__revision="abc")
    assert "ARG " not in found.dockerfile
    for secret in found.secrets:
        assert f"--mount=type=secret,id={secret}," in found.dockerfile


def test_a_wheel_folder_replaces_the_index() -> None:
    found = rendered(image__wheels="./wheels")
    assert found.contexts == {"wheels": "./wheels"}
    assert found.dockerfile.count("--no-index --find-links=/wheels") == 2
    assert "PIP_EXTRA_INDEX_URL" not in rendered("cpu", image__wheels="./wheels").dockerfile


LOCAL = {"source": "/data/m", "weights": "bake"}
IMAGE = f"oci://registry.example.com/models/m@sha256:{'0' * 64}"
ADAPTERS = [{"name": "legal", "source": "/data/legal"}, {"name": "Team/sql", "source": IMAGE}]


# The models, then contexts of the build, copies from stages, and what the configuration in the image has as sources.
@pytest.mark.parametrize(
    ("models", "contexts", "copied", "sources"),
    [
        (
            [{**LOCAL, "adapters": ADAPTERS[:1]}],
            {"model": "/data/m", "model-1": "/data/legal"},
            ["weights", "weights-1"],
            ["/model", "/adapters/legal"],
        ),
        ([{"source": "org/m", "weights": "bake"}], {}, ["model"], ["/model"]),
        ([{"source": "/m", "adapters": ADAPTERS}], {}, [], ["/model", "/adapters/legal", "/adapters/Team%2Fsql/model"]),
        (
            [{"source": "org/m", "weights": "download", "adapters": ADAPTERS[:1]}],
            {"model-1": "/data/legal"},
            ["weights-1", "cache"],
            ["org/m", "/adapters/legal"],
        ),
        (
            [LOCAL, {"source": "org/m", "weights": "bake"}, {"source": IMAGE}, {"source": "./m"}],
            {"model-0": "/data/m"},
            ["weights-0", "model-1"],
            ["/models/m0", "/models/m1", "/models/m2/model", "/models/m3"],
        ),
    ],
)
def test_each_model_and_each_adapter_is_a_layer_or_a_mount_of_its_own(
    models: list[dict[str, Any]], contexts: dict[str, str], copied: list[str], sources: list[str]
) -> None:
    several = [{"name": f"m{number}", "model": model} for number, model in enumerate(models)]
    spec = Spec.model_validate({"name": "x", **({"models": several} if models[1:] else {"model": models[0]})})
    entry, folders = catalog.base("cpu"), known(spec, sha256="0" * 64)

    def made(folders: list[WeightsFolder]) -> render.Rendered:
        return render.render(spec, entry, catalog.stack(entry.stack), LOCKS, PROVENANCE, folders)

    found = made(folders)
    assert found.contexts == contexts
    final = found.dockerfile[found.dockerfile.rindex("\nFROM ") :]
    stages = re.findall(r"^COPY --link --from=(\S+) /layer /$", final, re.MULTILINE)
    assert stages == ["torch", "server-dependencies", *copied, "server", "config"]
    assert ("snapshot_download" in found.dockerfile) == any(stage.startswith("model") for stage in stages)
    assert ("INFERCTL_MODEL_SOURCE=/model" in final) == (not models[1:] and "cache" not in copied)
    config = settings.parse(found.files["layers/config/etc/inferctl/inferctl.yaml"].decode())
    inside = [each.model for each in settings.resolve(config, {}, {}).spec.each()]
    assert [source for each in inside for source in (each.source, *(a.source for a in each.adapters))] == sources
    image = ImageInfo("", (), (), 0, "", "", {}, (), (), found.labels, ())
    listed = [(each.name or "x", each.base) for each in serve_image.folders_of(image)]
    assert listed == [(each.name, each.base) for each in folders]
    changed = made([*folders[:-1], replace(folders[-1], sha256="1" * 64)])
    assert (changed.tag != found.tag) == (folders[-1].weights == "bake")


def test_an_image_has_no_more_layers_than_file_systems_mount() -> None:
    adapters = [{"name": f"a{number}", "source": f"/a{number}"} for number in range(115)]
    spec = Spec.model_validate({"name": "x", "model": {**LOCAL, "adapters": adapters}})
    with pytest.raises(UsageError, match="more than 115 layers"):
        render.render(spec, catalog.base("cpu"), catalog.stack("torch2.13-cpu"), LOCKS, PROVENANCE)


def test_a_local_model_is_baked_from_its_own_context_without_its_path(tmp_path: Path) -> None:
    found = rendered(model__weights="bake", model__source=str(tmp_path))
    assert found.contexts == {"model": str(tmp_path)}
    assert "--mount=type=bind,from=model,target=/context" in found.dockerfile
    everything = found.dockerfile.encode() + b"".join(found.files.values()) + str(found.labels).encode()
    assert str(tmp_path).encode() not in everything


def test_the_config_in_the_image_is_a_valid_spec() -> None:
    budgets = {"team:a": "5 EUR/day"}
    shared = {"access__budgets": budgets, "metering__mode": "required", "metering__prices": "sub/prices.yaml"}
    found = rendered(serve__precision="bf16", serve__max_batch_tokens=4096, **shared)
    document = settings.parse(found.files["layers/config/etc/inferctl/inferctl.yaml"].decode())
    spec, alone = (settings.resolve(document, env, {}).spec for env in ({}, settings.OPEN_ACCESS))
    assert (spec.access.budgets, spec.metering.prices, alone.access.budgets) == (budgets, "/keys/prices.yaml", {})
    assert (spec.serve.precision, spec.serve.max_batch_tokens, spec.serve.host) == ("bf16", 4096, "0.0.0.0")


NONSENSE = {
    ("platform", "is not a valid platform", "linux/amd64"): [
        *("linux/amd64; rm -rf /", "linux", "linux/", "linux/arm/v7/x", "linux/amd64\n")
    ],
    ("base_image", "is not a valid base image", "use registry.example.com/"): [
        *("cuda:", "registry.example.com/Cuda", "cuda@sha256:12", "a b", "-cuda", "cuda:13@md5:1")
    ],
}


@pytest.mark.parametrize(("said", "value"), [(said, value) for said, values in NONSENSE.items() for value in values])
def test_values_that_could_change_the_dockerfile_are_rejected(said: tuple[str, str, str], value: str) -> None:
    name, message, hint = said
    with pytest.raises(UsageError) as caught:
        rendered(**{f"image__{name}": value})
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    "name", ["ubuntu", "r.example.com:5000/a/b_c/d", "cuda:13.0.2-base", f"a/b:1@sha256:{'0' * 64}"]
)
def test_a_base_image_may_have_a_registry_a_tag_and_a_digest(name: str) -> None:
    found = rendered(image__base_image=name, image__platform="linux/arm/v7")
    assert f"FROM {name} AS python" in found.dockerfile
    assert found.labels.get("org.opencontainers.image.base.digest", "") == name.partition("@")[2]


def test_the_server_layer_has_the_modules_that_the_server_imports() -> None:
    top = "layers/server/opt/inferctl/server/inferctl/"
    names = {name.removeprefix(top) for name in render.server_files()}
    assert {"serve/__main__.py", "serve/reference.py", "_assets/benchmarks/hardware/t4.yaml"} <= names
    assert not [name for name in names if name.endswith(".pyc") or "__pycache__" in name]
    folders, package = {name.partition("/")[0] for name in names if "/" in name}, render.assets.package()
    assert folders == {"_assets", "batching", "config", "core", "facts", "models", "reading", "serve", "tenancy"}
    for name in names:
        if name.endswith(".py"):
            for imported in imports(package / name):
                if not imported.startswith("inferctl.") or imported == "inferctl.__version__":
                    continue
                path = imported.removeprefix("inferctl.").replace(".", "/")
                parent = path.rpartition("/")[0]
                # `from inferctl.core.errors import X` imports errors.py, `from inferctl.core import errors` too.
                places = [f"{path}.py", f"{path}/__init__.py", f"{parent}.py", f"{parent}/__init__.py"]
                found = next(place for place in places if (package / place).is_file())
                assert found in names, f"{name} imports {imported}, which the image does not have"


def tag(chosen: locks.Locks = LOCKS, weights: str | None = None, **flags: Any) -> str:
    return rendered(chosen=chosen, weights=weights, **{"name": "m", "model__source": "org/m", **flags}).tag


@pytest.mark.parametrize(
    ("flags", "same"),
    [
        ({"image__repository": "registry.example.com/ml/m"}, True),
        ({"image__platform": "linux/amd64"}, True),
        ({"hardware": ["t4"]}, True),
        ({"metering__ledger": "postgresql://usage:secret@db/usage"}, True),
        ({"serve__max_batch_tokens": 64}, False),
        ({"serve__precision": "bf16"}, False),
        ({"image__base_image": "cuda:13"}, False),
        ({"image__base": "cuda12.8"}, False),
        ({"chosen": locks.Locks(LOCKS.torch, "numpy==2.4.7 --hash=sha256:bb\n")}, False),
        ({"model__weights": "bake", "model__revision": "a" * 40}, False),
    ],
)
def test_only_settings_in_the_image_change_its_tag(flags: dict[str, Any], same: bool) -> None:
    assert re.fullmatch("auto-[0-9a-f]{12}", tag())
    assert (tag(**flags) == tag()) == same


def test_the_tag_depends_on_the_baked_weights_and_the_revision() -> None:
    known, other, absent = (
        tag(weights=weights, model__weights="bake", model__source="/m", name="m")
        for weights in ("a" * 64, "b" * 64, None)
    )
    assert known != other and absent == "auto-unknown", "the weights are not here"
    hub = [tag(model__weights="bake", model__revision=commit * 40) for commit in "ab"]
    assert hub[0] != hub[1]


def test_the_tag_depends_on_the_server_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before, files = tag(), render.server_files()
    changed = tmp_path / "batcher.py"
    changed.write_text("# another batcher\n")
    name = next(name for name in files if name.endswith("batching/batcher.py"))
    monkeypatch.setattr(render, "server_files", lambda embed: {**files, name: changed})
    assert tag() != before


def test_the_commit_is_in_the_image_and_not_in_its_tag() -> None:
    entry = catalog.base("cuda13.0")
    spec = settings.resolve(None, {}, {"model.source": "org/m"}).spec
    later = render.Provenance("https://example.com/team/minilm", "4567def", "2026-02-03T04:05:06+00:00", "0.2.0", 9**9)
    one = render.render(spec, entry, catalog.stack(entry.stack), LOCKS, PROVENANCE)
    two = render.render(spec, entry, catalog.stack(entry.stack), LOCKS, later)
    assert one.tag == two.tag
    assert two.build_args == {"SOURCE_DATE_EPOCH": str(9**9)}
    assert "4567def" in two.dockerfile
    # The file times are the same at each commit.
    steps = [[line for line in made.dockerfile.splitlines() if "touch" in line] for made in (one, two)]
    assert steps[0] == steps[1] != []
