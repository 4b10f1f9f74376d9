"""What is wrong with an image that builds all the same; each finding with its reason and its fix."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from inferctl.image.forecast import size

if TYPE_CHECKING:
    from inferctl.catalog import BaseImage, Stack
    from inferctl.image.layers import Waste
    from inferctl.spec import Spec

# What torch's CUDA wheels bring themselves.
_IN_WHEELS = ("cublas", "cudnn", "nccl", "cusparse", "cufft")
_EOL_NOTICE = datetime.timedelta(days=90)
# Below these, layer waste is not worth a line: a rewritten configuration file, a touched package database.
WASTE_BYTES, _WASTE_SHARE = 1_000_000, 0.01
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|PASSWORD|PASSWD|SECRET|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIALS?)(?:$|_)", re.IGNORECASE
)
_SECRET_VALUE = re.compile(
    r"://[^/\s:@\"']+:[^/\s@\"']+@"  # credentials in a URL
    r"|\bhf_[A-Za-z0-9]{20,}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{30,}|\bglpat-[\w-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Finding:
    """One finding. An `error` stops a build, a `warning` does not."""

    code: str
    level: Literal["error", "warning"]
    message: str
    reason: str
    fix: str

    def text(self) -> str:
        """For people, on one line."""
        return f"{self.message} [{self.code}]: {self.reason}. Fix: {self.fix}"


def plan(
    spec: Spec, base: BaseImage, stack: Stack, dockerfile: str, today: datetime.date, *, hub_model: bool
) -> list[Finding]:
    """What can be said before anything is built. `hub_model`: model.source names a hub model, not a folder."""
    return [
        *_cuda_twice(base, stack),
        *_floating_base(spec, base),
        *(_floating_model(spec) if hub_model else ()),
        *_end_of_life(base, today),
        *_secrets_in_dockerfile(dockerfile),
    ]


def built(environment: Mapping[str, str], user: str, waste: Waste | None) -> list[Finding]:
    """What the built image itself shows. `environment`, `user`: of its configuration; `waste`: None when it was not analysed."""
    named = [
        name
        for name, value in environment.items()
        if value and (_SECRET_NAME.search(name) or _SECRET_VALUE.search(value))
    ]
    return [
        *(_secret(name, "the environment of the image") for name in sorted(named)),
        *_root(user),
        *(_wasted(waste) if waste else ()),
    ]


def errors(findings: Iterable[Finding]) -> list[Finding]:
    """Only those that stop a build."""
    return [finding for finding in findings if finding.level == "error"]


def _cuda_twice(base: BaseImage, stack: Stack) -> Iterator[Finding]:
    twice = [name for name in base.ships if name in _IN_WHEELS]
    if twice and stack.cuda is not None and "torch" not in base.provides:
        yield Finding(
            "cuda-twice",
            "warning",
            f"the image ships CUDA twice: the base {base.key} has {', '.join(twice)}",
            "torch's wheels bring their own copies and load those, so the base's are 1-3 GB that nothing uses",
            "take a `-base` tag, as in `inferctl catalog bases`",
        )


def _floating_base(spec: Spec, base: BaseImage) -> Iterator[Finding]:
    pinned = "@sha256:" in spec.image.base_image if spec.image.base_image else base.digest is not None
    if not pinned:
        name = spec.image.base_image or base.reference
        yield Finding(
            "floating-base",
            "warning",
            f"the base {name} has no digest",
            "the same spec builds another image once the tag moves, and fails once it is deleted",
            "mirror the base and pin it: image.base_image: REGISTRY/NAME@sha256:...",
        )


def _floating_model(spec: Spec) -> Iterator[Finding]:
    revision = spec.model.revision
    if revision and _COMMIT.fullmatch(revision):
        return
    fetched = spec.model.weights != "mount"
    yield Finding(
        "floating-model",
        "error" if fetched else "warning",
        f"the revision of {spec.model.source} floats" + (f": {revision!r} is no commit" if revision else ""),
        "the image would serve whatever the hub holds that day, and two builds of one spec could differ",
        "set model.revision to a commit of 40 hex digits" + ("; `--allow-floating` builds anyway" if fetched else ""),
    )


def _end_of_life(base: BaseImage, today: datetime.date) -> Iterator[Finding]:
    end = base.end_of_life
    if end is None or today < end - _EOL_NOTICE:
        return
    past = today >= end
    yield Finding(
        "base-end-of-life",
        "warning",
        f"the base {base.key} {'reached' if past else 'reaches'} its end of life on {end.isoformat()}",
        "there are no security fixes after that, and its tags may be deleted",
        "move to a newer base (`inferctl catalog bases`), or keep a mirror",
    )


def _secrets_in_dockerfile(dockerfile: str) -> Iterator[Finding]:
    joined = re.sub(r"\\\n", " ", dockerfile)
    for line in joined.splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction.upper() not in ("ARG", "ENV", "LABEL"):
            continue
        names = re.findall(r"([A-Za-z_][\w.-]*)(?==|\s|$)", rest) if instruction.upper() != "LABEL" else []
        for name in dict.fromkeys(names):
            if _SECRET_NAME.search(name):
                yield _secret(name, f"{instruction.upper()} of the Dockerfile")
        if _SECRET_VALUE.search(rest):
            yield _secret("a value that looks like a credential", f"{instruction.upper()} of the Dockerfile")


def _secret(name: str, where: str) -> Finding:
    return Finding(
        "secret-in-image",
        "error",
        f"{name} is in {where}",
        "everyone who can pull the image can read it, from its history too",
        "pass it as a build secret (`--pip-conf`, `--ca`, `--hf-token-file`), or when the container starts",
    )


def _root(user: str) -> Iterator[Finding]:
    if user.partition(":")[0] in ("", "0", "root"):
        yield Finding(
            "runs-as-root",
            "error",
            "the image runs as root",
            "an intruder in the server would own the container, and clusters refuse such images",
            "end the Dockerfile with a numeric USER",
        )


def _wasted(waste: Waste) -> Iterator[Finding]:
    if waste.bytes < WASTE_BYTES or waste.bytes < waste.total * _WASTE_SHARE:
        return
    worst: Sequence[str] = [f"{file.path} ({size(file.bytes)}, {file.how})" for file in waste.files[:3]]
    yield Finding(
        "wasted-bytes",
        "warning",
        f"{size(waste.bytes)} of the image's {size(waste.total)} cannot be seen in it",
        f"a later layer overwrites or deletes {len(waste.files)} files that an earlier one carries: {', '.join(worst)}",
        "delete or change files in the RUN that makes them; no `chown -R` over a copied tree (COPY --chown)",
    )
