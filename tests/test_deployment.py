"""The Dockerfile and docker-compose.yml fit the code, though no image is built here."""

import importlib.metadata
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from packaging.requirements import Requirement

from hashtab.serving.bse.__main__ import serve_parser as bse_parser
from hashtab.serving.http import server_settings
from hashtab.serving.http.command_line import TOKEN_VARIABLE
from hashtab.serving.scorer.__main__ import serve_parser as scorer_parser
from tests.serving.store.servers import redis_server

ROOT = Path(__file__).resolve().parent.parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
PARSERS: dict[str, Callable[..., Any]] = {"bse": bse_parser, "scorer": scorer_parser}


@cache
def instructions() -> list[tuple[str, str]]:
    """Return name and arguments of each instruction of the Dockerfile."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def arguments(instruction: str) -> list[str]:
    return [rest for name, rest in instructions() if name == instruction]


def test_services_are_those_of_the_online_path() -> None:
    assert set(SERVICES) == {"redis", "bse", "scorer", "mlflow"}


def test_every_port_is_open_to_this_machine_alone() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(published) == 3
    assert all(port.startswith("127.0.0.1:") for port in published)


@pytest.mark.parametrize("name", PARSERS)
def test_services_take_their_command_lines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service = SERVICES[name]
    assert service["command"][:3] == ["python", "-m", f"hashtab.serving.{name}"]
    options = PARSERS[name]().parse_args(service["command"][3:])
    assert TOKEN_VARIABLE in service["environment"]
    monkeypatch.setenv(TOKEN_VARIABLE, "a-token")
    settings = server_settings(options)
    assert settings.host == "0.0.0.0"
    assert service["ports"] == [f"127.0.0.1:{settings.port}:{settings.port}"]
    assert service["environment"]["HASHTAB_PORT"] == str(settings.port)
    assert float(service["stop_grace_period"].removesuffix("s")) > settings.drain_s
    assert options.store == "redis://redis:6379/0"


def test_services_do_not_start_without_a_token() -> None:
    for name in PARSERS:
        said = SERVICES[name]["environment"][TOKEN_VARIABLE]
        assert said.startswith(f"${{{TOKEN_VARIABLE}:?")


def test_mlflow_takes_its_command_line() -> None:
    program, command, *options = SERVICES["mlflow"]["command"]
    assert program == "mlflow"
    code = (  # in a process of its own: some of MLflow's imports warn
        "from mlflow.cli import cli\n"
        f"found = cli.commands[{command!r}].make_context({command!r}, {options!r})\n"
        "print(found.params['port'], found.params['allowed_hosts'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("5000 mlflow:5000,")


def test_redis_takes_its_command_line_and_loses_nothing(tmp_path: Path) -> None:
    with (
        redis_server(tmp_path, *SERVICES["redis"]["command"][1:]) as socket,
        redis.Redis(unix_socket_path=str(socket), decode_responses=True) as client,
    ):
        kept = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
        assert {name: client.config_get(name)[name] for name in kept} == kept
    assert SERVICES["redis"]["volumes"] == ["redis:/data"]


def test_what_is_named_exists() -> None:
    stages = {rest.split(" AS ")[1] for rest in arguments("FROM")}
    for service in SERVICES.values():
        assert service.get("build", {"target": "base"})["target"] in stages
        for dependency in service.get("depends_on", {}):
            assert "healthcheck" in SERVICES[dependency]
        for volume in service.get("volumes", []):
            source = volume.partition(":/")[0]
            assert source in COMPOSE["volumes"] or source.startswith("${HASHTAB_BUNDLE:?")


def test_images_are_made_of_files_that_are_there_and_sent() -> None:
    sent = (ROOT / ".dockerignore").read_text().split()
    copied = [rest.split()[:-1] for rest in arguments("COPY") if not rest.startswith("--from")]
    for source in {name for names in copied for name in names}:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in sent, source


def test_images_run_as_a_user_without_rights() -> None:
    by_stage = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    for stage in by_stage[1:]:
        if "\nCMD " in stage:
            assert "\nUSER hashtab\n" in stage


def test_health_of_the_image_is_that_of_its_service() -> None:
    (health,) = arguments("HEALTHCHECK")
    program = yaml.safe_load(health.partition("CMD ")[2])
    code = program[2].replace("import os, urllib.request as r", "")
    assert compile(program[2], "healthcheck", "exec")
    assert "/health/ready" in code
    assert "HASHTAB_PORT" in code
    assert "HASHTAB_PORT=8000" in arguments("ENV")


def group(name: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return [Requirement(text) for text in project["dependency-groups"][name]]


def test_groups_of_the_images_exist_with_the_bounds_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    bounds = {r.name: r.specifier for r in map(Requirement, [*project["dependencies"], *extras])}
    installed = " ".join(arguments("RUN"))
    for name in re.findall(r"pyproject\.toml:(\w+)", installed):
        for requirement in group(name):
            assert requirement.specifier == bounds[requirement.name], requirement


def closure(names: list[str]) -> set[str]:
    """Return distributions with all that they need, as they are installed here."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        found.add(name)
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                left.append(needed.name)
    return found


def test_online_path_imports_nothing_that_its_image_lacks() -> None:
    kept = closure([requirement.name for requirement in group("online")])
    modules = importlib.metadata.packages_distributions()
    absent = [
        module
        for module, distributions in modules.items()
        if module not in ("hashtab", "__editable___hashtab")
        and not any(re.sub(r"[-_.]+", "-", d).lower() in kept for d in distributions)
    ]
    code = (
        "import sys\n"
        f"for name in {absent!r}: sys.modules[name] = None\n"
        "import hashtab.serving.bse.__main__, hashtab.serving.scorer.__main__\n"
        "import hashtab.serving.bse.service, hashtab.serving.bse.stream\n"
        "import hashtab.serving.scorer.service, hashtab.serving.retrieval\n"
        "import hashtab.serving.store.lmdb_store, hashtab.serving.store.redis_store\n"
        "import uvloop, httptools, faiss\n"
    )
    assert "torch" in absent
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_comments_say_commands_that_exist() -> None:
    head = (ROOT / "docker-compose.yml").read_text().partition("\nname:")[0]
    commands = [shlex.split(line[1:]) for line in head.splitlines() if "docker" in line]
    assert ["docker", "compose", "up", "--build", "--wait"] in commands
