"""The state of a training run on a drive: weights and optimizer as safetensors, written whole or not at all.

    RUN/step-00000200/weights.safetensors     parameters and buffers by name
    RUN/step-00000200/optimizer.safetensors   the optimizer's tensors, "parameter:state"
    RUN/step-00000200/state.json              the step, the guard, what the run is; written last

A folder of a step appears under its name when it is complete. Sharded parameters (FSDP) are gathered, so that a run can
go on with another number of processes.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from schemas.atomic import replace_folder
from schemas.errors import InputError

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"

SAMPLED_NUMBERS = 64
"""Numbers of each tensor, at least this many where there are, by which a start is known again."""


def _gather(tensors: Iterator[tuple[str, torch.Tensor]], *, keeps: bool) -> dict[str, torch.Tensor]:
    """Returns whole tensors on the CPU, gathered from all processes where they are sharded.

    Args:
        tensors: the tensors by name.
        keeps: False for a process that only takes part, and gets none: not every process has room for all.
    """
    gathered = {}
    for name, tensor in tensors:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keeps:
            gathered[name] = whole.detach().to("cpu").contiguous()
    return gathered


def _copy_into(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Copies a whole tensor into one that may be sharded; all processes have the same whole one."""
    if isinstance(target, DTensor):
        whole = distribute_tensor(whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(whole)


def _list_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of an optimizer's state, by the name of their parameter and their own."""
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                yield f"{name}:{key}", value


def list_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields parameters, shared ones once, and the buffers that belong to the state."""
    yield from model.named_parameters()
    state = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in state:
            yield name, buffer


def describe_weights(model: nn.Module) -> str:
    """Returns a digest by which the weights that a run starts from are known again: names, shapes and some numbers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in list_weights(model):
        line = tensor.detach().reshape(-1)
        numbers = line[:: max(1, len(line) // SAMPLED_NUMBERS)].float().cpu().contiguous().numpy()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + numbers.tobytes())
    return digest.hexdigest()


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a file of tensors; a full drive is told as the operating system tells it."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error), str(path)) from error


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, the earliest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".tmp" and (path / STATE).is_file())


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], *, writes: bool
) -> Path:
    """Saves a run after ``step`` steps; every process calls it, and one writes.

    Args:
        folder: the run's folder.
        step: steps done.
        model: what is trained; its parameters are in float32.
        optimizer: its optimizer.
        state: what else the run needs to go on, as JSON.
        writes: True in the process that writes.
    """
    weights = _gather(list_weights(model), keeps=writes)
    tensors = _gather(_list_states(model, optimizer), keeps=writes)
    target = folder / f"step-{step:08d}"
    if not writes:
        return target
    with replace_folder(target) as temporary:
        _save_tensors(weights, temporary / WEIGHTS)
        _save_tensors(tensors, temporary / OPTIMIZER)
        (temporary / STATE).write_text(json.dumps({"step": step, **state}, indent=1))
    return target


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Returns what a checkpoint's run needs to go on, beside the tensors.

    Raises:
        InputError: the file is damaged.
    """
    try:
        state = json.loads((checkpoint / STATE).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{checkpoint / STATE} cannot be read: {error}; remove {checkpoint} to go on before it"
        ) from error
    kinds = {"step": int, "num_tokens": int, "run": dict, "guard": dict}
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        raise InputError(f"{checkpoint / STATE} is not the state of a run; remove {checkpoint} to go on before it")
    return state


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Puts the weights of a checkpoint in place.

    Raises:
        InputError: the file is damaged, or belongs to another model.
    """
    weights = _read_tensors(checkpoint, WEIGHTS)
    mine = dict(list_weights(model))
    shapes = {name: tuple(tensor.shape) for name, tensor in mine.items()}
    if {name: tuple(tensor.shape) for name, tensor in weights.items()} != shapes:
        different = sorted(weights.keys() ^ mine.keys())[:3] or "shapes"
        raise InputError(f"{checkpoint} is of another model ({different}); name another folder for this run")
    with torch.no_grad():
        for name, tensor in mine.items():
            _copy_into(tensor, weights[name])


def load_states(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts the optimizer's state of a checkpoint in place.

    Raises:
        InputError: the file is damaged.
    """
    tensors = _read_tensors(checkpoint, OPTIMIZER)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            prefix = f"{name}:"
            found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            for key, value in found.items():
                if value.ndim == 0:
                    optimizer.state[parameter][key] = value.to(parameter.device)
                    continue
                optimizer.state[parameter][key] = torch.zeros_like(parameter)
                _copy_into(optimizer.state[parameter][key], value)


def _read_tensors(checkpoint: Path, name: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(checkpoint / name)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{checkpoint} cannot be read: {error}; remove it to go on from the one before") from error


def remove_old_checkpoints(folder: Path, num_kept: int) -> None:
    """Removes all complete checkpoints but the last ones, and what an interrupted save has left."""
    for path in list_checkpoints(folder)[:-num_kept]:
        shutil.rmtree(path)
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
