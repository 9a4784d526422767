"""A folder of hostile input built to its end: every record accounted for, in memory that the input does not set."""

import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from schemas.bank import Bank
from tests.corpora import write_lines

LINE_BYTES = 200 << 20
KINDS = {
    "thai": "ตลาดแห่งนี้เปิดทุกวันตั้งแต่ตีห้าจนถึงเที่ยง " * 20,
    "arabic": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. " * 20,
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇨🇭 " * 60,
    "nul": "before\x00after " * 50,
    "crlf": "one line\r\nanother line\r\n" * 40,
    "plain": topics["assert"],
}

BUILD = """
import json, resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "flows.cli", "build", "--json", *sys.argv[1:]], capture_output=True)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, done.stdout.decode(), done.stderr.decode()[-2000:], usage.ru_maxrss * 1024]))
"""


def write_hostile_files(folder: Path) -> None:
    rows = [{"id": name, "text": text} for name, text in KINDS.items()]
    good = write_lines(folder / "good.jsonl", rows)
    good.write_bytes(b"\xef\xbb\xbf" + good.read_bytes().replace(b"\n", b"\r\n"))
    content = zstandard.compress(
        write_lines(folder / "x.jsonl", [{"id": "t", "text": topics["with"]}] * 9).read_bytes()
    )
    (folder / "x.jsonl").unlink()
    (folder / "truncated.jsonl.zst").write_bytes(content[: len(content) * 2 // 3])
    with zstandard.open(folder / "long.jsonl.zst", "wb") as sink:
        sink.write(b'{"id": "long", "text": "')
        for _ in range(LINE_BYTES >> 20):
            sink.write(b"a" * (1 << 20))
        sink.write(b'"}\n{"id": "after", "text": "what comes after a long line"}\n')
    (folder / "surrogate.jsonl").write_bytes(b'{"id": "s", "text": "half \\ud83d of a pair"}\n\xff\xfe{}\n')
    keys = b",".join(b'"key%d": %d' % (number, number) for number in range(1_000_000))
    (folder / "keys.jsonl").write_bytes(b'{"id": "keys", "text": "many keys", ' + keys + b"}\n")
    pq.write_table(pa.table({"id": ["p", "q"], "text": [[1, 2], [3]]}), folder / "wrong.parquet")
    (folder / "empty.jsonl").touch()
    (folder / "loop").symlink_to(folder)
    (folder / "unknown.docx").write_bytes(b"PK")


def build(corpus: Path, bank: Path) -> tuple[dict[str, Any], int]:
    command = [sys.executable, "-c", BUILD, "--corpus", str(corpus), "--bank", str(bank)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=True, env=os.environ)
    status, output, errors, peak_bytes = json.loads(done.stdout)
    assert status == 0, errors
    return json.loads(output), peak_bytes


@pytest.mark.slow
def test_a_folder_of_hostile_input_is_built_to_its_end_in_bounded_memory(tmp_path: Path) -> None:
    plain = write_lines(tmp_path / "plain.jsonl", [{"id": name, "text": text} for name, text in KINDS.items()])
    _, usual_bytes = build(plain, tmp_path / "usual")
    folder = tmp_path / "hostile"
    folder.mkdir()
    write_hostile_files(folder)
    summary, peak_bytes = build(folder, tmp_path / "bank")
    documents = summary["counts"]["documents"]
    assert documents["read"] == documents["kept"] + sum(documents["dropped"].values())
    bank = Bank.open(tmp_path / "bank")
    assert set(bank.read_table("documents")["doc_id"].to_pylist()) >= {*KINDS, "after", "keys"}
    reasons = {(Path(row["path"]).name, row["reason"]) for row in bank.read_table("rejects").to_pylist()}
    assert reasons >= {
        ("truncated.jsonl.zst", "damaged"),
        ("long.jsonl.zst", "too_large"),
        ("surrogate.jsonl", "not_json"),
        ("surrogate.jsonl", "invalid_utf8"),
        ("wrong.parquet", "text_not_a_string"),
        ("unknown.docx", "unknown_format"),
    }
    print(f"peak {peak_bytes / 1e6:.0f} MB, without hostile files {usual_bytes / 1e6:.0f} MB")
    # A line of the greatest size that is read, and a record of a million keys; far less than the long line.
    assert peak_bytes - usual_bytes < 3 * (64 << 20) + (400 << 20)
