"""make bench-evaluation: every figure of the shipped model that is claimed anywhere, by the commands that users have.

    python -m benchmarks.bench_evaluation --work runs/recipe --out runs/evaluation
    python -m benchmarks.bench_evaluation --work runs/recipe --out runs/evaluation --only knowledge,attribution

Needs the corpora that ``python -m flows.train_tiny corpus`` writes to the folder of the recipe. Banks, reports and what
is printed go to ``--out``; what is finished there is not done again. Once the banks are there (``--only banks``), two
of these can share the work, each with its ``--only``. At the end all that is finished is printed, as it stands in
results/evaluation.txt. The folder is for one model; another commit needs another folder, too.
"""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.options import show_work
from model.locating import SHIPPED_MODEL, find_checkpoint
from schemas.atomic import write_bytes_atomically
from schemas.identifiers import hash_bytes
from schemas.stores import open_store

BANKS = {
    # Attention reads the keys of the whole bank for every question, so retrieval is measured on a small one.
    "bank-all": (("banked", "held_out"), True),
    "bank-small": (("banked/python-docs.jsonl.zst", "held_out"), False),
}
"""Which parts of the corpora each bank holds, and whether it is cold."""

CASES = {
    "filter": "-m benchmarks.bench_filter",
    "perplexity": "memory3 eval perplexity --bank {bank-all} --corpus {held_out} --references 5,1,2,3",
    "perplexity-own": "memory3 eval perplexity --bank {bank-all} --corpus {held_out} --references 5,1,2,3 "
    "--ways random,retrieved,compressed,text --own-document",
    "perplexity-paper": "memory3 eval perplexity --bank {bank-all} --corpus {held_out} --references 5,1,2,3 "
    "--ways random,retrieved,compressed,text --own-document --shared-run 0",
    "knowledge": "memory3 eval knowledge --corpus {held_out} --seen {banked}",
    "attribution": "memory3 eval attribution --bank {bank-all} --corpus {held_out}",
    "retrieval": "memory3 eval retrieval --bank {bank-small}",
}
"""What is measured, in the order it is printed."""

app = typer.Typer(add_completion=False)


def build_banks(work: Path, out: Path, names: list[str]) -> None:
    """Builds the banks that are not there yet."""
    from flows.building import build
    from flows.config import BuildConfig, MemoryConfig
    from flows.steps import Steps

    for name in names:
        parts, is_cold = BANKS[name]
        config = BuildConfig(memory=MemoryConfig(cold=is_cold))
        if not any((out / name / "manifests").glob("*.json")):
            build(open_store(str(out / name)), [str(work / "corpus" / part) for part in parts], config, Steps())


def run_case(name: str, work: Path, out: Path) -> None:
    """Runs the command of a case, and keeps what it prints with the command before it.

    Raises:
        BadParameter: the command failed.
    """
    places = {bank: str(out / bank) for bank in BANKS}
    places |= {part: str(work / "corpus" / part) for part in ("banked", "held_out")}
    words = [word.format(**places) for word in shlex.split(CASES[name])]
    is_suite = words[0] == "memory3"
    command = ["-m", "flows.cli", *words[1:], "--out", str(out / "reports" / name)] if is_suite else words
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise typer.BadParameter(f"{shlex.join(words)} ended with {done.returncode}; what it said stands above")
    shown = shlex.join(words) if is_suite else f"python {shlex.join(words)}"
    write_bytes_atomically(out / f"{name}.txt", f"$ {shown}\n".encode() + done.stdout)


def claim_folder(out: Path) -> None:
    """Makes a folder that of the shipped model as it is.

    Raises:
        BadParameter: it is another model's.
    """
    digest = hash_bytes((find_checkpoint(SHIPPED_MODEL) / "model.safetensors").read_bytes())
    (out / "reports").mkdir(parents=True, exist_ok=True)
    owner = out / "model.txt"
    if not owner.is_file():
        write_bytes_atomically(owner, f"{digest}\n".encode())
    elif owner.read_text().strip() != digest:
        raise typer.BadParameter(f"{out} was measured with other weights; name another folder with --out")


@app.command()
def main(
    work: Annotated[Path, typer.Option(help="Folder of the recipe, with its corpora.")] = Path("runs/recipe"),
    out: Annotated[Path, typer.Option(help="Folder for banks and reports.")] = Path("runs/evaluation"),
    only: Annotated[str, typer.Option(help=f"banks, or some of {', '.join(CASES)}; all if not given.")] = "",
) -> None:
    """Measure what the shipped model gains from memory, and whether its citations and searches are right."""
    names = list(CASES) if only in ("", "banks") else only.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise typer.BadParameter(f"there is no case {unknown[0]!r}; give some of {', '.join(CASES)}")
    if not (work / "corpus" / "held_out").is_dir():
        raise typer.BadParameter(
            f"{work} has no corpora; make them: python -m flows.train_tiny corpus --data FOLDER --work {work}"
        )
    claim_folder(out)
    wanted = [name for name in names if not (out / f"{name}.txt").is_file()]
    with show_work():
        build_banks(work, out, [bank for bank in BANKS if any(f"{{{bank}}}" in CASES[name] for name in wanted)])
    for name in wanted if only != "banks" else ():
        run_case(name, work, out)
    finished = [out / f"{name}.txt" for name in CASES if (out / f"{name}.txt").is_file()]
    print("\n\n".join(path.read_text(encoding="utf-8") for path in finished), end="")


if __name__ == "__main__":
    app()
