"""Attention over some of the keys on a fake card, forward and backward: which kernels run and what they give, as JSON.

python -m tests.gpu_path.parts
"""

import json
from typing import Any

from megatrain.audit import fake_cuda

fake_cuda.install()  # before torch

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from megatrain.nn.attention.kernel import attend_part, attend_part_backward  # noqa: E402

HEAD_DIM = 64


class Kernels(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if "attention" in str(op):
            self.seen.append(str(op.overloadpacket).removeprefix("aten._scaled_dot_product_"))
        return op(*args, **(kwargs or {}))


def look(dtype: torch.dtype, masked: bool, h: int, g: int, t: int, s: int) -> dict[str, Any]:
    q = torch.empty(2, h, t, HEAD_DIM, dtype=dtype, device="cuda")
    k, v = (torch.empty(2, g, s, HEAD_DIM, dtype=dtype, device="cuda") for _ in range(2))
    mask = torch.ones(2, 1, t, s, dtype=torch.bool, device="cuda") if masked else None
    with Kernels() as kernels:
        y, lse = attend_part(q, k, v, mask, causal=False)
        grads = attend_part_backward(torch.empty_like(y), q, y, lse, k, v, mask, causal=False)
    right = y.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
    right &= all(a.shape == b.shape and a.dtype == dtype for a, b in zip(grads, (q, k, v), strict=True))
    return {"kernels": kernels.seen, "right": right, "half": dtype.itemsize == 2, "masked": masked}


if __name__ == "__main__":
    with FakeTensorMode(), fake_cuda.card():
        for dtype in (torch.bfloat16, torch.float32):
            for masked in (False, True):
                for sizes in ((4, 2, 40, 24), (4, 4, 33, 33)):
                    print(json.dumps(look(dtype, masked, *sizes)))
