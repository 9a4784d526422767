"""Which layers and heads use distant text: measured as brute force in float64 does, and as a model made for it must."""

import copy
import json
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

from flows.ranking_layers import RankingRequest, list_ranking, plot_ranking, print_ranking, rank_layers
from flows.splitting import is_held_out
from model.checkpoint import Checkpoint
from model.distance import (
    DistanceReport,
    LayerUse,
    cut_sequences,
    measure_distance_use,
    rank_heads,
    recommend_layers,
)
from schemas.errors import InputError
from schemas.protocols import IntArray
from tests.models import make_checkpoint

DISTANCE = 12

ARCHITECTURES = ("llama", "qwen3", "gemma3", "mistral-window")


def make_sequences() -> list[IntArray]:
    draw = np.random.default_rng(0)
    # The second has a single prediction with distant text, the third none.
    return [np.concatenate(([1], draw.integers(3, 512, length))) for length in (50, DISTANCE + 3, DISTANCE + 2)]


def run_slowly(
    checkpoint: Checkpoint, sequence: IntArray, confined: int | None
) -> tuple[float, int, list[tuple[np.ndarray, np.ndarray]]]:
    """Eager attention of transformers in float64, one mask a layer: loss and count of the scored tokens, shares."""
    model = copy.deepcopy(checkpoint.model).double()
    model.set_attn_implementation("eager")  # type: ignore[operator]
    decoder = model.get_submodule("model")
    num_tokens = len(sequence) - 1
    tokens = torch.from_numpy(sequence)
    positions = torch.arange(num_tokens)[None]
    hidden = decoder.embed_tokens(tokens[None, :-1])
    shares = []
    with torch.inference_mode():
        for index, layer in enumerate(decoder.layers):
            window = getattr(layer.self_attn, "sliding_window", getattr(decoder.config, "sliding_window", None))
            mask = torch.full((num_tokens, num_tokens), -torch.inf, dtype=torch.float64)
            for query in range(num_tokens):
                for key in range(query + 1):
                    near = query - key <= DISTANCE or key == 0
                    if (window is None or query - key < window) and (index != confined or near):
                        mask[query, key] = 0.0
            kind = [checkpoint.config.layer_types[index]] if isinstance(decoder.rotary_emb.rope_type, dict) else []
            cos_sin = decoder.rotary_emb(hidden, positions, *kind)
            kept: list[torch.Tensor] = []
            hook = layer.self_attn.register_forward_hook(lambda _m, _i, output, kept=kept: kept.append(output[1]))
            hidden = layer(hidden, attention_mask=mask[None, None], position_embeddings=cos_sin, position_ids=positions)
            hook.remove()
            weights = kept[0][0].numpy()
            distant, first = np.zeros((2, weights.shape[0]))
            for query in range(DISTANCE + 2, num_tokens):
                distant += weights[:, query, 1 : query - DISTANCE].sum(-1)
                first += weights[:, query, 0]
            shares.append((distant, first))
        logits = model.lm_head(decoder.norm(hidden))[0]
    scored = range(DISTANCE + 2, num_tokens)
    losses = -logits.log_softmax(-1)
    return sum(float(losses[place, tokens[place + 1]]) for place in scored), len(scored), shares


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shares_and_losses_are_those_of_brute_force(name: str) -> None:
    # A window of 20 tokens lets some queries see distant tokens, and not all of them.
    changes = {"sliding_window": 20} if name in ("gemma3", "mistral-window") else {}
    checkpoint = make_checkpoint(name, **changes)
    sequences = make_sequences()
    report = measure_distance_use(checkpoint, sequences, distance=DISTANCE)

    loss, num_tokens = 0.0, 0
    distant, first = np.zeros((2, 4, 8))
    for sequence in sequences[:2]:
        total, count, shares = run_slowly(checkpoint, sequence, None)
        loss, num_tokens = loss + total, num_tokens + count
        for layer, (of_distant, of_first) in enumerate(shares):
            distant[layer] += of_distant
            first[layer] += of_first
    assert report.num_tokens == num_tokens == 37
    assert report.loss == pytest.approx(loss / num_tokens, rel=1e-4)
    np.testing.assert_allclose([use.distant_shares for use in report.layers], distant / num_tokens, atol=1e-4)
    np.testing.assert_allclose([use.first_shares for use in report.layers], first / num_tokens, atol=1e-4)
    assert distant.max() / num_tokens > 0.05
    for use in report.layers:
        confined = sum(run_slowly(checkpoint, sequence, use.layer)[0] for sequence in sequences[:2])
        assert use.loss_increase == pytest.approx((confined - loss) / num_tokens, abs=1e-3)
    assert max(abs(use.loss_increase) for use in report.layers) > 0.01


def test_long_sequences_measured_in_slices_equal_short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_checkpoint("qwen3")
    sequences = [np.random.default_rng(1).integers(3, 512, 300)]
    whole = measure_distance_use(checkpoint, sequences, distance=100)
    monkeypatch.setattr("model.distance.QUERIES_AT_ONCE", 37)
    parts = measure_distance_use(checkpoint, sequences, distance=100)
    assert whole.num_tokens == parts.num_tokens == 197
    for one, other in zip(whole.layers, parts.layers, strict=True):
        np.testing.assert_allclose(one.distant_shares, other.distant_shares, rtol=1e-5)
        np.testing.assert_allclose(one.first_shares, other.first_shares, rtol=1e-5)


def test_a_layer_whose_window_ends_at_the_distance_loses_nothing() -> None:
    checkpoint = make_checkpoint("gemma3", sliding_window=DISTANCE)
    report = measure_distance_use(checkpoint, make_sequences(), distance=DISTANCE)
    for use in report.layers:
        if use.layer % 2:
            assert abs(use.loss_increase) > 1e-4
            assert min(use.distant_shares) > 0.01
        else:
            assert use.loss_increase == pytest.approx(0.0, abs=1e-5)
            assert max(use.distant_shares) == 0.0


def make_report(increases: list[float]) -> DistanceReport:
    layers = tuple(
        LayerUse(
            layer=layer,
            loss_increase=increase,
            distant_shares=(increase / 2, increase / 4),
            first_shares=(0.5, 0.25),
        )
        for layer, increase in enumerate(increases)
    )
    return DistanceReport(distance=128, loss=2.0, num_tokens=1000, layers=layers)


def test_the_layers_of_the_greatest_increase_are_recommended() -> None:
    report = make_report([0.1, 0.5, 0.2, 0.5, 0.0])
    assert [recommend_layers(report, number) for number in (1, 2, 3, 5)] == [(1,), (1, 3), (1, 2, 3), (0, 1, 2, 3, 4)]
    assert rank_heads(report)[:3] == [(1, 0, 0.25), (3, 0, 0.25), (1, 1, 0.125)]
    for number in (0, 6):
        with pytest.raises(InputError, match=f"{number} are wanted"):
            recommend_layers(report, number)
    rows = list_ranking(report)
    assert [row["recommended"] for row in rows] == [False, True, False, True, False]
    assert rows[1]["most_distant_head"] == 0
    assert rows[1]["distant_share"] == pytest.approx(0.1875)
    assert rows[1]["first_share"] == pytest.approx(0.375)


def test_texts_are_cut_behind_what_a_context_begins_with() -> None:
    checkpoint = make_checkpoint("llama")
    tokens = checkpoint.tokenizer.encode([topics["assert"]])[0]
    found = cut_sequences(checkpoint, [topics["assert"], "short"], num_tokens=100, distance=50)
    assert len(found) == 1
    assert found[0].tolist() == [1, *tokens[:99].tolist()]


def test_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(InputError, match="distance is 100, .* has 51 tokens"):
        measure_distance_use(make_checkpoint("llama"), make_sequences(), distance=100)
    with pytest.raises(InputError, match="sequence_tokens is 100, must be at least 132"):
        RankingRequest(model="memory3-tiny", corpus=("x",), sequence_tokens=100)


def test_a_corpus_is_ranked_with_the_shipped_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = sorted(topics, key=lambda name: -len(topics[name]))[:40]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": name, "text": topics[name]}) + "\n" for name in names))
    request = {"model": "memory3-tiny", "corpus": (str(corpus),), "sequence_tokens": 300}
    report = rank_layers(RankingRequest(**request, num_sequences=3))
    assert report.num_tokens == 3 * (300 - 128 - 3)
    assert len(report.layers) == 8
    assert all(len(use.distant_shares) == 6 for use in report.layers)
    held_out = rank_layers(RankingRequest(**request, held_out_only=True))
    assert 0 < held_out.num_tokens <= 169 * sum(map(is_held_out, names))

    rows = list_ranking(report, 3)
    assert sum(row["recommended"] for row in rows) == 3
    print_ranking(rows, report)
    printed = capsys.readouterr().out
    assert f"loss {report.loss:.4f} nats over 507 tokens" in printed
    assert printed.count("memory layer") == 3
    plot_ranking(report, tmp_path / "ranking.png")
    assert (tmp_path / "ranking.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(InputError, match="at most"):
        rank_layers(RankingRequest(**{**request, "sequence_tokens": 100_000}))
