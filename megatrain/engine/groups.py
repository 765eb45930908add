"""Process groups for engines that need them even of a single rank."""

import torch.distributed as dist

from megatrain.parallel.mesh import Mesh


def connected(mesh: Mesh) -> Mesh:
    """The mesh with process groups; a process that stands alone gets a group of its own."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return mesh if mesh.groups else mesh.connect()
