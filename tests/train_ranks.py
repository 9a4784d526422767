"""One of several processes that train together, for the tests of the loop: python -m tests.train_ranks OUT.json."""

import json
import os
import sys
from pathlib import Path

from model.training.loop import StepReport, run_training
from model.training.objective import LanguageObjective
from tests.test_training_loop import RepeatingSource, make_config, make_model


def main() -> None:
    """Trains some steps, and in the first process writes the losses and the norm of the weights."""
    out = Path(sys.argv[1])
    checkpoint = make_model()
    reports: list[StepReport] = []
    objective = LanguageObjective(checkpoint)
    run_training(objective, RepeatingSource(), make_config(), out.with_suffix(""), report=reports.append)
    if os.environ["RANK"] == "0":
        norm = sum(float(tensor.detach().double().square().sum()) for tensor in checkpoint.model.parameters()) ** 0.5
        told = {"losses": [told.loss for told in reports], "norm": norm, "processes": int(os.environ["WORLD_SIZE"])}
        out.write_text(json.dumps(told))


if __name__ == "__main__":
    main()
