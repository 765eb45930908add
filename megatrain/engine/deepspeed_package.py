"""The package deepspeed, called as `engine/kinds/deepspeed.py` wants it: the only file that imports it."""

import logging
import os
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import nn

from megatrain.base.device import Device
from megatrain.parallel.mesh import Mesh

BUCKET_ELEMENTS = 2**26
"""Most elements that DeepSpeed reduces or gathers at a time."""


def imported(device: Device) -> ModuleType:
    """The package, quiet, told of our device, and kept from compiling anything.

    On CPU it would build a shared-memory communication op at every first start; a process that is killed meanwhile
    leaves a lock behind on which all later ones hang.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.kind)
    os.environ.setdefault("LOCAL_RANK", str(device.index))  # it reads its device from nowhere else
    logging.disable(logging.WARNING)  # while it is imported it speaks before it can be told not to
    try:
        import deepspeed
    finally:
        logging.disable(logging.NOTSET)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r".*is deprecated\. Please use", FutureWarning)  # its calls, not the user's
    deepspeed.ops.__compatible_ops__ = {}  # so it need not ask a compiler what could be built either
    return deepspeed


class Groups:
    """Our mesh as DeepSpeed asks for it (its `mpu`). For it, model parallel is everything that is not data: tp x pp.

    It must not have an attribute `initialize_sequence_parallel`, which would switch off sums over model-parallel ranks.
    """

    def __init__(self, mesh: Mesh):
        self.data, self.model, self.tp, self.pp = (mesh.axis(name) for name in ("data", "model", "tp", "pp"))

    def get_data_parallel_group(self) -> Any:
        return self.data.group

    def get_data_parallel_world_size(self) -> int:
        return self.data.size

    def get_data_parallel_rank(self) -> int:
        return self.data.rank

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self.data.ranks)

    def get_model_parallel_group(self) -> Any:
        return self.model.group

    def get_model_parallel_world_size(self) -> int:
        return self.model.size

    def get_model_parallel_rank(self) -> int:
        return self.model.rank

    def get_tensor_model_parallel_group(self) -> Any:
        return self.tp.group

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.tp.size

    def get_tensor_model_parallel_rank(self) -> int:
        return self.tp.rank

    def get_pipeline_model_parallel_group(self) -> Any:
        return self.pp.group

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self.pp.size

    def get_pipeline_model_parallel_rank(self) -> int:
        return self.pp.rank


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh, device: Device, config: dict) -> Any:
    """A DeepSpeed engine that takes one step at a time and neither measures nor clips the gradient."""
    deepspeed = imported(device)
    common = {
        "train_micro_batch_size_per_gpu": 1,  # it only counts samples with these two
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=common | config, mpu=Groups(mesh))
    if config["zero_optimization"]["stage"] == 3:
        _keep_from_measuring(engine.optimizer)
    return engine


def _keep_from_measuring(optimizer: Any) -> None:
    """Stage 3 cannot be told not to take norms as the others can. It sums them over model-parallel ranks, a collective
    for each group of its optimiser, and hangs where the stages of a pipeline have different numbers of groups."""
    if not hasattr(optimizer, "_get_norm_groups"):
        raise RuntimeError("this deepspeed takes norms elsewhere: install a version that pyproject.toml allows")
    optimizer._get_norm_groups = lambda: [0.0]


def keep_compiled_blocks_whole(model: nn.Module, device: Device) -> None:
    """Tell stage 3 to gather a compiled block at once: its hooks inside would break the graph."""
    compiled = {type(module) for module in model.modules() if "forward" in vars(module)}
    if compiled:
        imported(device).utils.set_z3_leaf_modules(model, list(compiled))


def zero_config(
    stage: int, bf16: bool, persistent_below: int, n_parameters: int, *, once: bool = False
) -> dict[str, Any]:
    """DeepSpeed's configuration of a stage. It ignores mistyped keys, so the precision tests are what checks these.

    Args:
        once: gradients are summed by autograd and reduced once a step.
    """
    bucket = max(1, min(BUCKET_ELEMENTS, n_parameters))
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    config: dict[str, Any] = {"zero_optimization": zero}
    if stage < 3:
        zero["compute_grad_norm"] = False
    else:
        zero["stage3_param_persistence_threshold"] = persistent_below
        zero["sub_group_size"] = max(1, n_parameters)  # so that a group of the optimiser is stepped on in one go
    if bf16:
        config |= {"bf16": {"enabled": True, "check_grad_overflow": False}, "communication_data_type": "fp32"}
        if once:  # its contiguous buffers have the parameters' format
            zero["contiguous_gradients"] = False
        else:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
