"""The container files, as far as they can be checked without an engine."""

import fnmatch
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"

pytestmark = pytest.mark.skipif(not (DOCKER / "Dockerfile").is_file(), reason="needs the checkout")


@dataclass
class Stage:
    """A stage of a Dockerfile; its instructions as (name, arguments)."""

    base: str
    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [arguments for name, arguments in self.instructions if name == instruction]


def stages() -> dict[str, Stage]:
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    found: dict[str, Stage] = {}
    current = Stage("", "")
    for line in text.replace("\\\n", " ").splitlines():
        name, _, arguments = line.strip().partition(" ")
        if name == "FROM":
            matched = re.fullmatch(r"(\S+) AS (\w+)", arguments)
            assert matched, f"a stage without a name: {line}"
            current = found[matched.group(2)] = Stage(matched.group(1), matched.group(2))
        elif name:
            assert name.isupper(), f"no instruction: {line}"
            current.instructions.append((name, " ".join(arguments.split())))
    return found


def lineage(name: str) -> list[Stage]:
    """A stage and those it is built on, the first of them first."""
    known = stages()
    line: list[Stage] = []
    while name in known:
        line.insert(0, known[name])
        name = known[name].base
    return line


def inherited(name: str, instruction: str) -> str:
    """The last such instruction of a stage and those it is built on."""
    return [arguments for stage in lineage(name) for arguments in stage.all(instruction)][-1]


def commands() -> set[str]:
    from voxelsigma.hosts.cli import app

    group: Any = typer.main.get_command(app)
    return set(group.commands)


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    return loaded


def test_stages() -> None:
    assert list(stages()) == ["wheel", "server", "worker", "gadgetron"]
    assert stages()["gadgetron"].base == "${GADGETRON_IMAGE}"


@pytest.mark.parametrize("target", ["server", "worker", "gadgetron"])
def test_user_is_not_root(target: str) -> None:
    assert inherited(target, "USER") not in ("0", "root")


@pytest.mark.parametrize(("target", "port"), [("server", "9002"), ("worker", "18000"), ("gadgetron", "9002")])
def test_health_is_checked_where_it_listens(target: str, port: str) -> None:
    check = inherited(target, "HEALTHCHECK")
    assert port in check
    assert port in inherited(target, "EXPOSE")
    assert port in inherited(target, "CMD")
    assert "--timeout=" in check


@pytest.mark.parametrize("target", ["server", "worker"])
def test_commands_exist(target: str) -> None:
    health = json.loads(inherited(target, "HEALTHCHECK").partition("CMD ")[2])
    command = json.loads(inherited(target, "CMD"))
    assert json.loads(inherited(target, "ENTRYPOINT")) == ["voxelsigma"] == health[:1]
    assert {health[1], command[0]} <= commands()


def test_nothing_unpinned_and_nothing_piped_into_a_shell() -> None:
    for path in DOCKER.iterdir():
        text = path.read_text(encoding="utf-8")
        assert ":latest" not in text, path
        assert not re.search(r"\b(curl|wget)\b", text), path
        assert "ADD http" not in text, path
        # which index to use is the site's choice
        assert "index-url http" not in text, path
    python = re.search(r"^ARG PYTHON_IMAGE=(\S+)$", (DOCKER / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert python
    assert re.fullmatch(r"python:3\.1\d-slim-\w+", python.group(1))


def test_every_installation_is_constrained() -> None:
    script = (DOCKER / "install.sh").read_text(encoding="utf-8")
    lines = [line for line in script.replace("\\\n", " ").splitlines() if "pip install" in line]
    assert len(lines) == 2
    assert all("--constraint" in line or "torch==$torch+$TORCH_BUILD" in line for line in lines)
    builds = stages()["wheel"].all("RUN")
    assert all("--constraint" in line for line in builds if "pip install" in line)


def test_sources_of_copies_exist() -> None:
    for stage in stages().values():
        for arguments in stage.all("COPY"):
            assert "--from" not in arguments
            for source in arguments.split()[:-1]:
                assert (ROOT / source).exists(), source
    for source in re.findall(r"docker/\w+\.sh", " ".join(stages()["wheel"].all("RUN"))):
        path = ROOT / source
        assert path.is_file()
        assert path.stat().st_mode & 0o111, f"{path} cannot be executed"


def test_build_context_holds_what_the_wheel_needs() -> None:
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"
    }
    rooms = {path.name for path in (ROOT / "src" / "voxelsigma").iterdir() if path.is_symlink()}
    assert rooms <= allowed
    assert {"pyproject.toml", "README.md", "LICENSE", "constraints.txt", "src", "docker"} <= allowed
    assert all((ROOT / name).exists() for name in allowed)
    assert not any(fnmatch.fnmatch(".git", name) for name in allowed)


def test_our_python_is_first_on_the_servers_path() -> None:
    stage = stages()["gadgetron"]
    entry = json.loads(inherited("gadgetron", "ENTRYPOINT"))
    assert entry[-1] == "/opt/voxelsigma/entrypoint.sh"
    script = (DOCKER / "entrypoint.sh").read_text(encoding="utf-8").splitlines()
    activated = script.index("conda activate gadgetron")
    first = script.index('export PATH="/opt/voxelsigma/bin:$PATH"')
    started = script.index('exec "$program" "$@"')
    assert activated < first < started
    # the build itself proves it, or fails
    assert any("entrypoint.sh voxelsigma doctor --gadgetron" in run for run in stage.all("RUN"))


def test_compose_services() -> None:
    services = compose()["services"]
    assert set(services) == {"gadgetron", "worker", "server"}
    for name, service in services.items():
        build = service["build"]
        assert build["target"] == name
        assert (DOCKER / build["context"] / build["dockerfile"]).is_file()
        arguments = {line.partition("=")[0] for stage in lineage(name) for line in stage.all("ARG")}
        assert set(build["args"]) <= arguments
        assert "privileged" not in service
        for port in service.get("ports", ()):
            assert port.startswith("${LISTEN:-127.0.0.1}:")
    for name in ("worker", "server"):
        assert services[name]["command"][0] in commands()
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]


def test_compose_worker_is_gadgetrons_localhost() -> None:
    services = compose()["services"]
    worker = services["worker"]
    assert worker["network_mode"] == "service:gadgetron"
    assert worker["command"] == ["worker", "--host", "127.0.0.1", "--port", "18000"]
    gadgetron = json.loads(inherited("gadgetron", "CMD"))
    storage = gadgetron[gadgetron.index("--storage_port") + 1]
    assert worker["environment"]["GADGETRON_STORAGE_ADDRESS"] == f"http://localhost:{storage}"
    (volume,) = services["gadgetron"]["volumes"]
    name, folder = volume.split(":")
    assert name in compose()["volumes"]
    assert [folder] == json.loads(inherited("gadgetron", "VOLUME"))


def test_version_of_the_images() -> None:
    import voxelsigma

    for service in compose()["services"].values():
        assert service["image"].endswith(f":{voxelsigma.__version__}")
