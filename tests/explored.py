"""A bank to look into: three versions of a few documents, one of which attacks whoever shows it."""

import json
from pathlib import Path
from pydoc_data.topics import topics

from flows.building import build, update
from flows.steps import Steps
from schemas.stores import LocalStore
from tests.test_equality import make_config

KEY = "a-key-of-at-least-16-letters"

SCRIPT = "<script>document.title='taken'</script><img src=http://evil.example/x onerror=\"document.title='taken'\">"

HEBREW = "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. כולם חוננו בתבונה ובמצפון. "

HOSTILE = f"{SCRIPT} </blockquote></template> \u202etxet\u0007\u0000\u009b\ufffe \U0001f469\u200d\U0001f680 {HEBREW}"

SHARED = topics["pass"]

FIRST = {
    "topic/assert": topics["assert"],
    "topic/break": topics["break"],
    "topic/pass": SHARED,
    "copy/pass": SHARED,
    "near/assert": topics["assert"].replace("convenient", "handy", 1),
    f"hostile/{SCRIPT}": HOSTILE,
    "topic/del": topics["del"],
}

SECOND = {name: text for name, text in FIRST.items() if name != "topic/break"} | {
    "topic/del": topics["del"].replace("Deletion of a target list", "Removing a list of targets", 1),
    "lighthouse": "The keeper of the lighthouse at Skerryvore is called Morag, and she has a red boat.",
}

THIRD = {name: text for name, text in SECOND.items() if name != "lighthouse"}


def build_explored_bank(folder: Path) -> Path:
    """Builds the bank of three versions below a folder, its memories stored."""
    bank, corpus = LocalStore(folder / "bank"), folder / "corpus.jsonl"
    settings = {"reading": {"title_column": "title"}, "chunking": {"title_prefix": False}}
    for number, documents in enumerate((FIRST, SECOND, THIRD)):
        rows = [
            {"id": name, "text": text, "title": f"About {name}", "source": SCRIPT} for name, text in documents.items()
        ]
        corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if number == 0:
            build(bank, [str(corpus)], make_config(settings), Steps())
        else:
            update(bank, [str(corpus)], {}, Steps())
    return folder / "bank"
