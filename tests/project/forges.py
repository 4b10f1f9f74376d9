"""Runs the files of `inferctl init --ci` as GitHub and GitLab do: the scripts in order, in a container.

This module implements the features of the forges: expressions, outputs, checkout, caches and logins. Steps that only
prepare a hosted machine (`setup-python`, `setup-buildx-action`) do nothing: the container has Python and a builder.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.processes import execute

_LIMIT_SECONDS = 1200


@dataclass
class Machine:
    """A clean container for jobs. `folder` has the same path in the container, so that the engine can mount it."""

    container: str
    folder: Path
    environment: dict[str, str]

    def run(self, script: str, where: Path, environment: Mapping[str, str]) -> int:
        """Run a bash script. Its output goes to the output of the test."""
        command = ["docker", "exec", "--workdir", str(where)]
        for name, value in {**self.environment, **environment}.items():
            command += ["--env", f"{name}={value}"]
        command += [self.container, "bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
        return subprocess.run(command, check=False, timeout=_LIMIT_SECONDS, stdin=subprocess.DEVNULL).returncode


@contextmanager
def machine(
    image: str, folder: Path, socket: Path, mounts: list[Path], environment: dict[str, str]
) -> Iterator[Machine]:
    """Start a container of `image` whose docker command uses the engine at `socket`."""
    command = ["docker", "run", "--detach", "--rm", "--init", "--network", "host"]
    command += ["--volume", f"{folder}:{folder}", "--volume", f"{socket}:/var/run/docker.sock"]
    for path in mounts:
        command += ["--volume", f"{path}:{path}:ro"]
    started = execute(*command, image, "sleep", "infinity", code=0)
    container = started.stdout.strip()
    try:
        yield Machine(container, folder, environment)
    finally:
        subprocess.run(["docker", "rm", "--force", container], capture_output=True, check=False)


@dataclass
class Event:
    """The event that starts a job. `branch`: branch of the commit. `target`: target branch of a pull request."""

    commit: str
    branch: str
    default_branch: str
    target: str | None = None
    fork: bool = False


@dataclass
class Result:
    """The result of a job. `steps`: names of the GitHub steps that ran. `cached`: whether the weights were cached."""

    green: bool
    job: str
    workspace: Path
    cached: bool
    summary: str = ""
    steps: list[str] = field(default_factory=list)


def checkout(machine: Machine, origin: Path, commit: str) -> Path:
    """Clone `origin` and check out `commit`."""
    workspace = machine.folder / f"workspace-{uuid.uuid4().hex[:8]}"
    subprocess.run(["git", "clone", "--quiet", str(origin), str(workspace)], check=True)
    subprocess.run(["git", "checkout", "--quiet", commit], cwd=workspace, check=True)
    return workspace


def restore(cache: Path, folder: Path) -> None:
    """Copy a cache to `folder` with hard links, because the jobs do not change cached files."""
    shutil.copytree(cache, folder, symlinks=True, copy_function=os.link)


def evaluate(expression: str, contexts: Mapping[str, Any]) -> Any:
    """Evaluate a GitHub expression with the operators and functions that the files use."""

    def lookup(path: str) -> Any:
        value: Any = contexts
        for part in path.split("."):
            value = value.get(part, "") if isinstance(value, Mapping) else ""
        return value

    def source(match: re.Match[str]) -> str:
        text, word, operator = match.groups()
        if text is not None:
            return repr(text[1:-1])
        if operator is not None:
            return {"&&": " and ", "||": " or "}[operator]
        return word if word in ("format", "always") else f"lookup({word!r})"

    code = re.sub(r"('[^']*')|([A-Za-z_][\w.-]*)|(&&|\|\|)", source, expression)
    names = {"lookup": lookup, "format": lambda text, *values: text.format(*values), "always": lambda: True}
    return eval(code, {"__builtins__": {}}, names)


def filled(value: Any, contexts: Mapping[str, Any]) -> str:
    """Return a value with its `${{ }}` expressions replaced."""
    return re.sub(r"\$\{\{ (.*?) \}\}", lambda found: str(evaluate(found[1], contexts)), str(value))


class GitHub:
    """A repository on GitHub: its variables, secrets and cache."""

    def __init__(self, origin: Path, variables: dict[str, str], secrets: dict[str, str]) -> None:
        self.origin, self.variables, self.secrets = origin, variables, secrets
        self.cache: dict[str, Path] = {}

    def run(self, machine: Machine, event: Event) -> Result:
        """Run the job for this event."""
        workspace = checkout(machine, self.origin, event.commit)
        workflow = yaml.safe_load((workspace / ".github/workflows/inferctl.yml").read_text())
        contexts: dict[str, Any] = {
            "github": {
                "event_name": "pull_request" if event.target else "push",
                "ref": "refs/pull/7/merge" if event.target else f"refs/heads/{event.branch}",
                "ref_name": "7/merge" if event.target else event.branch,
                "base_ref": event.target or "",
                "actor": "someone",
                "token": "token-of-the-job",
                "repository": "Team/Models",
                "event": {"repository": {"default_branch": event.default_branch}},
            },
            "vars": self.variables,
            "secrets": {} if event.fork else self.secrets,
        }
        contexts["env"] = {key: filled(value, contexts) for key, value in workflow["env"].items()}
        jobs = {key: job for key, job in workflow["jobs"].items() if evaluate(job["if"], contexts)}
        assert len(jobs) == 1, f"{list(jobs)} run for {event}"
        ((key, job),) = jobs.items()
        (step,) = (one for one in job["steps"] if one["uses"].startswith("./"))
        given = {name: filled(value, contexts) for name, value in step["with"].items()}
        result = self._composite(machine, workspace, event, contexts, given)
        result.job = key
        return result

    def _composite(
        self, machine: Machine, workspace: Path, event: Event, contexts: dict[str, Any], given: dict[str, str]
    ) -> Result:
        action = yaml.safe_load((workspace / ".github/actions/inferctl/action.yml").read_text())
        inputs = {name: given.get(name, str(entry.get("default", ""))) for name, entry in action["inputs"].items()}
        steps: dict[str, Any] = {}
        contexts = {**contexts, "inputs": inputs, "steps": steps}
        temporary = machine.folder / f"runner-{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        files = {name: temporary / name for name in ("GITHUB_OUTPUT", "GITHUB_PATH", "GITHUB_STEP_SUMMARY")}
        files["GITHUB_STEP_SUMMARY"].touch()
        result = Result(True, "", workspace, cached=False)
        save: list[tuple[str, Path]] = []
        path = machine.environment["PATH"]
        for step in action["runs"]["steps"]:
            condition = step.get("if", "")
            if (not result.green and condition != "always()") or (condition and not evaluate(condition, contexts)):
                continue
            print(f"--- {step['name']}", flush=True)
            result.steps.append(step["name"])
            arguments = {name: filled(value, contexts) for name, value in step.get("with", {}).items()}
            match step.get("uses", "").partition("@")[0]:
                case "":
                    for name in ("GITHUB_OUTPUT", "GITHUB_PATH"):
                        files[name].write_text("")
                    environment = {
                        **{name: filled(value, contexts) for name, value in step.get("env", {}).items()},
                        **{name: str(file) for name, file in files.items()},
                        "GITHUB_SHA": event.commit,
                        "RUNNER_TEMP": str(temporary),
                        "PATH": path,
                    }
                    result.green &= machine.run(step["run"], workspace, environment) == 0
                    lines = [line.partition("=") for line in files["GITHUB_OUTPUT"].read_text().splitlines()]
                    steps[step.get("id", "")] = {"outputs": {name: value for name, _, value in lines}}
                    path = ":".join([*files["GITHUB_PATH"].read_text().split(), path])
                case "docker/login-action":
                    login = f"docker login --username {arguments['username']} --password-stdin {arguments['registry']}"
                    script = f"{login} <<< {arguments['password']}"
                    result.green &= machine.run(script, workspace, {}) == 0
                case "actions/cache":
                    folder = Path(arguments["path"].replace("~", machine.environment["HOME"], 1))
                    result.cached = arguments["key"] in self.cache
                    shutil.rmtree(folder, ignore_errors=True)
                    if result.cached:
                        restore(self.cache[arguments["key"]], folder)
                    else:
                        save.append((arguments["key"], folder))
                case "actions/upload-artifact" | "docker/setup-buildx-action":
                    pass
                case other:
                    raise AssertionError(f"the action {other} is not known here")
        for key, folder in save if result.green else []:
            self.cache[key] = self.origin.parent / f"cache-{uuid.uuid4().hex[:8]}"
            folder.rename(self.cache[key])
        result.summary = files["GITHUB_STEP_SUMMARY"].read_text()
        shutil.rmtree(temporary)
        return result


class GitLab:
    """A project on GitLab: its variables and its cache."""

    def __init__(self, origin: Path, variables: dict[str, str], registry: str) -> None:
        self.origin, self.variables, self.registry = origin, variables, registry
        self.cache: dict[str, Path] = {}

    def run(self, machine: Machine, event: Event) -> Result:
        """Run the job as the shell executor does: all scripts in one shell."""
        workspace = checkout(machine, self.origin, event.commit)
        document = yaml.safe_load((workspace / ".gitlab-ci.yml").read_text())
        for entry in document.pop("include"):
            document |= yaml.safe_load((workspace / entry["local"]).read_text())
        job = {**document[".inferctl"], **document["inferctl"]}
        known = {
            "CI_PROJECT_DIR": str(workspace),
            "CI_COMMIT_SHA": event.commit,
            "CI_COMMIT_REF_NAME": event.branch,
            "CI_DEFAULT_BRANCH": event.default_branch,
            "CI_REGISTRY": self.registry.partition("/")[0],
            "CI_REGISTRY_IMAGE": self.registry,
            "CI_REGISTRY_USER": "gitlab-ci-token",
            "CI_REGISTRY_PASSWORD": "token-of-the-job",
        }
        if event.target:
            known |= {"CI_PIPELINE_SOURCE": "merge_request_event", "CI_MERGE_REQUEST_TARGET_BRANCH_NAME": event.target}
        else:
            known |= {"CI_PIPELINE_SOURCE": "push", "CI_COMMIT_BRANCH": event.branch}
        for name, value in {**job["variables"], **self.variables}.items():
            known[name] = re.sub(r"\$(\w+)", lambda found: known.get(found[1], found[0]), str(value))
        assert any(_holds(rule["if"], known) for rule in job["rules"]), event
        content = b"".join((workspace / name).read_bytes() for name in job["cache"]["key"]["files"])
        key = f"{job['cache']['key']['prefix']}-{hashlib.sha256(content).hexdigest()}"
        (path,) = job["cache"]["paths"]
        cached = key in self.cache
        if cached:
            restore(self.cache[key], workspace / path)
        code = machine.run("\n".join([*job["before_script"], *job["script"]]), workspace, known)
        if code == 0 and not cached:
            self.cache[key] = self.origin.parent / f"cache-{uuid.uuid4().hex[:8]}"
            (workspace / path).rename(self.cache[key])
        for generated in (".inferctl-venv", ".cache"):
            shutil.rmtree(workspace / generated, ignore_errors=True)
        verdict = workspace / "verdict.md"
        summary = verdict.read_text() if verdict.is_file() else ""
        return Result(code == 0, "inferctl", workspace, cached, summary)


def _holds(rule: str, variables: Mapping[str, str]) -> bool:
    """Evaluate `$A == "b"` or `$A == $B`, the two forms in the file."""
    left, right = (variables.get(side[1:]) if side.startswith("$") else side.strip('"') for side in rule.split(" == "))
    return left == right


def passed_on() -> dict[str, str]:
    """Return the environment variables that pip needs to reach its index."""
    wanted = re.compile(r"PIP_.*|.*_CA_(BUNDLE|CERTS|INFO)|SSL_CERT_.*|(HTTPS?|NO|ALL)_PROXY", re.IGNORECASE)
    return {name: value for name, value in os.environ.items() if wanted.fullmatch(name)}
