"""Run docker/compose.yaml for real on a machine without Docker, with runc and buildah (see build_container.sh).

Each service is a container of its own, made by runc from the image that buildah holds, with what the file says: its
user, read-only root, no capabilities, no new privileges, tmpfs, volumes, its own network namespace on a common bridge,
its order by health. What an engine would add, and this does not: published ports (the bridge is cut off from this
machine), restarts, and names by DNS (they are in /etc/hosts).

    scripts/compose_with_runc.py compose FOLDER IMAGE [SERVICE=IMAGE ...]
    scripts/compose_with_runc.py alone FOLDER IMAGE [ARGUMENT ...]

FOLDER: a new one, for logs and volumes. IMAGE: of services that are built here; other services' images are given by
name. Prints the evaluation's stdout; exits with its code, or 1 when something else is not as it should be. `alone` runs
a container as strictly, without any network, and prints what it prints.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

import yaml

COMPOSE = Path(__file__).resolve().parents[1] / "docker" / "compose.yaml"
SUBNET = "10.203.77"
BRIDGE = "pe-compose0"
HEALTHY_WITHIN = 180.0  # seconds
RUN_WITHIN = 240.0  # seconds


def run(*command: object, check: bool = True, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=timeout)
    if check and ended.returncode != 0:
        raise SystemExit(f"error: {' '.join(map(str, command))}\n{ended.stdout}{ended.stderr}")
    return ended


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Network:
    """A bridge without a way out, with a network namespace for each service."""

    def __init__(self, names: list[str]):
        self.addresses = {name: f"{SUBNET}.{number}" for number, name in enumerate(names, start=10)}

    def __enter__(self) -> "Network":
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "link", "set", BRIDGE, "up")
        for number, (name, address) in enumerate(self.addresses.items()):
            space, here = f"pe-{name}", f"pe-veth{number}"
            run("ip", "netns", "add", space)
            run("ip", "link", "add", here, "type", "veth", "peer", "name", "eth0", "netns", space)
            run("ip", "link", "set", here, "master", BRIDGE, "up")
            run("ip", "-n", space, "address", "add", f"{address}/24", "dev", "eth0")
            run("ip", "-n", space, "link", "set", "eth0", "up")
            run("ip", "-n", space, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for number, name in enumerate(self.addresses):
            run("ip", "link", "delete", f"pe-veth{number}", check=False)  # and its other end
            run("ip", "netns", "delete", f"pe-{name}", check=False)
        run("ip", "link", "delete", BRIDGE, check=False)


class Container:
    """One service."""

    def __init__(self, name: str, service: dict[str, Any], image: str, folder: Path, hosts: Path | None):
        """hosts: the file of names of the network that it is in; None: it has only its loopback."""
        self.name, self.service, self.id = name, service, f"pe-{name}"
        self.bundle = folder / name
        self.bundle.mkdir(parents=True)
        self._working = run("buildah", "from", "--pull-never", image).stdout.strip()
        self._root = Path(run("buildah", "mount", self._working).stdout.strip())
        self.image = json.loads(run("buildah", "inspect", "--type", "image", image).stdout)["OCIv1"]["config"]
        self.out = self.bundle / "stdout"
        self.err = self.bundle / "stderr"
        self._process: subprocess.Popen[bytes] | None = None
        (self.bundle / "config.json").write_text(json.dumps(self._specification(folder, hosts), indent=1))

    def _specification(self, folder: Path, hosts: Path | None) -> dict[str, Any]:
        """What the file says, in the words of the OCI runtime specification."""
        mounts: list[dict[str, Any]] = [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "nodev", "mode=1777"]},
        ]
        network = {"type": "network"}
        if hosts is not None:
            mounts.append(_bind(hosts, "/etc/hosts", "ro"))
            network["path"] = f"/run/netns/{self.id}"
        for path in self.service.get("tmpfs", ()):
            mounts.append({"destination": path, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev"]})
        for volume in self.service.get("volumes", ()):
            source, inside, *mode = volume.split(":")
            mounts.append(_bind(self._volume(source, inside, folder), inside, *mode or ["rw"]))
        refuse_others(self.service)
        user, _, group = self.image["User"].partition(":")
        nothing = {kind: [] for kind in ("bounding", "effective", "permitted", "inheritable", "ambient")}
        return {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": int(user), "gid": int(group)},
                "args": self._arguments(),
                "env": list(self.image.get("Env", ())),
                "cwd": self.image.get("WorkingDir") or "/",
                "capabilities": nothing,
                "noNewPrivileges": True,
            },
            "root": {"path": str(self._root), "readonly": True},
            "hostname": self.name,
            "mounts": mounts,
            "linux": {
                "namespaces": [*({"type": kind} for kind in ("pid", "ipc", "uts", "mount")), network],
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            },
        }

    def _arguments(self) -> list[str]:
        entrypoint = self.service.get("entrypoint", self.image.get("Entrypoint") or [])
        return [word.replace("$$", "$") for word in [*entrypoint, *self.service.get("command", ())]]

    def _volume(self, source: str, inside: str, folder: Path) -> Path:
        """A file beside the compose file; or a folder, new ones with the owner that the image has at that place."""
        if source.startswith("."):
            return (COMPOSE.parent / source).resolve()
        path = folder / "volumes" / source
        if not path.exists():
            path.mkdir(parents=True)
            owner = (self._root / inside.lstrip("/")).stat()
            run("chown", f"{owner.st_uid}:{owner.st_gid}", path)
        return path

    def start(self) -> None:
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self._process = subprocess.Popen(
                ["runc", "run", "--bundle", str(self.bundle), self.id], stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as the service's user."""
        return run("runc", "exec", self.id, *command, check=False)

    def is_healthy(self) -> bool:
        kind, *test = self.service["healthcheck"]["test"]
        if self._process is not None and self._process.poll() is not None:
            raise SystemExit(f"error: {self.name} ended with {self._process.returncode}\n{self.last_words()}")
        return self.execute(*(["sh", "-c", *test] if kind == "CMD-SHELL" else test)).returncode == 0

    def until_healthy(self) -> None:
        deadline = time.monotonic() + HEALTHY_WITHIN
        while not self.is_healthy():
            if time.monotonic() > deadline:
                raise SystemExit(f"error: {self.name} did not become healthy\n{self.last_words()}")
            time.sleep(0.5)

    def wait(self, timeout: float) -> int:
        if self._process is None:
            raise SystemExit(f"error: {self.name} was not started")
        return self._process.wait(timeout)

    def last_words(self) -> str:
        return self.out.read_text(errors="replace")[-2000:] + self.err.read_text(errors="replace")[-2000:]

    def close(self) -> int | None:
        """End it as an engine does: TERM, then KILL. Returns its exit code, if it was started."""
        code = None
        if self._process is not None:
            if self._process.poll() is None:
                run("runc", "kill", self.id, "TERM", check=False)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
            run("runc", "delete", "--force", self.id, check=False)
            code = self._process.wait(20)
        run("buildah", "rm", self._working, check=False)
        return code


def refuse_others(service: dict[str, Any]) -> None:
    """The bundle above is right for exactly this; a service that says otherwise must not be run as if it did."""
    if service.get("cap_drop") != ["ALL"] or service.get("security_opt") != ["no-new-privileges:true"]:
        raise SystemExit("error: expected services with cap_drop: [ALL] and security_opt: [no-new-privileges:true]")
    if service.get("read_only") is not True:
        raise SystemExit("error: expected services with read_only: true")


def _bind(source: Path, inside: str, *mode: str) -> dict[str, Any]:
    return {"destination": inside, "type": "bind", "source": str(source), "options": ["bind", *mode]}


def in_waves(services: dict[str, Any]) -> list[list[str]]:
    """Services that may start together, each after those it depends on."""
    waves: list[list[str]] = []
    while len(done := [name for wave in waves for name in wave]) < len(services):
        ready = [
            name
            for name, service in services.items()
            if name not in done and all(other in done for other in service.get("depends_on", ()))
        ]
        if not ready:
            raise SystemExit("error: services depend on each other in a circle")
        waves.append(ready)
    return waves


def compose(folder: Path, image: str, *others: str) -> int:
    services: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    images = dict.fromkeys(services, image) | dict(other.split("=", 1) for other in others)
    folder.mkdir(parents=True)
    hosts = folder / "hosts"
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network(list(services)))
        lines = [f"{address} {name}\n" for name, address in network.addresses.items()]
        hosts.write_text("127.0.0.1 localhost\n" + "".join(lines))
        running: dict[str, Container] = {}
        for wave in in_waves(services):
            for name in wave:
                container = running[name] = Container(name, services[name], images[name], folder, hosts)
                stack.callback(lambda each=container: note(f"{each.name}: ended with {each.close()}"))
                container.start()
            for name in wave:
                if "healthcheck" in services[name]:
                    running[name].until_healthy()
                    user = running[name].execute("id", "-u").stdout.strip()
                    note(f"{name}: healthy after {time.monotonic() - began:.1f} s, user {user}")
        code = running["evaluation"].wait(RUN_WITHIN)
        sys.stdout.write(running["evaluation"].out.read_text())
        sys.stdout.flush()
        note(f"evaluation: ended with {code}")
        return code or seen_by_prometheus(running["exporter"])


def alone(folder: Path, image: str, *arguments: str) -> int:
    service = {"command": list(arguments), "tmpfs": ["/tmp"], "volumes": ["data:/data"], "read_only": True}
    service |= {"cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}
    folder.mkdir(parents=True)
    container = Container("alone", service, image, folder, None)
    try:
        container.start()
        code = container.wait(RUN_WITHIN)
    finally:
        container.close()
    sys.stderr.write(container.err.read_text(errors="replace"))
    sys.stdout.write(container.out.read_text(errors="replace"))
    return code


def seen_by_prometheus(inside: Container) -> int:
    """Whether Prometheus has heard from the exporter that the swarm is healthy; asked in the exporter's container."""
    found = ""
    for query in ('up{job="petals-eval"}', 'petals_model_verdict{model="demo",verdict="healthy"}'):
        url = "http://prometheus:9090/api/v1/query?query=" + urllib.parse.quote(query)
        script = f"import urllib.request; print(urllib.request.urlopen({url!r}, timeout=5).read().decode())"
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            found = inside.execute("python3", "-c", script).stdout
            result = json.loads(found)["data"]["result"] if found.startswith("{") else []
            if result and result[0]["value"][1] != "0":
                note(f"Prometheus: {query} = {json.dumps(result)}")
                break
            time.sleep(2)
        else:
            note(f"error: Prometheus has no {query}: {found}")
            return 1
    return 0


if __name__ == "__main__":
    commands = {"compose": compose, "alone": alone}
    if len(sys.argv) < 4 or sys.argv[1] not in commands:
        raise SystemExit(__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # containers and network end with it
    sys.exit(commands[sys.argv[1]](Path(sys.argv[2]).resolve(), *sys.argv[3:]))
