"""The documentation is true: every block of commands is run, page by page, and every link leads somewhere.

A page is run in a folder that is prepared as a reader's would be: a corpus ``docs/``, a bank ``my-bank`` of it, this
project's README and pages, and, in an object store, the bucket ``my-bucket``. Its blocks run in order in one shell.
What a page shows as output is compared with what is printed, numbers and ids left out.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from tests.pages import (
    OTHERS,
    ROOT,
    SHELL,
    Block,
    list_anchors,
    list_documentation,
    list_links,
    list_pages,
    read_blocks,
)
from tests.servers import wait_until
from tests.test_storage import endpoint, find_free_port  # noqa: F401
from tests.warm_commands import start_commands

ELSEWHERE = {
    "docs/nightly.md": "tests/test_serving_runs.py",
    "docs/reference/cli.md": "tests/test_reference.py",
    "docs/how-to/evaluate.md": "tests/test_lm_eval.py",
}
"""Pages whose ``sh`` blocks another test runs with what a shell lacks; the examples of commands are parsed only."""

SESSION = "$ make demo"
"""The first line of the block that ``tests/test_readme.py`` runs."""

SLOW = (
    "docs/how-to/another-model.md",
    "docs/how-to/measure.md",
    "docs/how-to/smaller-memories.md",
    "docs/how-to/training.md",
)
"""Pages that train, or write all memories several times."""

MAX_NOT_RUN = 16
"""Blocks that no test can run; one more has to be argued for."""

REASONS = re.compile(
    r"needs (Docker|systemd|a cluster|another server|the network|a GPU|a browser)|takes (minutes|hours)|"
    r"set up, as CI does|an example of yours"
)
"""Why a block is not run."""

NOTES = {"assert": "assert", "with": "with", "pass": "pass", "del": "del", "break": "break", "import": "import"}


def list_shell_blocks(page: str) -> list[Block]:
    return [block for block in read_blocks(page) if block.language in SHELL]


def list_runs() -> list[object]:
    runs: list[object] = []
    for page in list_documentation():
        blocks = [block for block in read_blocks(page) if block.mark != "not run" and not is_covered(block)]
        if any(block.language in (*SHELL, "python") for block in blocks):
            runs.append(pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page)
    return runs


def is_covered(block: Block) -> bool:
    """Tells whether another test runs a block."""
    return block.text.startswith(SESSION) or (block.page in ELSEWHERE and block.language == "sh")


# What the pages are made of -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", list_documentation())
def test_every_block_has_a_language_and_a_known_mark(page: str) -> None:
    for block in read_blocks(page):
        assert block.language in SHELL + OTHERS, f"{block.place}: give the block a fence and one of {SHELL + OTHERS}"
        if block.mark == "not run":
            assert REASONS.search(block.value), f"{block.place}: {block.value!r} is no known reason"
        elif block.mark:
            assert block.mark != "file" or block.language not in SHELL, block.place
            assert block.mark != "stays" or block.language == "sh", block.place
    marks = re.findall(r"<!-- (?:not run|file|stays|output differs)", (ROOT / page).read_text(encoding="utf-8"))
    assert len(marks) == sum(bool(block.mark) for block in read_blocks(page)), f"{page}: a mark stands before no block"


def test_few_blocks_are_not_run() -> None:
    left_out = [block for page in list_documentation() for block in read_blocks(page) if block.mark == "not run"]
    assert len(left_out) <= MAX_NOT_RUN, [block.place for block in left_out]
    for page, test in ELSEWHERE.items():
        assert re.search(rf"\b{re.escape(Path(page).name)}\b", (ROOT / test).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", list_pages())
def test_every_link_leads_somewhere(page: str) -> None:
    for link in list_links(page):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent.joinpath(target).resolve() if target else ROOT / page
        assert path.exists(), f"{page} links to {link}"
        if anchor and path.suffix == ".md":
            assert anchor in list_anchors(str(path.relative_to(ROOT))), f"{page} links to {link}"


def test_the_index_names_every_page() -> None:
    index = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in list_links("docs/README.md")}
    for page in list_documentation():
        if page.startswith("docs/") and page != "docs/README.md":
            assert (ROOT / page).resolve() in index, f"docs/README.md does not name {page}"


# What the pages say to do ---------------------------------------------------------------------------------------------


class Shell:
    """One shell for the blocks of a page: variables and the folder stay from one to the next."""

    def __init__(self, folder: Path, environment: dict[str, str], ports: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment
        self.ports = ports
        self.state = folder.parent / "state"
        self.state.write_text(f"cd {folder}\n")
        self.staying: subprocess.Popen[bytes] | None = None
        self.log = folder.parent / "staying.log"

    def adapt(self, text: str) -> str:
        """Returns a command with the ports that are free here, and with few steps of training."""
        for port, free in self.ports.items():
            text = re.sub(rf"(?<=[: ]){port}\b", free, text)
        return re.sub(r"--steps \d+", "--steps 2", text)

    def run(self, command: str, place: str) -> str:
        kept = f'{{ export -p; echo "cd \\"$PWD\\""; }} > {self.state}'
        script = f"set -euo pipefail; source {self.state}\n{self.adapt(command)}\n{kept}\n"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"{place}: {command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    def stay(self, block: Block) -> None:
        """Runs a command that stays in the foreground until :meth:`end`."""
        self.end()
        command = f"source {self.state}\n{self.adapt(block.text)}"
        with self.log.open("wb") as log:
            self.staying = subprocess.Popen(
                ["bash", "-c", command],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        process, wanted = self.staying, self.adapt(block.value)
        wait_until(lambda: wanted in self.log.read_text() or process.poll() is not None)
        assert wanted in self.log.read_text(), f"{block.place}: {self.log.read_text()[-4000:]}"

    def end(self) -> None:
        """Presses Ctrl-C in the terminal of the command that stays."""
        if self.staying is None:
            return
        os.killpg(self.staying.pid, signal.SIGINT)
        try:
            assert self.staying.wait(120) == 0, self.log.read_text()[-4000:]
        finally:
            if self.staying.poll() is None:
                os.killpg(self.staying.pid, signal.SIGKILL)
            self.staying = None


def mask(line: str) -> str:
    """Leaves the words of a line: ids, numbers, names of files and rules differ with the corpus and the machine."""
    line = re.sub(r"\b[0-9a-f]{6,64}\b(?![-.])", "ID", line)
    line = re.sub(r"\S+\.(md|jsonl)\b", "FILE", line)
    line = re.sub(r"(\d+ [a-z]+_[a-z]+(, )?)+$|none$", "REASONS", line.rstrip())
    return " ".join(re.sub(r"[-+]?\d[\d,.:]*", "N", line).replace("─", "").split())


def check_output(block: Block, wanted: list[str], printed: str) -> None:
    """Checks that what a page shows is printed, in this order; a line with an ellipsis stands for anything."""
    if block.mark == "output differs":
        assert printed.strip() or not wanted, block.place
        return
    lines = iter([mask(line) for line in printed.splitlines()])
    for line in wanted:
        masked = mask(line)
        if masked and "…" not in line and line.strip() != "...":
            assert any(masked == found for found in lines), f"{block.place}: {line!r} is not printed\n{printed[-3000:]}"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, engine: None) -> Iterator[dict[str, str]]:
    """Variables of a reader's shell, with ``memory3`` in the path and a Prefect server that is there already."""
    from prefect.server.api.server import SubprocessASGIServer

    home = tmp_path_factory.mktemp("home")
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / ".cache"),
        "PREFECT_API_URL": f"{SubprocessASGIServer().address}/api",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "140",
    }
    with tempfile.TemporaryDirectory(prefix="m3-") as folder, start_commands(Path(folder), variables) as programs:
        paths = [str(programs), str(Path(sys.executable).parent), variables["PATH"]]
        yield {**variables, "PATH": ":".join(paths)}


def write_corpus(folder: Path) -> None:
    for name, topic in NOTES.items():
        path = folder / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n\n{topics[topic]}", encoding="utf-8")


def write_model(folder: Path) -> None:
    """Leaves a random Llama of another shape than the shipped model, with that one's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(**shape, vocab_size=8192, head_dim=32, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    for path in (ROOT / "model" / "checkpoints" / "memory3-tiny").glob("tokenizer*.json"):
        shutil.copy(path, folder)


def run_command(command: str, folder: Path, environment: dict[str, str]) -> None:
    subprocess.run(command.split(), cwd=folder, env=environment, check=True, capture_output=True)


@pytest.fixture(scope="module")
def prepared(
    tmp_path_factory: pytest.TempPathFactory,
    environment: dict[str, str],
    endpoint: str,  # noqa: F811
) -> Path:
    """A folder with the corpus and a bank of it, at the place where pages run: a bank knows its corpus by path."""
    request = urllib.request.Request(f"{endpoint}/my-bucket", method="PUT")
    urllib.request.urlopen(request, timeout=60).close()
    site = tmp_path_factory.mktemp("pages") / "site"
    write_corpus(site / "docs")
    run_command("memory3 build --corpus docs/ --bank my-bank", site, environment)
    (site / "docs" / "pass.md").write_text(f"# pass\n\nIt does nothing.\n\n{topics['pass']}", encoding="utf-8")
    run_command("memory3 update --bank my-bank", site, environment)
    write_model(site / "my-llama")
    shutil.copy(ROOT / "README.md", site)
    shutil.copytree(site, site.parent / "kept")
    return site


@pytest.fixture
def shell(prepared: Path, environment: dict[str, str]) -> Iterator[Shell]:
    shutil.rmtree(prepared)
    shutil.copytree(prepared.parent / "kept", prepared)
    store = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    opened = Shell(prepared, environment | store, {port: str(find_free_port()) for port in ("8000", "8001", "8100")})
    yield opened
    opened.end()


@pytest.mark.parametrize("page", list_runs())
def test_every_command_of_a_page_works(page: str, shell: Shell) -> None:
    if page == "docs/tutorial.md":  # begins in a clone
        shutil.copytree(ROOT / "docs", shell.folder / "docs", dirs_exist_ok=True)
    for block in read_blocks(page):
        if block.mark == "not run" or is_covered(block):
            continue
        if block.mark == "file":
            (shell.folder / block.value).write_text(block.text, encoding="utf-8")
        elif block.mark == "stays":
            shell.stay(block)
        elif block.language == "python":
            script = shell.folder / "script.py"
            script.write_text(shell.adapt(block.text), encoding="utf-8")
            shell.run("python script.py", block.place)
        elif block.language in SHELL:
            for command, wanted in block.list_commands():
                check_output(block, wanted, shell.run(command, block.place))
    shell.end()
