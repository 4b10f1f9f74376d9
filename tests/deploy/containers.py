"""Runs the containers of a rendered pod on a Docker Engine, as a kubelet would: constraints, probes, preStop."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.processes import execute, inferctl

Container = Mapping[str, Any]
Pod = Mapping[str, Any]
_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of sched.h


class Network:
    """The network of a pod: a loopback interface that its containers share, as those of a pod do."""

    @property
    def option(self) -> str:
        """Value of `docker run --network`."""
        return f"container:{self.name}"

    def __init__(self, image: str) -> None:
        self.name = f"inferctl-test-{uuid.uuid4().hex[:12]}"
        docker("run", "--detach", "--name", self.name, "--network", "none", image, "sleep", "infinity")
        self._file = f"/proc/{docker('inspect', '--format', '{{.State.Pid}}', self.name).strip()}/ns/net"

    def enter(self) -> None:
        """Move this thread into the network. Requires root."""
        with open(self._file) as file:  # noqa: PTH123  # a path would follow the link
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _NEW_NETWORK):
                raise OSError(ctypes.get_errno(), "setns failed")

    def run(self, function: Callable[[], Any]) -> Any:
        """Return the result of `function`, which runs in a thread inside the network."""
        found: list[Any] = []

        def inside() -> None:
            self.enter()
            found.append(function())

        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        assert found, "the call in the network of the pod failed"
        return found[0]

    def remove(self) -> None:
        subprocess.run(["docker", "rm", "--force", self.name], capture_output=True, check=False)


class RunningContainer:
    """One container of a pod. `signaled`: when it got SIGTERM."""

    def __init__(self, name: str, container: Container, pod: Pod, network: Network) -> None:
        self.name, self.container, self.pod, self.network = name, container, pod, network
        self.signaled = 0.0

    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container.get("ports", ())}

    def url(self, port: str = "http") -> str:
        return f"http://127.0.0.1:{self.ports()[port]}"

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(docker("inspect", "--format", "{{json .State}}", self.name))
        return found

    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(docker("inspect", self.name))[0]
        return found

    def logs(self) -> str:
        done = execute("docker", "logs", self.name, code=0)
        return done.stdout + done.stderr

    def probe(self, kind: str) -> bool:
        """Send one probe of the container and return whether it succeeds."""
        probe = self.container[kind]
        url = self.url(probe["httpGet"]["port"]) + probe["httpGet"]["path"]

        def send() -> bool:
            try:
                with urllib.request.urlopen(url, timeout=probe["timeoutSeconds"]) as response:
                    return bool(200 <= response.status < 400)
            except (urllib.error.URLError, OSError):
                return False

        return bool(self.network.run(send))

    def wait_started(self) -> float:
        """Wait as long as the startup probe allows, and return the seconds that it took."""
        probe = self.container["startupProbe"]
        started, allowed = time.monotonic(), probe["periodSeconds"] * probe["failureThreshold"]
        while not self.probe("startupProbe"):
            assert time.monotonic() - started < allowed, f"not ready after {allowed} s:\n{self.logs()}"
            assert self.state()["Running"], self.logs()
            time.sleep(0.2)
        return time.monotonic() - started

    def pre_stop(self) -> None:
        """Run the preStop hook of the container."""
        time.sleep(self.container["lifecycle"]["preStop"]["sleep"]["seconds"])

    def terminate(self) -> float:
        """End the container as a kubelet does: preStop, SIGTERM, SIGKILL after the grace period. Returns seconds."""
        started, grace = time.monotonic(), self.pod["terminationGracePeriodSeconds"]
        self.pre_stop()
        self.signaled = time.monotonic()
        rest = grace - (time.monotonic() - started)
        assert rest > 0, "preStop took the whole grace period"
        docker("stop", "--time", str(int(rest)), self.name)
        return time.monotonic() - started

    def remove(self) -> None:
        subprocess.run(["docker", "rm", "--force", "--volumes", self.name], capture_output=True, check=False)


def docker(*arguments: str) -> str:
    done = execute("docker", *arguments, code=0)
    return done.stdout


def start(
    network: Network,
    pod: Pod,
    container: Container,
    volumes: Mapping[str, Path],
    secrets: Mapping[str, str] | None = None,
    extra: tuple[str, ...] = (),
) -> RunningContainer:
    """Start `container` of `pod` in `network`. The GPU is left out.

    `volumes`: folder of each volume of the pod. `secrets`: values of the keys of Secrets, as `NAME/KEY`. `extra`:
    further options of `docker run`.
    """
    name = f"inferctl-test-{uuid.uuid4().hex[:12]}"
    context = {**pod["securityContext"], **container["securityContext"]}
    assert context["runAsNonRoot"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["readOnlyRootFilesystem"] is True
    limits = container["resources"]["limits"]
    cores = min(_cores(limits["cpu"]), float(len(os.sched_getaffinity(0))))
    memory = str(_bytes(limits["memory"]))
    command = ["run", "--detach", "--name", name, "--network", network.option, "--read-only"]
    command += ["--user", f"{context['runAsUser']}:{context['runAsGroup']}", "--group-add", str(context["fsGroup"])]
    command += [f"--cap-drop={each}" for each in context["capabilities"]["drop"]]
    command += ["--security-opt", "no-new-privileges", "--cpus", f"{cores:g}"]
    command += ["--memory", memory, "--memory-swap", memory]
    for each in container.get("env", ()):
        value = each.get("value")
        if value is None:
            reference = each["valueFrom"]["secretKeyRef"]
            value = (secrets or {})[f"{reference['name']}/{reference['key']}"]
        command += ["--env", f"{each['name']}={value}"]
    mounted = {volume["name"]: volume for volume in pod["volumes"]}
    for mount in container.get("volumeMounts", ()):
        volume = mounted[mount["name"]]
        directory = volume.get("emptyDir", {})
        if directory.get("medium") == "Memory":
            size = _bytes(directory["sizeLimit"])
            command += ["--tmpfs", f"{mount['mountPath']}:size={size},mode=1777"]
        else:
            mode = ":ro" if mount.get("readOnly") or "image" in volume else ""
            # The subPath of an image volume is left out, because containerd before 2.2 ignores it.
            command += ["--volume", f"{volumes[mount['name']]}:{mount['mountPath']}{mode}"]
    arguments = [*container.get("command", ())[1:], *container.get("args", ())]
    if "command" in container:
        command += ["--entrypoint", container["command"][0]]
    docker(*command, *extra, container["image"], *arguments)
    return RunningContainer(name, container, pod, network)


def folders(pod: Pod, root: Path) -> dict[str, Path]:
    """Return a folder for each empty volume of `pod`, with the group and the mode that a kubelet gives it."""
    found = {}
    for volume in pod["volumes"]:
        if "emptyDir" in volume:
            folder = root / volume["name"]
            folder.mkdir(parents=True)
            os.chown(folder, 0, pod["securityContext"]["fsGroup"])
            folder.chmod(0o2777)
            found[volume["name"]] = folder
    return found


def image_volumes(pod: Pod, root: Path) -> dict[str, Path]:
    """Return the root file system of the image of each image volume of `pod`, with its owners and modes."""
    found = {}
    for volume in pod["volumes"]:
        if "image" in volume:
            reference, folder = volume["image"]["reference"], root / volume["name"]
            container = docker("create", reference, "none").strip()  # the image has no command; this one does not run
            folder.mkdir(parents=True)
            docker("cp", "--archive", f"{container}:/.", str(folder))
            docker("rm", "--volumes", container)
            docker("image", "rm", reference)
            found[volume["name"]] = folder
    return found


def assert_constrained(running: RunningContainer) -> None:
    """Check what the engine applies, and that the container cannot write to its root file system."""
    settings = running.settings()
    host = settings["HostConfig"]
    assert settings["Config"]["User"] == "10001:10001"
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    assert "no-new-privileges" in host["SecurityOpt"]
    assert host["Memory"] == host["MemorySwap"] > 0
    assert host["NanoCpus"] > 0
    status = docker("exec", running.name, "cat", "/proc/1/status")
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff"))
    assert int(effective, 16) == 0
    done = subprocess.run(["docker", "exec", running.name, "touch", "/file"], capture_output=True, check=False)
    assert done.returncode != 0


def secret_with_key(folder: Path) -> str:
    """Write a key file into the folder of a Secret, with the mode that a kubelet gives it, and return its key."""
    file = folder / "keys.json"
    done = inferctl("keys", "create", "team-a", "--file", file, code=0)
    folder.chmod(0o755)
    os.chown(file, 0, 10001)
    file.chmod(0o440)
    return done.stdout.strip()


def _cores(text: str) -> float:
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def _bytes(text: str) -> int:
    return int(float(text[:-2]) * _UNITS[text[-2:]]) if text[-2:] in _UNITS else int(text)
