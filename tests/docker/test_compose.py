"""The compose file: its shape, and that the real command takes what each service is told."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from petals_eval.cli.address_flags import own_address
from petals_eval.cli.app import UsageError, app
from petals_eval.cli.flags import keys_of
from petals_eval.config import RunSettings
from petals_eval.demo import demo_paths
from petals_eval.health.serving import address_of
from petals_eval.local_swarm import LocalSwarm
from tests.docker.compose_schema import Compose, Service

DOCKER = Path(__file__).resolve().parents[2] / "docker"
TEXT = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
COMPOSE = Compose.model_validate(yaml.safe_load(TEXT))
OURS = {name: service for name, service in COMPOSE.services.items() if service.build is not None}
SERVERS = [name for name in OURS if name.startswith("server-")]
PEER = "/dns4/bootstrap/tcp/31330/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"
DEMO = "/opt/petals-eval/demo"


def run_in_a_container(service: Service, folder: Path, *, peers: str = PEER) -> list[str]:
    """The arguments that `petals-eval` gets: the entrypoint is run, with a stand-in for it that prints them."""
    folder.mkdir(exist_ok=True)
    (folder / "peers").write_text(f"{peers}\n")
    stand_in = folder / "petals-eval"
    stand_in.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    stand_in.chmod(0o755)
    words = [word.replace("$$", "$") for word in (*(service.entrypoint or ["petals-eval"]), *service.command)]
    words = [word.replace("/swarm/peers)", f"{folder}/peers)") for word in words]
    environment = {"PATH": f"{folder}:/usr/bin:/bin"}
    ended = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60, env=environment)
    return json.loads(ended.stdout)


def parsed(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The command's name and its parameters, as the real command line reads them; raises what it raises."""
    group = typer.main.get_command(app)
    name, *rest = arguments
    context = group.make_context("petals-eval", [name, *rest], resilient_parsing=False)
    command = group.get_command(context, name)  # type: ignore[attr-defined]
    assert command is not None, f"there is no command {name}"
    return name, command.make_context(name, rest, parent=context).params


def test_only_fragments_stand_beside_what_the_schema_names() -> None:
    assert [
        name for name in yaml.safe_load(TEXT) if name not in Compose.model_fields and not name.startswith("x-")
    ] == []
    with pytest.raises(ValueError, match="privileged"):
        Service.model_validate({**yaml.safe_load(TEXT)["services"]["exporter"], "privileged": True})


def test_the_services_are_those_of_a_small_swarm() -> None:
    assert set(COMPOSE.services) == {"bootstrap", *SERVERS, "exporter", "prometheus", "evaluation"}
    assert len(SERVERS) == 3
    assert {service.image for service in OURS.values()} == {"petals-eval"}
    assert {name for name, service in COMPOSE.services.items() if service.healthcheck is None} == {"evaluation"}
    for service in OURS.values():
        assert service.build is not None
        assert (DOCKER / service.build.context / service.build.dockerfile).resolve() == DOCKER / "Dockerfile"
        assert service.tmpfs == ["/tmp"]


def test_what_they_depend_on_is_there_and_shows_its_health() -> None:
    for service in COMPOSE.services.values():
        for name, dependency in service.depends_on.items():
            assert dependency.condition == "service_healthy"
            assert COMPOSE.services[name].healthcheck is not None
    assert set(COMPOSE.services["evaluation"].depends_on) == {"bootstrap", *SERVERS}


def test_volumes_are_declared_and_files_are_there() -> None:
    used = [volume.split(":")[0] for service in COMPOSE.services.values() for volume in service.volumes]
    assert {name for name in used if not name.startswith(".")} == set(COMPOSE.volumes)
    assert all((DOCKER / name).is_file() for name in used if name.startswith("."))
    # Keys stay with whoever they belong to; only the bootstrap node writes the address.
    data = [volume for service in OURS.values() for volume in service.volumes if volume.split(":")[1] == "/data"]
    assert len(data) == len(set(data)) == len(OURS)
    writers = [name for name, service in OURS.items() if "swarm:/swarm" in service.volumes]
    assert writers == ["bootstrap"]


@pytest.mark.parametrize("name", OURS)
def test_the_command_takes_what_a_service_is_told(name: str, tmp_path: Path) -> None:
    arguments = run_in_a_container(OURS[name], tmp_path)
    command, parameters = parsed(arguments)
    if name == "bootstrap":
        assert command == "bootstrap" and not parameters["initial_peers"]
        assert str(parameters["peers_file"]) == "/swarm/peers"
    else:
        assert parameters["initial_peers"] == [PEER]
    with pytest.raises(UsageError, match="No such option"):
        parsed([*arguments, "--no-such-flag"])


def test_the_nodes_are_where_they_say() -> None:
    for name in ("bootstrap", *SERVERS):
        _, given = parsed([*OURS[name].command])
        own_address(given["listen"], given["announce"], None)
        ip, port = given["listen"].rsplit("/", 1)
        assert (ip, given["announce"]) == ("/ip4/0.0.0.0/tcp", f"/dns4/{name}/tcp/{port}")
        assert str(given["identity"]).startswith("/data/")
        healthcheck = OURS[name].healthcheck
        assert healthcheck is not None
        test = shlex.join(healthcheck.test)
        assert str(given["peers_file"]) in test
        assert name in SERVERS or port in test


def test_the_servers_hold_the_whole_model_that_is_evaluated(tmp_path: Path) -> None:
    told = [parsed(OURS[name].command)[1] for name in SERVERS]
    spans = [tuple(map(int, span.split(":"))) for each in told for span in each["span"]]
    planned = LocalSwarm(demo_paths().model, spans=spans)
    assert sorted(block for first, last in spans for block in range(first, last)) == list(range(planned.num_blocks))

    _, given = parsed(run_in_a_container(OURS["evaluation"], tmp_path))
    keys = keys_of(RunSettings)
    fields = {keys[name]: value for name, value in given.items() if name in keys and value}
    assert fields.pop("json") is True
    settings = RunSettings(**fields)
    assert {each["model"] for each in told} == {settings.model} == {f"{DEMO}/model"}
    assert {each["dht_prefix"] for each in told} == {settings.dht_prefix}
    assert settings.adapter == (f"{DEMO}/prompts",)
    assert all((demo_paths().model.parent / Path(path).name).exists() for path in (*settings.adapter, settings.task))


def test_prometheus_scrapes_the_exporter() -> None:
    told = COMPOSE.services["prometheus"]
    assert ":" in told.image and not told.image.endswith(":latest")
    [mounted] = [volume for volume in told.volumes if volume.startswith("./prometheus.yaml:")]
    assert f"--config.file={mounted.split(':')[1]}" in told.command
    scrape = yaml.safe_load((DOCKER / "prometheus.yaml").read_text(encoding="utf-8"))
    [job] = scrape["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    assert host == "exporter"
    _, given = parsed(COMPOSE.services[host].command)
    assert address_of(given["serve"]) == ("0.0.0.0", int(port))
    assert job.get("metrics_path", "/metrics") == "/metrics"
    healthcheck = COMPOSE.services[host].healthcheck
    assert healthcheck is not None and f"http://127.0.0.1:{port}/healthz" in healthcheck.test[-1]


def test_no_port_is_taken_twice_and_no_secret_is_written_down() -> None:
    ports = [port.split(":")[1] for service in COMPOSE.services.values() for port in service.ports]
    assert len(ports) == len(set(ports)) == 2
    assert not any(word in TEXT.lower() for word in ("token", "secret", "password", "privatekey", "begin "))
