"""One block compiled as training compiles it, traced on a fake card: what its graphs keep for backward, as JSON.

python -m tests.gpu_path.block configs/bench/gpu-1b.yaml [--packed] [--generated] [key=value ...]
"""

import copy
import json
import sys
import warnings
from typing import Any

from megatrain.audit import fake_cuda

fake_cuda.install()  # before torch

import torch  # noqa: E402
from functorch.compile import make_boxed_func  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch._functorch.partitioners import min_cut_rematerialization_partition  # noqa: E402
from torch._inductor.decomposition import select_decomp_table  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from megatrain.audit.generated import code_for, launches  # noqa: E402
from megatrain.models.recompute import INSIDE, recompute  # noqa: E402
from megatrain.nn.where import Where  # noqa: E402
from megatrain.train.config import read_run  # noqa: E402

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}


class Graphs:
    """A compiler's backend that looks at the graphs of forward and backward, and runs them as they are."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, int]] = []
        self.seen: list[tuple[torch.fx.GraphModule, list[Any]]] = []
        self.forwards = self.backwards = self.products_again = 0

    def backend(self) -> Any:
        return aot_autograd(
            fw_compiler=self._forward,
            bw_compiler=self._backward,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )

    def _forward(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.forwards += 1
        self.seen.append((copy.deepcopy(graph), list(inputs)))
        names = [str(node.target).removeprefix("aten.").split(".")[0] for node in graph.graph.nodes]
        self.attention = [name for name in names if "attention" in name]
        (outputs,) = next(node for node in graph.graph.nodes if node.op == "output").args
        nodes = [node for node in outputs[1:] if isinstance(node, torch.fx.Node)]
        kept = [node for node in nodes if isinstance(node.meta["val"], Tensor) and not _shared(node)]
        by_storage = {node.meta["val"].untyped_storage()._cdata: node for node in kept}
        self.kept = [(n.name, n.meta["val"].untyped_storage().nbytes()) for n in by_storage.values()]
        self.products = _products(graph)
        return make_boxed_func(graph.forward)

    def _backward(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.backwards += 1
        self.seen.append((copy.deepcopy(graph), list(inputs)))
        self.products_again = _products(graph) - 2 * self.products
        return make_boxed_func(graph.forward)


def _shared(node: torch.fx.Node) -> bool:
    """An input that all blocks have, or a weight, which is there anyway: all but the hidden states [b, t, d]."""
    return node.op == "placeholder" and node.meta["val"].dim() != 3


def _products(graph: torch.fx.GraphModule) -> int:
    return sum(getattr(node.target, "_overloadpacket", None) in PRODUCTS for node in graph.graph.nodes)


def main() -> None:
    warnings.simplefilter("ignore")
    path, *overrides = (word for word in sys.argv[1:] if not word.startswith("--"))
    run, packed = read_run(path, overrides).run, "--packed" in sys.argv
    rows, seq_len = run.layout.micro_batch, run.data.seq_len
    graphs = Graphs()
    with FakeTensorMode(allow_non_fake_inputs=True), fake_cuda.card():
        device = torch.device("cuda", 0)
        with device:
            model = run.model.build(n_valid=32_000, seq_len=seq_len)
        for p in model.parameters():
            p.data = p.data.to(torch.bfloat16)
        if run.layout.recompute in INSIDE:
            recompute(model.layers, run.layout.recompute)
        model.compile_blocks(graphs.backend())
        positions = torch.arange(seq_len, device=device).expand(rows, -1)
        where = Where(positions, torch.zeros(rows, seq_len, dtype=torch.int32, device=device))
        where.tables = run.model.position.prepare(positions, run.model.width_of_head)
        x = torch.empty(rows, seq_len, run.model.d_model, dtype=torch.bfloat16, device=device, requires_grad=True)
        y = x
        for name, most_documents in (("0", 3), ("1", 9), ("2", 20)):  # equal blocks share one graph, whatever the rows
            if packed:
                where.most_documents, where.by_documents = most_documents, True
                where.mask = run.model.attention.prepare(where)
            y = model.layers[name](y, where)
        y.sum().backward()
    generated = {}
    if "--generated" in sys.argv:
        with fake_cuda.card(), code_for():
            generated = {name: launches(*seen) for name, seen in zip(("forward", "backward"), graphs.seen, strict=True)}
    print(
        json.dumps(
            {
                "forwards": graphs.forwards,
                "backwards": graphs.backwards,
                "kept_bytes": sum(size for _, size in graphs.kept),
                "kept": graphs.kept,
                "attention": graphs.attention,
                "generated": generated,
                "products_again": graphs.products_again,
            }
        )
    )


if __name__ == "__main__":
    main()
