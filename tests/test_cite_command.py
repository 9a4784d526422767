"""``memory3 generate --cite``: what is printed is what leaving memories out says, with the documents they stand in."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from typer.testing import CliRunner

from flows.citing import cite_generation, cut_texts
from flows.cli import app
from flows.generation import open_generator
from model.citing import CONFIRMED, CitedChunk
from model.generating import GenerationConfig
from schemas.bank import Bank
from schemas.errors import InputError
from tests.servers import MODEL, build_bank

PROMPT = "The assert statement is a convenient way to"


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank in which one document stands twice."""
    documents = {name: topics[name][:2000] for name in ("assert", "del", "pass", "break", "continue", "global")}
    return build_bank(tmp_path_factory.mktemp("bank"), {**documents, "assert-again": topics["assert"][:2000]})


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_chunks_name_documents_and_say_whether_it_is_so(bank: Path) -> None:
    options = ("--bank", bank, "--prompt", PROMPT, "--max-new-tokens", 80)
    found = json.loads(run(*options, "--cite", "--json"))
    assert found["text"] == json.loads(run(*options, "--json"))["text"]
    first, second = found["citations"]
    assert first["text"] + second["text"] == found["text"]
    assert (first["num_tokens"], second["num_tokens"]) == (64, 16)
    assert second["first_token"] == first["first_token"] + 64
    texts = Bank.open(bank).read_table("references", ["ref_id", "text"]).to_pylist()
    by_id = {row["ref_id"]: " ".join(row["text"].split()) for row in texts}
    numbers: dict[str, int] = {}
    for chunk, trace in zip((first, second), found["chunks"][-2:], strict=True):
        assert {citation["ref_id"] for citation in chunk["citations"]} == {hit["ref_id"] for hit in trace["hits"]}
        confirmed = [citation for citation in chunk["citations"] if citation["confirmed"]]
        most = max(chunk["citations"], key=lambda citation: citation["support"])
        assert confirmed == ([most] if most["support"] > chunk["noise"] else [])
        for citation in chunk["citations"]:
            assert numbers.setdefault(citation["ref_id"], citation["number"]) == citation["number"]
            assert citation["beginning"]
            assert by_id[citation["ref_id"]].startswith(citation["beginning"])
            copies = "assert" in citation["documents"]
            assert citation["num_documents"] == (2 if copies else 1)
            assert set(citation["documents"]) <= {"assert", "assert-again"} or not copies
            assert citation["confirmed"] == (citation["verdict"] == CONFIRMED)
    assert list(numbers.values()) == list(range(1, len(numbers) + 1))
    # What the first chunk says of assertions it has from what the bank says of them.
    assert first["support"] > first["noise"]
    printed = run(*options, "--cite")
    for chunk in (first, second):
        assert f"from token {chunk['first_token']}" in printed
        for citation in chunk["citations"]:
            assert f"{citation['support']:+.2f}" in printed
            assert citation["documents"][0] in printed


def test_several_texts_are_cited_each(bank: Path) -> None:
    both = json.loads(
        run("--bank", bank, "--prompt", PROMPT, "--prompt", "To delete", "--max-new-tokens", 4, "--cite", "--json")
    )
    assert [len(one["citations"]) for one in both] == [1, 1]
    assert [one["citations"][0]["text"] for one in both] == [one["text"] for one in both]
    printed = run("--bank", bank, "--prompt", PROMPT, "--prompt", "To delete", "--max-new-tokens", 4, "--cite")
    assert "text 1" in printed
    assert "text 2" in printed


def test_a_letter_of_two_chunks_belongs_to_the_one_that_ends_it() -> None:
    decode = bytes.decode
    word = "Gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n".encode()
    chunks = [
        CitedChunk(first_token=0, tokens=tuple(part), logprob=0.0, support=0.0, noise=0.1, citations=())
        for part in (word[:3], word[3:])
    ]
    texts = cut_texts(lambda tokens: decode(bytes(tokens), errors="replace"), chunks)
    assert texts == ["Gr", "\N{LATIN SMALL LETTER U WITH DIAERESIS}n"]


def test_a_text_ends_where_the_chat_template_says(bank: Path) -> None:
    generator = open_generator(MODEL, str(bank))
    (generated,) = generator.generate_batch([PROMPT], GenerationConfig(max_new_tokens=70))
    assert generator.trace.generated == [generated]
    end = generated[10]
    (cited,) = cite_generation(generator, end_token_id=end)
    assert [chunk.tokens for chunk in cited.chunks] == [tuple(generated[: generated.index(end)])]
    (nothing,) = cite_generation(generator, end_token_id=generated[0])
    assert (nothing.chunks, nothing.texts, nothing.sources) == ([], [], {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no-memory"], "which --no-memory does not read"),
        (["--rag", "--bank", "anywhere"], "which --rag does not read"),
        (["--bank", "http://127.0.0.1:9"], "hands out memories, not documents"),
        ([], "give the bank to read with --bank"),
    ],
)
def test_where_nothing_can_be_cited_a_line_says_so(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["generate", "--prompt", "x", "--cite", *options])
    assert isinstance(done.exception, InputError)
    assert message in str(done.exception)
    with pytest.raises(InputError, match="bank at hand"):
        cite_generation(open_generator(MODEL, None, knowledge="none"))
