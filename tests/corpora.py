"""Small real corpora for the tests: Python's language reference, with copies and texts in other scripts."""

from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import orjson

CHINESE = (
    "第一条 为了保护公民、法人和其他组织的合法权益，规范社会秩序，根据宪法，制定本法。"
    "第二条 国家保护公民的人身权利、财产权利以及其他合法权益，任何组织和个人不得侵犯。"
) * 8

TOPIC_NAMES = ("assert", "with", "lambda", "yield", "global", "pass", "del", "break", "continue", "import")


def make_documents() -> list[dict[str, Any]]:
    """Fourteen documents: ten topics, a copy, a near-copy, a Chinese text, and an empty one."""
    documents: list[dict[str, Any]] = [
        {"id": f"topic/{name}", "text": topics[name], "source": "topics", "length": len(topics[name])}
        for name in TOPIC_NAMES
    ]
    documents.append({"id": "copy", "text": topics["lambda"], "source": "copies"})
    near = topics["with"].replace("guarantees", "promises", 1)
    documents.append({"id": "near-copy", "text": near, "source": "copies"})
    documents.append({"id": "law", "text": CHINESE, "source": "laws"})
    documents.append({"id": "empty", "text": " \n", "source": "copies"})
    return documents


def write_lines(path: Path, documents: Iterable[dict[str, Any]]) -> Path:
    """Writes documents as JSON lines and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps(document) + b"\n" for document in documents))
    return path
