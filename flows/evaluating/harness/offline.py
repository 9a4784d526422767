"""No network for the lm-evaluation-harness: what it is built on would else look for every data set on the hub.

Imports nothing of it, since some of its libraries look at the environment when they are imported.
"""

import importlib.util
import logging
import os
import sys

from schemas.errors import InputError

OFFLINE = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
"""What tells the libraries under the harness that nothing is to be downloaded."""


def go_offline() -> None:
    """Keeps the libraries under the harness from the network, those that are loaded already as well.

    Raises:
        InputError: the harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("the lm-evaluation-harness is not installed; run: pip install 'memory3[eval]'")
    # The harness has bars of its own, which would be drawn over those of this project.
    os.environ |= OFFLINE | {"TQDM_DISABLE": "1"}
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    config = sys.modules.get("datasets.config")
    if config is not None:
        config.HF_HUB_OFFLINE = config.HF_DATASETS_OFFLINE = True  # type: ignore[attr-defined]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
