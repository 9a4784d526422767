"""What ``memory3 eval attribution`` continues: passages of held-out documents, or prompts of a file.

A passage is a prompt and the real text that follows it. Documents are taken in an order that is random but depends on
their ids and files alone, a passage of each before the second of any; versions of a document are one item, since they
are not independent.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from flows.splitting import find_family
from model.checkpoint import Checkpoint
from model.training.messages import parse_content, read_rows
from pipelines.assembling import hash_file
from pipelines.formats import CorpusFile, list_corpus_files
from pipelines.reading import read_records
from pipelines.records import ReadingConfig
from schemas.errors import InputError
from schemas.identifiers import hash_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttributionPrompt:
    """A text to continue.

    Attributes:
        item: what it is of, and not independent of: the file and the document, both without versions, or the prompt
            itself.
        name: what it is called where it fails.
        tokens: the prompt, with what a context begins with.
        following: the real text after it; empty if that is not known.
    """

    item: str
    name: str
    tokens: tuple[int, ...]
    following: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSource:
    """Prompts with where they are from.

    Attributes:
        prompts: the prompts.
        files: by path the SHA-256 of each file that was read, empty for one in an object store.
        documents: id and content hash of each document that a prompt is of; none for prompts of a file.
    """

    prompts: list[AttributionPrompt]
    files: dict[str, str]
    documents: tuple[tuple[str, str], ...] = ()


def name_item(file: CorpusFile, doc_id: str) -> str:
    """Returns what a document is called as an item: its file and its id, without versions.

    A file that is a document is named by its id already; before that then stands the folder that it is from.
    """
    if file.doc_id is None:
        return f"{find_family(file.name)}: {find_family(doc_id)}"
    folder = file.path.removesuffix(file.name).rstrip("/").rpartition("/")[2]
    return f"{folder}: {find_family(doc_id)}"


def choose_passages(
    checkpoint: Checkpoint, corpus: Sequence[str], *, num_texts: int, prompt_tokens: int, new_tokens: int, seed: int
) -> PromptSource:
    """Cuts passages from documents.

    Args:
        checkpoint: the model.
        corpus: files and folders of held-out documents.
        num_texts: passages wanted.
        prompt_tokens: tokens of a prompt, ``<s>`` included.
        new_tokens: tokens that follow it.
        seed: of the order of the documents.

    Raises:
        InputError: the documents have fewer passages.
        CorpusError: the corpus cannot be read.
    """
    documents: dict[str, dict[str, str]] = {}
    files = list_corpus_files(corpus)
    for file in files:
        for batch in read_records(file, ReadingConfig()):
            for row in batch.select(["doc_id", "text", "content_hash"]).to_pylist():
                if not row["text"]:
                    continue
                item = name_item(file, row["doc_id"])
                # Of several versions the first by id.
                if item not in documents or row["doc_id"] < documents[item]["doc_id"]:
                    documents[item] = row
    order = sorted(documents, key=lambda item: hash_bytes(f"{seed}:{item}".encode()))
    encoded = checkpoint.tokenizer.encode([documents[item]["text"] for item in order])
    bos = tuple(checkpoint.bos_token_ids)
    size = prompt_tokens - len(bos)
    passages: list[tuple[int, int, AttributionPrompt]] = []
    for place, (item, ids) in enumerate(zip(order, encoded, strict=True)):
        for number, start in enumerate(range(0, len(ids) - size - new_tokens + 1, size + new_tokens)):
            tokens = ids[start : start + size + new_tokens].tolist()
            prompt = AttributionPrompt(
                item=item,
                name=f"{documents[item]['doc_id']} from token {start}",
                tokens=(*bos, *tokens[:size]),
                following=tuple(tokens[size:]),
            )
            passages.append((number, place, prompt))
    passages.sort(key=lambda passage: passage[:2])
    if len(passages) < num_texts:
        raise InputError(
            f"{', '.join(corpus)} has {len(passages):,} passages of {prompt_tokens} and {new_tokens} tokens, and "
            f"{num_texts:,} are wanted; give more texts, or lower --chunks"
        )
    digests = {file.path: hash_file(Path(file.path)) if Path(file.path).is_file() else "" for file in files}
    prompts = [prompt for _, _, prompt in passages[:num_texts]]
    used = [documents[item] for item in dict.fromkeys(prompt.item for prompt in prompts)]
    return PromptSource(
        prompts=prompts, files=digests, documents=tuple((row["doc_id"], row["content_hash"]) for row in used)
    )


def read_prompts(checkpoint: Checkpoint, path: Path, *, num_texts: int) -> PromptSource:
    """Reads prompts from JSON lines: ``{"prompt": ...}``.

    Args:
        checkpoint: the model.
        path: the file.
        num_texts: prompts wanted, the first ones.

    Raises:
        InputError: the file cannot be read, has fewer prompts, or a row is none.
    """
    texts: dict[str, None] = {}
    for line, row in read_rows(path):
        try:
            if isinstance(row, InputError):
                raise row
            texts[parse_content(row.get("prompt"))] = None
        except InputError as error:
            raise InputError(f"{path}, line {line} is no prompt: {error}") from error
    if len(texts) < num_texts:
        raise InputError(
            f"{path} has {len(texts):,} different prompts, and {num_texts:,} are wanted; give more, or lower --chunks"
        )
    chosen = list(texts)[:num_texts]
    prompts = [
        AttributionPrompt(
            item=hash_bytes(text.encode()), name=text[:80], tokens=(*checkpoint.bos_token_ids, *tokens.tolist())
        )
        for text, tokens in zip(chosen, checkpoint.tokenizer.encode(chosen), strict=True)
    ]
    return PromptSource(prompts=prompts, files={str(path): hash_file(path)})
