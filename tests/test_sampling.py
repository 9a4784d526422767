"""The choice of tokens, against a plain one for each sequence."""

import pytest
import torch

from model.sampling import SamplingConfig, TokenChooser


def choose_slowly(logits: torch.Tensor, seen: list[int], penalty: float) -> int:
    values = logits.tolist()
    for token in set(seen):
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    return max(range(len(values)), key=values.__getitem__)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_the_likeliest_token_is_chosen_after_the_penalty(penalty: float) -> None:
    random = torch.Generator().manual_seed(0)
    contexts = [[1, 2, 3], [4], [2, 2, 9, 0, 5]]
    chooser = TokenChooser([SamplingConfig(repetition_penalty=penalty)] * 3, contexts, 10)
    seen = [list(tokens) for tokens in contexts]
    for _ in range(20):
        logits = torch.randn(3, 10, generator=random)
        before = logits.clone()
        chosen = chooser.choose(logits).tolist()
        assert chosen == [choose_slowly(row, tokens, penalty) for row, tokens in zip(logits, seen, strict=True)]
        assert torch.equal(before, logits)
        for tokens, token in zip(seen, chosen, strict=True):
            tokens.append(token)


def test_top_p_keeps_the_likeliest_token() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    for seed in range(20):
        config = SamplingConfig(temperature=1.0, top_p=0.01, seed=seed)
        assert TokenChooser([config], [[]], 3).choose(logits).tolist() == [1]


@pytest.mark.parametrize("changes", [{"top_p": 5e-324}, {"temperature": 5e-324}, {"temperature": 1e-30, "top_p": 1.0}])
def test_the_smallest_settings_take_the_likeliest_token(changes: dict[str, float]) -> None:
    logits = torch.tensor([[-60.0, 55.0, 54.0, -torch.inf]])
    config = SamplingConfig(**{"temperature": 1.0, **changes})  # type: ignore[arg-type]
    assert TokenChooser([config], [[]], 4).choose(logits).tolist() == [1]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    configs = [SamplingConfig(temperature=1.0, top_p=0.9, seed=seed) for seed in range(4000)]
    chooser = TokenChooser(configs, [[]] * 4000, 4)
    chosen = chooser.choose(probabilities.log().expand(4000, -1))
    counts = torch.bincount(chosen, minlength=4) / 4000
    # The first three are the likeliest that together have 0.9; the last is never drawn.
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.04, rtol=0)


def test_each_sequence_draws_in_its_own_way_whatever_its_batch() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(3))
    configs = [
        SamplingConfig(temperature=1.0, seed=5),
        SamplingConfig(),
        SamplingConfig(temperature=1.0, seed=5, repetition_penalty=3.0),
        SamplingConfig(temperature=0.2, top_p=0.5, seed=2**63 - 1),
        SamplingConfig(temperature=9.0, top_p=1.0, seed=-1),
    ]
    contexts = [list(range(row, 50, 2)) for row in range(5)]
    chooser = TokenChooser(configs, contexts, 50)
    together = [chooser.choose(logits).tolist() for _ in range(4)]
    for row, config in enumerate(configs):
        alone = TokenChooser([config], contexts[row : row + 1], 50)
        assert [step[row] for step in together] == [alone.choose(logits[row : row + 1]).item() for _ in range(4)]
    assert len({tuple(step) for step in together}) > 1
