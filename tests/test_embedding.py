"""Text embeddings: the static table against sentence-transformers itself, the transformer, and names nobody knows."""

import shutil
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.embedding import SHIPPED_EMBEDDER, load_embedder
from model.static_embedding import TEXTS_PER_TILE, StaticEmbedder
from schemas.errors import InputError
from schemas.protocols import Embedder, FloatArray
from tests.corpora import CHINESE

WORDLESS = ["", " \n\t ", "\N{GRINNING FACE}", "[CLS] [SEP] [PAD] [UNK]"]

TEXTS = [
    *(topics[name][:400] for name in sorted(topics)[:40]),
    topics["specialnames"],
    CHINESE,
    "def f(x):\n\treturn x  # 3.14",
    "Ünïcödé, naïve café",
    "x",
    *WORDLESS,
]

TOLERANCE = 2e-5
"""Float32 sums of the longest text's ten thousand pieces agree no better, whichever library adds them up."""


@pytest.fixture(scope="module")
def static() -> Embedder:
    return load_embedder("static")


@pytest.fixture(scope="module")
def minilm() -> Embedder:
    return load_embedder("minilm")


def embed_slowly(embedder: StaticEmbedder, text: str) -> FloatArray:
    """The mean of the pieces' vectors in float64, piece by piece, at length 1."""
    total = np.zeros(embedder.dimension)
    for piece in embedder._tokenizer.encode(text, add_special_tokens=False).ids:
        total += embedder._table[piece].astype(np.float64)
    norm = float(np.sqrt((total**2).sum()))
    return (total / norm if norm else total).astype(np.float32)


def test_the_static_embedder_equals_sentence_transformers(static: Embedder) -> None:
    """Both in float32; the file holds float16, in which the library would compute if it were let."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(SHIPPED_EMBEDDER), device="cpu").float()
    expected = model.encode(TEXTS, convert_to_numpy=True, normalize_embeddings=True, show_progress_bar=False)
    found = static.embed(TEXTS)
    assert found.shape == expected.shape == (len(TEXTS), static.dimension)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@given(text=st.text(max_size=60))
def test_the_static_embedder_equals_adding_piece_by_piece(static: Embedder, text: str) -> None:
    assert isinstance(static, StaticEmbedder)
    np.testing.assert_allclose(static.embed([text])[0], embed_slowly(static, text), atol=2e-6)


def test_a_text_without_words_has_the_zero_vector_and_others_unit_length(static: Embedder) -> None:
    norms = np.linalg.norm(static.embed(TEXTS), axis=1)
    np.testing.assert_allclose(norms, [float(text not in WORDLESS) for text in TEXTS], atol=1e-5)
    assert not static.embed(WORDLESS).any()


def test_a_static_vector_does_not_depend_on_the_batch(static: Embedder) -> None:
    many = (TEXTS * 8)[: TEXTS_PER_TILE + 50]
    together = static.embed(many)
    assert np.array_equal(together, np.concatenate([static.embed([text]) for text in many]))
    assert np.array_equal(together, static.embed(many[::-1])[::-1])


def test_no_texts_have_no_vectors(static: Embedder) -> None:
    assert static.embed([]).shape == (0, static.dimension)


def test_the_static_id_is_that_of_the_files(static: Embedder, tmp_path: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copy(SHIPPED_EMBEDDER / name, tmp_path / name)
    assert StaticEmbedder(tmp_path).embedder_id == static.embedder_id
    tokenizer = tmp_path / "tokenizer.json"
    changed = tokenizer.read_text(encoding="utf-8").replace('"lowercase": true', '"lowercase": false')
    tokenizer.write_text(changed, encoding="utf-8")
    assert StaticEmbedder(tmp_path).embedder_id != static.embedder_id


@pytest.mark.parametrize(
    ("table", "tokenizer"),
    [
        pytest.param(None, None, id="empty"),
        pytest.param(b"junk", None, id="damaged-table"),
        pytest.param("own", None, id="no-tokenizer"),
        pytest.param("own", b"{", id="damaged-tokenizer"),
    ],
)
def test_a_folder_without_a_static_model_is_refused(
    tmp_path: Path, table: bytes | str | None, tokenizer: bytes | None
) -> None:
    if isinstance(table, bytes):
        (tmp_path / "model.safetensors").write_bytes(table)
    elif table is not None:
        shutil.copy(SHIPPED_EMBEDDER / "model.safetensors", tmp_path / "model.safetensors")
    if tokenizer is not None:
        (tmp_path / "tokenizer.json").write_bytes(tokenizer)
    with pytest.raises(InputError, match="holds no static embedding model"):
        StaticEmbedder(tmp_path)


TRIPLES = [
    ("How do I remove a key from a dictionary?", "Deleting an entry of a dict by its key.", "The weather was cold."),
    ("The function returns nothing.", "There is no return value.", "Bread is baked in an oven."),
    ("A list can be changed in place.", "Lists are mutable sequences.", "The train leaves at nine."),
]


@pytest.mark.parametrize("name", ["minilm", "static"])
def test_a_paraphrase_is_nearer_than_another_subject(name: str, request: pytest.FixtureRequest) -> None:
    embedder: Embedder = request.getfixturevalue(name)
    for triple in TRIPLES:
        sentence, paraphrase, unrelated = embedder.embed(triple)
        assert sentence @ paraphrase > sentence @ unrelated + 0.1


def test_minilm_is_the_real_model(minilm: Embedder) -> None:
    assert minilm.dimension == 384
    assert minilm.embedder_id.startswith("minilm:")
    vectors = minilm.embed(TEXTS[:10])
    assert vectors.shape == (10, 384)
    assert vectors.dtype == np.float32
    assert vectors.flags.c_contiguous
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    first, second, third = minilm.embed(TRIPLES[0])
    assert first @ second > 0.6
    assert first @ third < 0.2


def test_a_minilm_vector_does_not_depend_on_the_batch(minilm: Embedder) -> None:
    texts = [*TEXTS[:6], CHINESE, "x"]
    together = minilm.embed(texts)
    np.testing.assert_allclose(together, np.concatenate([minilm.embed([text]) for text in texts]), atol=1e-5)
    np.testing.assert_allclose(together, minilm.embed(texts[::-1])[::-1], atol=1e-5)


def test_no_texts_have_no_minilm_vectors(minilm: Embedder) -> None:
    assert minilm.embed([]).shape == (0, minilm.dimension)


def test_a_folder_loads_as_a_model_with_an_id_of_its_weights(static: Embedder, tmp_path: Path) -> None:
    shutil.copytree(SHIPPED_EMBEDDER, tmp_path / "copy")
    embedder = load_embedder(str(tmp_path / "copy"))
    np.testing.assert_allclose(embedder.embed(TEXTS), static.embed(TEXTS), atol=TOLERANCE)
    assert embedder.embedder_id.startswith("copy:")
    assert embedder.embedder_id == load_embedder(str(tmp_path / "copy")).embedder_id


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_HUB_OFFLINE=1 sets, which is read when the library is imported."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


UNKNOWN = ["nobody/no-such-model", "no-such-model", "no such model", "missing/folder/of/models"]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_name_is_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=f"the embedder '{name}' cannot be loaded"):
        load_embedder(name)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "name",
    UNKNOWN,
)
def test_the_error_of_an_unknown_name_is_one_line(name: str) -> None:
    with pytest.raises(InputError) as caught:
        load_embedder(name)
    assert len(str(caught.value).splitlines()) == 1


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be loaded"):
        load_embedder(str(tmp_path))
