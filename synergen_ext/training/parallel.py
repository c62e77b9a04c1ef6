"""Sharded training (FSDP2): every process holds a part of each weight, and a layer is whole only while it works."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ..model import SynerGenVL
from .recipe import ParallelRecipe, Recipe
from .world import World


def check_shares(recipe: Recipe, processes: int) -> None:
    """Whether a step's rows and the model can be shared by so many processes.

    Raises:
        ValueError: they cannot, with the number that does not fit.
    """
    parallel = recipe.parallel
    parts = processes * parallel.accumulate
    of = f"the {processes} processes" + (f" x {parallel.accumulate} of accumulate" if parallel.accumulate > 1 else "")
    for stage in recipe.stages:
        for task in ("paint", "describe", "text"):
            if getattr(stage, task) % parts:
                raise ValueError(
                    f"recipe: stage {stage.name!r}: {task} must be a multiple of {of}, got {getattr(stage, task)}"
                )
    if parallel.kind == "hsdp" and processes > 1 and processes % parallel.shard:
        raise ValueError(f"recipe: parallel: shard must divide the {processes} processes, got {parallel.shard}")


@functools.cache
def _mesh(kind: str, shard: int, size: int, group: object) -> DeviceMesh:
    """Made once for a process group: every mesh brings groups of its own."""
    if kind == "fsdp":
        return init_device_mesh("cpu", (size,), mesh_dim_names=("shard",))
    return init_device_mesh("cpu", (size // shard, shard), mesh_dim_names=("replicate", "shard"))


def shard(model: SynerGenVL, parallel: ParallelRecipe, world: World) -> bool:
    """Replace the weights, equal in all processes, by this process's parts, layer by layer; False: nothing to do."""
    if not parallel.sharded or world.size == 1:
        return False
    mesh = _mesh(parallel.kind, parallel.shard, world.size, dist.group.WORLD)
    for block in [*model.layers, *model.unfolding_head.layers]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return True


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def local(t: Tensor) -> Tensor:
    """This process's part of a weight, or all of it."""
    return t.to_local() if isinstance(t, DTensor) else t


def whole(t: Tensor) -> Tensor:
    """All of a weight or norm, in every process; all of them must ask."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def whole_state(model: nn.Module, world: World) -> dict[str, Tensor]:
    """The state dict with whole tensors in the first process, and nothing in the others; all of them must ask."""
    if not is_sharded(model):
        return dict(model.state_dict())
    state = {}
    for name, value in model.state_dict().items():
        full = whole(value)
        if world.rank == 0:
            state[name] = full
    return state


def anchor(model: SynerGenVL, text: bool, pictures: bool, painted: bool) -> Tensor:
    """Zero, with a gradient of zeros for every weight outside the layers that some process uses in this pass.

    The gradients of these weights are reduced as one, so all processes must bring the same ones, also a process
    whose rows have no picture or no target. The layers are used by all in any case. Call it after ``forward``.
    """
    total = torch.zeros(())
    for name, p in model.named_parameters():
        if not p.requires_grad or "layers." in name:
            continue
        used = True
        if name.startswith(("output.", "special_output.")):
            used = text
        elif name.startswith("image_embedding."):
            used = pictures
        elif name.startswith("unfolding_head."):
            used = painted
        if used:
            total = total + p.flatten()[:0].sum()
    return total
