"""First weights: the mean of several models."""

import pytest
import torch

from model.training.saving import list_weights
from model.training.starting import average_models, save_model, start_model
from schemas.errors import InputError
from tests.models import make_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three models of one shape."""
    root = tmp_path_factory.mktemp("models")
    for seed in range(3):
        save_model(make_checkpoint("llama", seed=seed), root / str(seed), tokenizer="memory3-tiny")
    return [str(root / str(seed)) for seed in range(3)]


def test_the_mean_of_models(folders: list[str]) -> None:
    mean = dict(list_weights(average_models(folders).model))
    each = [dict(list_weights(start_model(folder).model)) for folder in folders]
    assert mean.keys() == each[0].keys()
    for name, weights in mean.items():
        expected = torch.stack([of_one[name].double() for of_one in each]).mean(0)
        torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(mean[name], each[0][name]) for name in mean)


def test_models_that_have_no_mean(folders: list[str]) -> None:
    with pytest.raises(InputError, match="1 models, must be at least 2"):
        average_models(folders[:1])
    with pytest.raises(InputError, match="memory3-tiny has another shape than"):
        average_models([folders[0], "memory3-tiny"])
