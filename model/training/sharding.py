"""Sharded training (FSDP): every process holds a part of each parameter, of its gradient and of its optimizer state.

Where it stands: objective -> **sharded, in place** -> the loop -> whole again when the run is over. PyTorch's
``fully_shard`` gathers the parameters of a layer just before the layer is run, on the way forward and on the way back,
and drops them behind it; what it gathers for and reduces over is one call of the layer.

Two things follow. All processes must run the same layers in the same order, whatever they read:
:class:`model.training.objective.LanguageObjective` sees to it. And a layer must be run to its end: see
:func:`model.writing.encode_references`.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

MEMORY_ARGUMENT = "memory3"
"""The keyword by which layers are given what :mod:`model.attention` needs."""


class _Covered:
    """Holds an argument that is not to be looked into."""

    def __init__(self, content: Any) -> None:
        self.content = content


def _cover(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    covered = {name: _Covered(value) if name == MEMORY_ARGUMENT else value for name, value in kwargs.items()}
    return args, covered


def _uncover(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {name: value.content if isinstance(value, _Covered) else value for name, value in kwargs.items()}


def shard_objective(objective: nn.Module, device_type: str, num_processes: int, *, in_half: bool) -> None:
    """Shards what is to be trained over all processes, in place; each moves its part to its device.

    Parameters keep their names and become DTensors, each a part of its rows in every process. To be called before the
    optimizer is made, with the same weights in all processes.

    Args:
        objective: its layers are those of transformers; what is around them is gathered once a step.
        device_type: ``cpu`` or ``cuda``.
        num_processes: all there are.
        in_half: layers are gathered and run in bfloat16. Gradients are summed in float32, and what is around the
            layers stays in float32, as autocast has it for a model that is whole.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    mesh = init_device_mesh(device_type, (num_processes,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if in_half else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in [module for module in objective.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
        # FSDP looks for tensors in all arguments and rebuilds the dataclasses around them: a tap that collects the
        # keys and values of all layers would be another object in every layer, and lose them.
        layer.register_forward_pre_hook(_cover, prepend=True, with_kwargs=True)
        layer.register_forward_pre_hook(_uncover, with_kwargs=True)
    fully_shard(objective, mesh=mesh)


def gather_parameters(objective: nn.Module, *, keeps: bool) -> None:
    """Puts whole parameters in the place of sharded ones, on the CPU, to be saved; all processes must call it.

    The objective is not to be run afterwards.

    Args:
        objective: what was sharded.
        keeps: False for a process that only takes part, and keeps the parameters as they are.
    """
    whole: dict[nn.Parameter, nn.Parameter] = {}
    for parameter in objective.parameters():
        if isinstance(parameter, DTensor):
            gathered = parameter.full_tensor().detach()
            if keeps:
                whole[parameter] = nn.Parameter(gathered.cpu(), requires_grad=parameter.requires_grad)
    for module in objective.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter in whole:
                module.register_parameter(name, whole[parameter])
