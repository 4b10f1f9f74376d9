"""The Job of `inferctl deploy --embed`: its parts, its nodes, what ends it, and what it leaves out of a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from inferctl import cli
from inferctl.config.spec import Image, Spec
from inferctl.core.errors import UsageError
from inferctl.deploy import layout
from inferctl.deploy.objects.embed import EmbedRun
from tests.deploy import plans
from tests.deploy.conftest import write
from tests.deploy.test_layout import OVERLAYS, Build, named, pod_of
from tests.deploy.test_own_manifests import findings
from tests.deploy.validation import VERSIONS, problems

ARGUMENTS = ("in/*.parquet", "--output", "out")


def files(parts: int | None = None, version: str | None = None) -> dict[str, str]:
    spec = plans.embed().model_copy(update={"image": Image(embed=True)})  # type: ignore[call-arg]
    return layout.embed_files(plans.plan(spec, kubernetes=version), EmbedRun("texts", ARGUMENTS, parts))


@pytest.mark.parametrize("version", VERSIONS)
def test_each_object_is_valid_and_the_lint_finds_nothing(version: str, build: Build, tmp_path: Path) -> None:
    texts = files(version=version)
    folders = sorted({name.rpartition("/")[0] for name in texts})
    assert folders == [f"embed/{each['name']}" for each in sorted(plans.CLUSTERS, key=lambda each: each["name"])]
    assert [problem for each in folders for one in build(texts, each) for problem in problems(one, version)] == []
    write(texts, tmp_path)
    assert [findings(tmp_path / each, int(version[2:])) for each in folders] == [[]] * 3


def test_a_pod_computes_its_part_as_the_server_of_its_flavor_would(build: Build) -> None:
    built, server = (
        build(files(64), "embed/gcp-europe-west4"),
        pod_of(build(plans.files(), OVERLAYS[2]), "embed-a100-half"),
    )
    job = named(built, "Job", "embed-embed-a100-half")["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][1:5] == ["-m", "inferctl", "embed", "--spec"]
    assert container["command"][6:] == [*ARGUMENTS, "--part", "$(JOB_COMPLETION_INDEX)/64"]
    assert (job["completionMode"], job["completions"]) == ("Indexed", 64) and 0 < job["parallelism"] < 64
    limits = server["containers"][0]["resources"]["limits"]
    assert container["resources"]["limits"] == limits and limits["nvidia.com/gpu"] == 1
    assert pod["affinity"]["nodeAffinity"] == server["affinity"]["nodeAffinity"]
    assert pod["tolerations"] == server["tolerations"]
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert volumes["data"]["persistentVolumeClaim"] == {"claimName": "texts"}
    assert volumes.keys() == {mount["name"] for mount in container["volumeMounts"]} == {"tmp", "model", "data"}
    assert {"name": "INFERCTL_ACCESS_KEYS", "value": "null"} in container["env"]
    ignored, ended = job["podFailurePolicy"]["rules"]
    assert (ignored["action"], ignored["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert (ended["action"], ended["onExitCodes"]["values"]) == ("FailJob", [2])


@pytest.mark.parametrize("specs", [(plans.embed(),), ()], ids=["no command line", "two models"])
def test_an_image_that_cannot_run_the_command_is_an_error(specs: tuple[Spec, ...]) -> None:
    with pytest.raises(UsageError, match="needs one model"):
        layout.embed_files(plans.plan(*specs), EmbedRun("texts", ARGUMENTS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "3"], "--embed needs"),
        (["--embed", "texts"], "--embed needs"),
        (["--embed", "Te_xts", "--", *ARGUMENTS], "'Te_xts'"),
        (["--embed", "texts", "--", "in.csv", "--outpt", "out"], "--outpt"),
        (["--embed", "texts", "--", "in.csv"], "no --output"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["deploy", "--output", "x", *arguments]) == 2
    assert message in capsys.readouterr().err
