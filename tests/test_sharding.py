"""Sharded training: real processes, joined by gloo, against the same run in this one process."""

from pathlib import Path

import numpy as np
import pytest

from flows.aligning import STORED, AlignmentConfig
from model.training.loop import LoopConfig
from schemas.errors import InputError
from tests.train_ranks import Job, Outcome, launch_ranks, run_job

SHARDED = {"sharded": True}
STOP, EARLY, LATE = 7, 3, 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Outcome:
    """The run that all others are to be like, in this process."""
    return run_job(Job(folder=str(folder / "whole")))


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Outcome]:
    """All runs of two processes: starting them takes longer than running them."""
    run_job(Job(folder=str(folder / "begun-alone"), stop_after=LATE))
    jobs = {
        "whole": Job(folder=str(folder / "two"), config=SHARDED),
        "stopped": Job(folder=str(folder / "parts"), config=SHARDED, stop_after=STOP),
        "resumed": Job(folder=str(folder / "parts"), config=SHARDED),
        "left": Job(folder=str(folder / "left"), config=SHARDED, stop_after=EARLY),
        "begun alone": Job(folder=str(folder / "begun-alone"), config=SHARDED),
        "adapter": Job(folder=str(folder / "adapter"), config=SHARDED, with_adapter=True, stop_after=EARLY),
        "half": Job(folder=str(folder / "half"), config={**SHARDED, "precision": "bfloat16"}, stop_after=EARLY),
        "once more": Job(folder=str(folder / "two"), config=SHARDED),
    }
    return dict(zip(jobs, launch_ranks(list(jobs.values()), 2, folder), strict=True))


def check_same(found: Outcome, expected: Outcome, first_step: int = 0) -> None:
    np.testing.assert_allclose(found.losses, expected.losses[first_step:], atol=1e-4, rtol=0)
    np.testing.assert_allclose(found.norm, expected.norm, rtol=1e-4)


def test_every_process_holds_half_of_the_weights_and_the_losses_are_those_of_one(
    whole: Outcome, outcomes: dict[str, Outcome]
) -> None:
    sharded = outcomes["whole"]
    assert (sharded.processes, whole.processes) == (2, 1)
    assert whole.part == whole.layers_part == 1.0
    assert 0.5 <= sharded.part < 0.51
    assert 0.5 <= sharded.layers_part < 0.51  # so writing has left no layer gathered
    assert len(whole.losses) == 12
    check_same(sharded, whole)


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(whole: Outcome, outcomes: dict[str, Outcome]) -> None:
    assert len(outcomes["stopped"].losses) == STOP
    assert outcomes["resumed"].resumed_at == STOP
    assert outcomes["stopped"].losses + outcomes["resumed"].losses == outcomes["whole"].losses
    assert outcomes["resumed"].norm == outcomes["whole"].norm
    check_same(outcomes["resumed"], whole, STOP)


def test_a_sharded_run_goes_on_in_one_process_and_the_other_way_round(
    folder: Path, whole: Outcome, outcomes: dict[str, Outcome]
) -> None:
    alone = run_job(Job(folder=str(folder / "left")))
    for resumed, stopped_at in ((alone, EARLY), (outcomes["begun alone"], LATE)):
        assert resumed.resumed_at == stopped_at
        check_same(resumed, whole, stopped_at)


def test_a_finished_run_is_whole_again_without_a_step(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["once more"].losses == []
    assert outcomes["once more"].norm == outcomes["whole"].norm


def test_an_adapter_beside_frozen_weights_is_trained_and_merged(folder: Path, outcomes: dict[str, Outcome]) -> None:
    alone = run_job(Job(folder=str(folder / "adapter-alone"), with_adapter=True, stop_after=EARLY))
    assert outcomes["adapter"].part < 0.51
    assert alone.losses[-1] < alone.losses[0]
    check_same(outcomes["adapter"], alone)


def test_layers_gathered_in_bfloat16_train_as_under_autocast(folder: Path, outcomes: dict[str, Outcome]) -> None:
    """One process of the same precision differs from both by rounding: about 0.4 % of a number."""
    alone = run_job(Job(folder=str(folder / "half-alone"), config={"precision": "bfloat16"}, stop_after=EARLY))
    np.testing.assert_allclose(outcomes["half"].losses, alone.losses, atol=0.03, rtol=0)
    assert outcomes["half"].losses != outcomes["whole"].losses[:EARLY]


def test_memories_of_a_bank_cannot_be_read_by_a_sharded_model() -> None:
    with pytest.raises(InputError, match=r"sharded"):
        AlignmentConfig(loop=LoopConfig(num_steps=1, sharded=True), memories=STORED)
