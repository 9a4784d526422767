"""docker-compose.yml, the Dockerfile and .env.example: valid, pinned, without secrets, with commands that exist."""

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.composed import COMPOSE, ROOT, fill_in, list_commands, read_services

TEXT = COMPOSE.read_text(encoding="utf-8")
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")

TAG = re.compile(r"[\w./-]+:\d+\.\d+[\w.-]*")
SECRET = re.compile(r"SECRET|PASSWORD|KEY|TOKEN")


def read_example() -> dict[str, str]:
    lines = [line for line in EXAMPLE.splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def fill_example() -> dict[str, str]:
    """What a user has after following the comments of the file."""
    return {name: value or "secret" for name, value in read_example().items()}


def run_tool(name: str, *options: str) -> None:
    command = [str(Path(sys.executable).parent / name), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_file_follows_the_compose_schema() -> None:
    run_tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE.name)


def test_the_schema_finds_what_is_wrong(tmp_path: Path) -> None:
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text(TEXT.replace("healthcheck:", "healthchek:", 1))
    with pytest.raises(AssertionError, match="healthchek"):
        run_tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(wrong))


def test_the_dockerfile_has_no_findings() -> None:
    run_tool("hadolint", "--failure-threshold", "style", "Dockerfile")


def test_every_image_has_an_exact_tag() -> None:
    images = {service["image"] for service in SERVICES.values()}
    images |= {line.split()[1] for line in DOCKERFILE.splitlines() if line.startswith("FROM ")}
    assert [image for image in images if not TAG.fullmatch(image)] == []
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"memory3:{version}" in images


def test_the_object_store_enforces_conditional_writes() -> None:
    [image] = {service["image"] for service in SERVICES.values() if "seaweedfs" in service["image"]}
    major, minor = image.rpartition(":")[2].split(".")
    assert (int(major), int(minor)) >= (4, 44)


def test_what_the_file_asks_for_is_in_the_example_and_no_secret_stands_anywhere() -> None:
    asked = set(re.findall(r"\$\{(\w+)", TEXT))
    assert asked == set(read_example())
    assert [
        name for name, value in read_example().items() if SECRET.search(name) and value not in ("", "memory3")
    ] == []
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if SECRET.search(variable):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), (name, variable)
    with pytest.raises(KeyError, match="POSTGRES_PASSWORD .*set"):
        fill_in(SERVICES["postgres"], {})


def test_who_has_no_health_check_runs_once_and_says_so() -> None:
    comments = {
        name: re.search(rf"((?:  #.*\n)*)  {name}:\n", TEXT)[1]  # type: ignore[index]
        for name in SERVICES
    }
    for name, service in SERVICES.items():
        if "healthcheck" not in service:
            assert "it has no health check" in comments[name], name
            assert service["restart"] in ("no", "on-failure:5")
        else:
            assert service["restart"] == "unless-stopped"


def test_services_wait_for_what_they_need() -> None:
    for name, service in SERVICES.items():
        for needed, condition in service.get("depends_on", {}).items():
            wanted = "service_healthy" if "healthcheck" in SERVICES[needed] else "service_completed_successfully"
            assert condition == {"condition": wanted}, (name, needed)


def test_published_ports_are_of_this_machine_alone() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_volumes_of_the_file_are_those_of_its_services() -> None:
    named = {name for one in read_services(fill_example()).values() for name in one.volumes.values() if "/" not in name}
    assert named == set(yaml.safe_load(TEXT)["volumes"])
    owned = re.search(r"mkdir -p ([^\\\n]*)", DOCKERFILE[DOCKERFILE.rindex("FROM ") :])
    assert owned
    for service in read_services(fill_example()).values():
        if SERVICES[service.name]["image"].startswith("memory3:"):
            assert set(service.volumes) <= set(owned[1].split()), "a volume takes its owner from the image"


def list_all_commands() -> list[list[str]]:
    return [command for service in read_services(fill_example()).values() for command in list_commands(service)]


def parse_with_click(group: Any, words: list[str]) -> None:
    """Parses a command line as click or typer does, down to the last command, and runs nothing."""
    context = group.make_context(words[0], words[1:])
    if hasattr(group, "resolve_command"):
        name, command, left = group.resolve_command(context, [*context._protected_args, *context.args])
        parse_with_click(command, [name, *left])


def test_every_command_line_is_understood_by_its_tool() -> None:
    from distributed.cli import dask_scheduler, dask_worker
    from prefect.cli._app import _app as prefect_cli
    from typer.main import get_command

    from flows.cli import app as memory3_cli

    found = set()
    for words in list_all_commands():
        found.add(words[0])
        if words[0] == "prefect":
            function, bound, _ = prefect_cli.parse_args(words[1:], print_error=False, exit_on_error=False)
            inspect.signature(function).bind(*bound.args, **bound.kwargs)
        elif words[0] == "dask":
            parse_with_click({"scheduler": dask_scheduler.main, "worker": dask_worker.main}[words[1]], words[1:])
        else:
            parse_with_click(get_command(memory3_cli), words)
    assert found == {"memory3", "prefect", "dask"}
    with pytest.raises(Exception, match="--bnk"):
        parse_with_click(get_command(memory3_cli), ["memory3", "serve", "--bnk", "b"])


def test_what_the_dockerfile_copies_is_sent_to_the_builder() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = set()
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE):
        copied |= set(line.split()[:-1])
    assert copied == allowed
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_the_image_is_not_root() -> None:
    assert re.findall(r"^USER (\S+)", DOCKERFILE[DOCKERFILE.rindex("FROM ") :], re.MULTILINE) == ["10001"]
