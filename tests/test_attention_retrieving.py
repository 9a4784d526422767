"""Retrieval by attention: against a brute force in float64, from raw memories and one forward pass a text."""

from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

from model.attention_heads import choose_heads, measure_heads
from model.attention_queries import compute_queries
from model.attention_retrieving import AttentionSearch, RerankedSearch, split_texts
from model.attention_scoring import SHARPNESS, AttentionScorer, make_scorer
from model.checkpoint import Checkpoint
from model.fetching import BankMemories
from model.fusing import FusedSearch, fuse_hits
from model.generating import GenerationConfig, Generator
from model.live_references import read_live_references
from model.retrieving import Hit, MemorySearch, Retriever
from model.writing import ReferenceWriter
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.records import EMPTY_SLOT
from tests.banks import extend_bank, get_embedder, make_bank
from tests.models import make_checkpoint

TEXTS = [topics[name][200:430] for name in ("class", "with", "assert", "del", "import")]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """Four query heads a KV head, and norms of queries and keys."""
    return make_checkpoint("qwen3")


@pytest.fixture(scope="module")
def bank(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """Two segments, with references that are not live."""
    writer = ReferenceWriter(checkpoint)
    first = make_bank(tmp_path_factory.mktemp("bank"), writer, num_references=30)
    ids = first.read_table("references", ["ref_id"])["ref_id"].to_pylist()
    return extend_bank(first, writer, num_new=12, deleted=[ids[3]], duplicates={ids[5]: ids[7]})


@pytest.fixture(scope="module")
def memories(bank: Bank, checkpoint: Checkpoint) -> BankMemories:
    return BankMemories(bank, ReferenceWriter(checkpoint))


@pytest.fixture(scope="module")
def scorer(memories: BankMemories) -> AttentionScorer:
    return make_scorer(memories)


def list_live(bank: Bank) -> list[str]:
    dropped = bank.read_dropped_ids().to_pylist()
    return sorted(set(bank.read_table("references", ["ref_id"])["ref_id"].to_pylist()) - set(dropped))


def run_alone(checkpoint: Checkpoint, tokens: Sequence[int]) -> np.ndarray:
    """The queries of one text by the model's own projections: (layers, heads, T, D) before RoPE, float64."""
    prefix = checkpoint.prefix_token_ids.tolist()
    caught: list[np.ndarray] = []
    handles = []
    for layer in checkpoint.memory_layers:
        attention = checkpoint.decoder.get_submodule(f"layers.{layer}.self_attn")

        def catch(_module: object, _inputs: object, output: torch.Tensor) -> None:
            caught.append(output.detach().double().reshape(len(prefix) + len(tokens), -1, checkpoint.head_dim).numpy())

        handles.append(attention.get_submodule("q_norm").register_forward_hook(catch))
    try:
        checkpoint.model(input_ids=torch.tensor([[*prefix, *tokens]]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return np.stack([queries[len(prefix) :].swapaxes(0, 1) for queries in caught])


def point(vectors: np.ndarray, mean: np.ndarray) -> np.ndarray:
    centred = vectors - mean
    return centred / np.linalg.norm(centred, axis=-1, keepdims=True)


def score_slowly(checkpoint: Checkpoint, bank: Bank, memories: BankMemories, texts: Sequence[str]) -> np.ndarray:
    """Scores of all live references by pair, (texts, P, N), one number after the other."""
    live = list_live(bank)
    fetched = memories.fetch(live)
    keys, kept = fetched.keys_LBHSD.double().numpy(), (fetched.offsets_LBHS != EMPTY_SLOT).numpy()
    sample = bank.read_references(live[:64], ["token_ids"])["token_ids"].to_pylist()
    own = [run_alone(checkpoint, tokens) for tokens in sample]
    num_layers, num_heads = keys.shape[0], keys.shape[2]
    num_groups = own[0].shape[1] // num_heads
    scores = np.zeros((len(texts), num_layers * num_heads, len(live)))
    for row, text in enumerate(texts):
        queries = run_alone(checkpoint, checkpoint.tokenizer.encode([text])[0][:128].tolist())
        for layer in range(num_layers):
            for head in range(num_heads):
                group = slice(head * num_groups, (head + 1) * num_groups)
                all_keys = np.concatenate(
                    [keys[layer, place, head][kept[layer, place, head]] for place in range(len(live))]
                )
                all_queries = np.concatenate([one[layer, group].reshape(-1, one.shape[-1]) for one in own])
                asked = point(queries[layer, group].reshape(-1, queries.shape[-1]), all_queries.mean(0))
                matches = np.empty((len(asked), len(live)))
                for place in range(len(live)):
                    own_keys = point(keys[layer, place, head][kept[layer, place, head]], all_keys.mean(0))
                    matches[:, place] = (asked @ own_keys.T).max(1)
                shares = np.exp(SHARPNESS * matches)
                scores[row, layer * num_heads + head] = (shares / shares.mean(1, keepdims=True)).mean(0)
    return scores


def test_queries_are_those_of_the_models_own_projections(checkpoint: Checkpoint) -> None:
    tokens = checkpoint.tokenizer.encode(TEXTS)
    tokens = [ids[: 128 - 30 * place] for place, ids in enumerate(tokens[:4])]
    for queries, ids in zip(compute_queries(checkpoint, tokens), tokens, strict=True):
        expected = run_alone(checkpoint, ids.tolist()).reshape(len(queries), -1, checkpoint.head_dim)
        np.testing.assert_allclose(queries.numpy(), expected, atol=1e-4, rtol=1e-4)


def test_the_search_is_the_brute_force(
    checkpoint: Checkpoint, bank: Bank, memories: BankMemories, scorer: AttentionScorer
) -> None:
    live = list_live(bank)
    slow = score_slowly(checkpoint, bank, memories, TEXTS)
    for pairs in (scorer.pairs, (1, 2)):
        expected = slow[:, list(pairs)].mean(1)
        found = AttentionSearch(scorer.select(pairs)).search(TEXTS, len(live))
        for hits, scores in zip(found, expected, strict=True):
            assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
            by_id = {hit.ref_id: hit.score for hit in hits}
            assert sorted(by_id) == live
            # Keys are held in float16: a cosine is good to a few ten-thousandths, and is multiplied by 16.
            np.testing.assert_allclose([by_id[ref_id] for ref_id in live], scores, rtol=0.01)
            assert hits[0].ref_id == live[int(scores.argmax())]


def test_candidates_have_the_scores_of_the_search(bank: Bank, scorer: AttentionScorer) -> None:
    live = list_live(bank)
    found = AttentionSearch(scorer).search(TEXTS, len(live))
    candidates = [[hit.ref_id for hit in hits[place::5]] for place, hits in enumerate(found)]
    scores = scorer.score_candidates(TEXTS, candidates)
    for hits, ref_ids, scores_PN in zip(found, candidates, scores, strict=True):
        by_id = {hit.ref_id: hit.score for hit in hits}
        np.testing.assert_allclose(scores_PN.mean(0).numpy(), [by_id[ref_id] for ref_id in ref_ids], rtol=1e-4)


def test_neither_batch_nor_parts_change_a_score(scorer: AttentionScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    search = AttentionSearch(scorer)
    together = search.search([*TEXTS, ""], 7)
    assert together[-1] == []
    monkeypatch.setattr("model.attention_scoring.PRODUCTS_AT_ONCE", 5000)
    alone = [search.search([text], 7)[0] for text in TEXTS]
    for one, other in zip(alone, together, strict=False):
        assert [hit.ref_id for hit in one] == [hit.ref_id for hit in other]
        np.testing.assert_allclose([hit.score for hit in one], [hit.score for hit in other], rtol=1e-4)


def test_cold_memories_are_written_for_the_search(checkpoint: Checkpoint, tmp_path: Path) -> None:
    writer = ReferenceWriter(checkpoint)
    warm = make_bank(tmp_path / "warm", writer, num_references=20)
    cold = make_bank(tmp_path / "cold", writer, num_references=20, cold=True)
    searches = [AttentionSearch(make_scorer(BankMemories(bank, writer))) for bank in (warm, cold)]
    first, second = (search.search(TEXTS, 5) for search in searches)
    assert [[hit.ref_id for hit in hits] for hits in first] == [[hit.ref_id for hit in hits] for hits in second]
    records = BankMemories(cold, writer)
    records.fetch(read_live_references(cold, [])["ref_id"].to_pylist())
    assert records.statistics.num_encoded == 0


def test_generation_reads_what_attention_finds(
    checkpoint: Checkpoint, scorer: AttentionScorer, memories: BankMemories
) -> None:
    search = AttentionSearch(scorer)
    generator = Generator(checkpoint, search, memories)
    prompt = checkpoint.tokenizer.encode([topics["class"]])[0][:40].tolist()
    list(generator.generate(checkpoint.tokenizer.decode(prompt), GenerationConfig(max_new_tokens=4)))
    trace = generator.traces[0]
    asked = checkpoint.tokenizer.decode([*checkpoint.bos_token_ids, *prompt])
    assert trace.hits == search.search([asked], 5)[0]


def test_order_puts_the_best_first_and_leaves_the_rest(bank: Bank, scorer: AttentionScorer) -> None:
    first = Retriever(bank, get_embedder())
    reranked = RerankedSearch(first, scorer, depth=6).search(TEXTS, 10)
    for text, hits, before in zip(TEXTS, reranked, first.search(TEXTS, 10), strict=True):
        head = [hit.ref_id for hit in before[:6]]
        everything = [hit.ref_id for hit in AttentionSearch(scorer).search([text], 100)[0]]
        assert [hit.ref_id for hit in hits[:6]] == [ref_id for ref_id in everything if ref_id in head]
        assert hits[6:] == before[6:]


def test_heads_are_measured_alone(bank: Bank, scorer: AttentionScorer) -> None:
    live = list_live(bank)[:9]
    answers = [live[2], live[5]]
    values = measure_heads(scorer, TEXTS[:2], [live, live], answers)
    for pair in scorer.pairs:
        for row, text in enumerate(TEXTS[:2]):
            ranking = [
                hit.ref_id
                for hit in AttentionSearch(scorer.select([pair])).search([text], 100)[0]
                if hit.ref_id in live
            ]
            assert values[row, pair] == pytest.approx(1 / (1 + ranking.index(answers[row])))
    assert choose_heads(np.array([0.1, 0.5, 0.5, 0.9]), [4, 5, 6, 7], 2) == [5, 7]


def test_what_cannot_be_searched_is_refused(memories: BankMemories, scorer: AttentionScorer) -> None:
    with pytest.raises(InputError, match="choose fewer heads"):
        AttentionSearch(scorer, max_key_bytes=1000)
    with pytest.raises(InputError, match="must be some of"):
        scorer.select([len(scorer.pairs)])
    with pytest.raises(InputError, match="sharpness is 0"):
        make_scorer(memories, sharpness=0)
    with pytest.raises(InputError, match="asked for 0 hits"):
        AttentionSearch(scorer).search(TEXTS, 0)
    with pytest.raises(InputError, match="must have 1"):
        compute_queries(memories.checkpoint, [np.zeros(0, np.int32)])


def test_texts_are_split_by_their_queries() -> None:
    queries = [torch.zeros(2, length, 4) for length in (5, 3, 0, 9, 20, 1)]
    assert list(split_texts(queries, 10)) == [range(3), range(3, 4), range(4, 5), range(5, 6)]
    assert list(split_texts([], 10)) == []


def test_ranks_are_fused() -> None:
    first, second = ([Hit(ref_id=name, score=0.0) for name in names] for names in ("abcd", "cax"))
    expected = {"a": 1 / 61 + 1 / 62, "b": 1 / 62, "c": 1 / 63 + 1 / 61, "d": 1 / 64, "x": 1 / 63}
    fused = fuse_hits([first, second], 4)
    assert [hit.ref_id for hit in fused] == ["a", "c", "b", "x"]
    assert [hit.score for hit in fused] == pytest.approx([expected[hit.ref_id] for hit in fused])
    assert [hit.ref_id for hit in fuse_hits([first[:1], second[:1]], 2)] == ["a", "c"]  # equal: the first by id


def test_fused_searches_are_asked_deeper(bank: Bank, scorer: AttentionScorer) -> None:
    searches: list[MemorySearch] = [Retriever(bank, get_embedder()), AttentionSearch(scorer)]
    fused = FusedSearch(searches, depth=20).search(TEXTS, 3)
    deep = [search.search(TEXTS, 20) for search in searches]
    assert fused == [fuse_hits(rankings, 3) for rankings in zip(*deep, strict=True)]
    with pytest.raises(InputError, match="two or more"):
        FusedSearch(searches[:1])
