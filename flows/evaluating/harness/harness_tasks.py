"""Which tasks of the lm-evaluation-harness are meant, and their data, which must be on this machine.

    names, YAML files, folders of these -> tasks and groups as the harness takes them

The harness is imported only when tasks are loaded.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from schemas.errors import InputError

FEWSHOT_SEED = 1234
"""Chooses the examples of a prompt; the harness's own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Which tasks are run, and on how much of them.

    Attributes:
        tasks: names of the harness, YAML files, or folders of these.
        include_path: a folder of YAML files whose names are known too.
        num_fewshot: examples in a prompt; None for what the task says.
        limit: documents of each task, or if below 1 the share of them; None for all.
        with_chat: put prompts through the model's chat template.
        with_samples: keep every request with its answer.
    """

    tasks: tuple[str, ...]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    with_chat: bool = False
    with_samples: bool = False

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: there is no task, a number is negative, or the folder is not there.
        """
        if not self.tasks:
            raise InputError("give a task with --tasks: a name of lm-eval, or a YAML file")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise InputError(f"evaluation: num_fewshot is {self.num_fewshot}, must be at least 0")
        if self.limit is not None and self.limit <= 0:
            raise InputError(f"evaluation: limit is {self.limit:g}, must be above 0")
        if self.include_path is not None and not self.include_path.is_dir():
            raise InputError(f"{self.include_path} is no folder; give one of YAML files with --include-path")


def load_tasks(options: TaskOptions) -> dict[str, Any]:
    """Loads tasks with their data, and sets how many examples their prompts have.

    Returns:
        Tasks and groups as the harness takes them.

    Raises:
        InputError: there is no such task, its file is none, or its data is not on this machine.
    """
    from datasets.exceptions import DatasetsError
    from yaml import YAMLError

    names = list_tasks(options.tasks)
    manager = _open_manager(options, names)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        try:
            found = manager.load([name])
        except KeyError as error:
            raise InputError(f"there is no task {name!r}; give a name that lm-eval knows, or a YAML file") from error
        except (OSError, DatasetsError) as error:
            raise InputError(
                f"the data of task {name!r} is not on this machine, and nothing is downloaded: give a task whose "
                f"dataset_path is json and whose data_files are local ({_shorten(error)})"
            ) from error
        except (YAMLError, ValueError, TypeError, AttributeError, ImportError) as error:
            raise InputError(f"task {name!r} cannot be loaded: {_shorten(error)}") from error
        for kind in loaded:
            loaded[kind] |= found[kind]
    for task in loaded["tasks"].values():
        # A task that says 0 means it: its prompts are complete.
        if options.num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=options.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def list_tasks(given: Sequence[str]) -> list[str]:
    """Returns the names and files that are meant: separated by commas, and the YAML files of folders.

    Raises:
        InputError: a folder has none.
    """
    names = []
    for name in (name.strip() for several in given for name in several.split(",")):
        if Path(name).is_dir():
            files = sorted(str(path) for path in Path(name).glob("*.yaml"))
            if not files:
                raise InputError(f"the folder {name} has no YAML file; give one with tasks")
            names += files
        elif name:
            names.append(name)
    return names


def _open_manager(options: TaskOptions, names: Sequence[str]) -> Any:
    """Returns what knows tasks: those of the harness, thousands of files, only where one of them may be meant."""
    from lm_eval.tasks import TaskManager

    include = None if options.include_path is None else str(options.include_path)
    manager = TaskManager(include_path=include, include_defaults=False)
    if all(name in manager.task_index or Path(name).is_file() for name in names):
        return manager
    return TaskManager(include_path=include)


def _shorten(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:199] + "…"
