"""Single operators on a fake card, watched: what each moves and computes, as JSON by name.

python -m tests.gpu_path.launches
"""

import dataclasses
import json
import warnings
from collections.abc import Callable
from typing import Any

from megatrain.audit import fake_cuda

fake_cuda.install()  # before torch

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from megatrain.audit.compiled import without_kernels  # noqa: E402
from megatrain.audit.generated import code_for  # noqa: E402
from megatrain.audit.roofline import H100  # noqa: E402
from megatrain.audit.watch import Watch  # noqa: E402

CARD = dataclasses.replace(H100, shortest=0.0)


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def adamw(scaled: bool) -> Callable[[], Any]:
    lists = [[tensor(1000, dtype=torch.float32)] for _ in range(4)]
    steps = [torch.zeros((), device="cuda")]
    given = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8}
    scale = torch.ones((), device="cuda") if scaled else None
    return lambda: torch._fused_adamw_(*lists, [], steps, **given, amsgrad=False, maximize=False, grad_scale=scale)


def attention(causal: bool) -> Callable[[], Any]:
    q, k = tensor(2, 8, 4096, 64).requires_grad_(), tensor(2, 4, 4096, 64).requires_grad_()

    def run() -> None:
        y = torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=causal, enable_gqa=True)
        y.backward(torch.empty_like(y))

    return run


def operators() -> dict[str, Callable[[], Any]]:
    a, b, total, rows = tensor(32, 16), tensor(16, 8), tensor(32, 8, dtype=torch.float32), tensor(100, 10)
    places = torch.zeros(7, dtype=torch.int64, device="cuda")
    return {
        "mm": lambda: a @ b,
        "mm into": lambda: torch.mm(a, b, out=tensor(32, 8)),
        "addmm": lambda: torch.addmm(total, a, b, out_dtype=torch.float32, out=total),
        "copy_": lambda: tensor(50).copy_(tensor(50, dtype=torch.float32)),
        "foreach_copy_": lambda: torch._foreach_copy_([tensor(50)], [tensor(50, dtype=torch.float32)]),
        "add_": lambda: tensor(50).add_(tensor(50)),
        "broadcast": lambda: tensor(50, 1).expand(50, 40) * tensor(50, 40),
        "embedding": lambda: torch.nn.functional.embedding(places, rows),
        "index_add_": lambda: rows.index_add_(0, places, tensor(7, 10)),
        "adamw": adamw(False),
        "adamw scaled": adamw(True),
        "attention": attention(False),
        "attention causal": attention(True),
        "view": lambda: a.view(16, 32).T,
        "on the CPU": lambda: torch.empty(3, 3) @ torch.empty(3, 3),
        "compiled": lambda: torch.compile(lambda x, y: (x + y).relu() * 2, fullgraph=True)(
            tensor(64, 64), tensor(64, 64)
        ),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    found = {}
    with FakeTensorMode(allow_non_fake_inputs=True), fake_cuda.card(), code_for(), without_kernels():
        for name, run in operators().items():
            watch = Watch(roofline=CARD)
            with watch:
                run()
            costs = watch.costs
            names = [n for n in costs.operators if "empty" not in n]
            found[name] = {
                "launches": costs.launches,
                "names": names,
                "moved": costs.bytes_moved,
                "seconds": {n: costs.seconds[n] for n in names},
                "peak": watch.memory.peak,
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
