"""Is it cheaper for the ranks of a tensor-parallel group to read the same rows each, or to be handed them by one?

    python tools/bench/group_read.py DATA [--rows 8] [--seq-len 4096] [--ranks 2] [--batches 60]

DATA is a folder of token shards. Both in CPU time of a rank a batch, on one machine: filling the rows from shards in
the page cache, and a gloo broadcast of the five tensors of the batch.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatrain.data.config import Data, WeightedSource
from megatrain.data.rows import empty
from megatrain.data.stream import Order, Stream


def measure(rank: int, ranks: int, store: str, options: argparse.Namespace) -> None:
    """One rank's figures, printed as a JSON line."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    data = Data(sources=(WeightedSource(path=options.data),), seq_len=options.seq_len, workers=0)
    stream, arrays = Stream(Order(data, 0, options.rows)), empty(options.rows, options.seq_len)
    tensors = [torch.from_numpy(array) for array in arrays.values()]
    found: dict[str, list[float]] = {"read": [], "handed": []}
    for _ in range(7):
        for name, one in (
            ("read", lambda: stream.fill(arrays)),
            ("handed", lambda: [dist.broadcast(t, 0) for t in tensors]),
        ):
            dist.barrier()
            began = time.process_time()
            for _ in range(options.batches):
                one()
            found[name].append((time.process_time() - began) / options.batches * 1e6)
    print(json.dumps({"rank": rank} | {f"{k}_us": round(statistics.median(v)) for k, v in found.items()}), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    for name, default in (("rows", 8), ("seq-len", 4096), ("ranks", 2), ("batches", 60)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [
            multiprocessing.get_context("spawn").Process(target=measure, args=(rank, options.ranks, store, options))
            for rank in range(options.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()


if __name__ == "__main__":
    main()
