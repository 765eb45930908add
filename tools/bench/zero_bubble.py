"""CPU time of a training pass whose weight gradients are deferred, beside one undivided backward.

    python tools/bench/zero_bubble.py                     # d_model 256, 2 blocks and a tied head, compiled and eager
    python tools/bench/zero_bubble.py --cycles 31

One process and one thread; the ways take turns, so that a busy machine slows them alike. F is the forward, B the
backward, W the deferred products; the last column is the median over cycles of all / compiled, undivided, with the
quartiles behind it.
"""

import argparse
import itertools
import statistics
import time

import torch

from megatrain.models.decoder import Decoder, DecoderModel
from megatrain.nn.batch import Batch
from megatrain.parallel.deferred import DeferredProduct, WeightGradientQueue, defer_weight_gradients
from megatrain.parallel.shard import initialise

WAYS = {  # compiled, deferred
    "compiled, undivided": (True, False),
    "compiled, deferred": (True, True),
    "eager, undivided": (False, False),
    "eager, deferred": (False, True),
}


class Way:
    """A model with the same weights as the others, and how its gradients are made."""

    def __init__(self, choice: Decoder, vocabulary: int, seq_len: int, compiled: bool, deferred: bool):
        self.model: DecoderModel = choice.build(n_valid=vocabulary, seq_len=seq_len)
        initialise(self.model, seed=0)
        self.queue: WeightGradientQueue | None = None
        self.products: list[DeferredProduct] = []
        if deferred:
            self.queue, self.products = defer_weight_gradients(self.model)
        if compiled:
            self.model.compile_blocks()

    def run(self, batch: Batch) -> list[float]:
        """CPU milliseconds of F, B and W."""
        self.model.zero_grad()
        marks = [time.thread_time()]
        for product in self.products:
            product.tap(*batch.tokens.shape, torch.float32, batch.tokens.device)
        loss, count = self.model(batch)
        marks.append(time.thread_time())
        (loss / count).backward()
        marks.append(time.thread_time())
        if self.queue is not None:
            self.queue.take()()
        marks.append(time.thread_time())
        return [(b - a) * 1e3 for a, b in itertools.pairwise(marks)]


def rows(n: int, seq_len: int, vocabulary: int) -> Batch:
    tokens = torch.randint(0, vocabulary, (n, seq_len + 1), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(seq_len).expand(n, -1)
    documents = torch.zeros(n, seq_len, dtype=torch.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(n, seq_len), positions, documents, most_documents=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"d_model": 256, "n_layers": 2, "seq_len": 256, "rows": 2, "vocabulary": 4096, "cycles": 15}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    choice = Decoder(d_model=args.d_model, n_layers=args.n_layers, n_heads=args.d_model // 64, d_ff=args.d_model * 3)
    ways = {name: Way(choice, args.vocabulary, args.seq_len, *how) for name, how in WAYS.items()}
    batch = rows(args.rows, args.seq_len, args.vocabulary)
    times: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    for cycle in range(args.cycles + 2):  # two to compile and to warm up
        for name, way in ways.items():
            found = way.run(batch)
            if cycle > 1:
                times[name].append(found)
    base, *others = ways.values()
    for name, p in base.model.named_parameters():
        for other in others:
            torch.testing.assert_close(other.model.get_parameter(name).grad, p.grad, rtol=1e-4, atol=1e-6)
    print(f"{args}\n{'CPU ms':22s} {'F':>8s} {'B':>8s} {'W':>8s} {'all':>8s}   all / compiled, undivided")
    undivided = [sum(t) for t in times["compiled, undivided"]]
    for name, found in times.items():
        medians = [statistics.median(column) for column in zip(*found, strict=True)]
        ratios = [sum(t) / u for t, u in zip(found, undivided, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        columns = " ".join(f"{m:8.2f}" for m in [*medians, statistics.median(map(sum, found))])
        print(f"{name:22s} {columns}   {middle:.3f} [{low:.3f} {high:.3f}]")


if __name__ == "__main__":
    main()
