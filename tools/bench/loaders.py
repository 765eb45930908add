"""How fast are batches of packed rows made, here and elsewhere? Every loader in a fresh process, one after the other.

    python tools/bench/loaders.py [--root DIR] [--repeat 5] [--workers 0 1] [--loaders ours litdata] [--json]

The corpus is Python's standard library, a token for four bytes, so that lengths are those of real documents; loaders
give int64 rows of the same length, shuffled, from the same tokens. Peers that are not installed are left out: litdata
(`litdata`), MosaicML streaming (`mosaicml-streaming`). `gather` is no loader but a floor: one permuted gather from one
array, without documents, masks or checks.
"""

import argparse
import json
import os
import pickle
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

SEQ_LEN, ROWS, VOCAB, SEED = 1024, 8, 8192, 0


def corpus() -> Iterator[tuple[str, np.ndarray]]:
    """(name, token ids) of each module; 0 ends a document."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        text = path.read_bytes()
        words = np.frombuffer(text[: len(text) // 4 * 4], dtype=np.uint32)
        yield str(path), np.append(1 + words % (VOCAB - 1), 0).astype(np.uint16)


class Ours:
    """megatrain: documents masked from each other, every document checked, cursors with every batch."""

    needs = "megatrain"

    def __init__(self, root: Path, workers: int):
        from megatrain.data.config import Data, WeightedSource

        self.data = Data(sources=(WeightedSource(path=str(root / "ours")),), seq_len=SEQ_LEN, workers=workers)

    @staticmethod
    def prepare(root: Path, documents: list[tuple[str, np.ndarray]]) -> None:
        from megatrain.data.manifest import TRAIN, Manifest, Split, TokenizerEntry
        from megatrain.data.shards import ShardWriter

        entries = []
        for first in range(0, len(documents), 256):
            with ShardWriter(root / "ours", TRAIN, first // 256, "uint16") as writer:
                for name, tokens in documents[first : first + 256]:
                    writer.write(name, tokens, text_bytes=4 * len(tokens))
            entries.append(writer.entry)
        manifest = Manifest("bench", TokenizerEntry("0" * 64, VOCAB, 0), "uint16", {TRAIN: Split(tuple(entries))})
        manifest.write(root / "ours")

    def batches(self, state: Any) -> Iterator[Any]:
        from megatrain.data.feed import Feed

        for batch in Feed.open(self.data, seed=SEED, global_batch=ROWS, cursors=state):
            self.cursors = batch.cursors
            yield batch.tokens

    def state(self) -> Any:
        return self.cursors


class Gather:
    needs = "numpy"

    def __init__(self, root: Path, workers: int):
        self.path, self.at = root / "tokens.bin", 0

    @staticmethod
    def prepare(root: Path, documents: list[tuple[str, np.ndarray]]) -> None:
        np.concatenate([tokens for _, tokens in documents]).tofile(root / "tokens.bin")

    def batches(self, state: Any) -> Iterator[Any]:
        import torch

        tokens = np.memmap(self.path, dtype=np.uint16, mode="r")
        n = len(tokens) // (SEQ_LEN + 1)
        rows, order = tokens[: n * (SEQ_LEN + 1)].reshape(n, -1), np.random.default_rng(SEED).permutation(n)
        for self.at in range(state or 0, n // ROWS):
            yield torch.from_numpy(rows[order[self.at * ROWS :][:ROWS]].astype(np.int64))[:, :-1]

    def state(self) -> Any:
        return self.at + 1


class LitData:
    needs = "litdata"

    def __init__(self, root: Path, workers: int):
        self.folder, self.workers = str(root / "litdata"), workers

    @staticmethod
    def prepare(root: Path, documents: list[tuple[str, np.ndarray]]) -> None:
        import litdata

        litdata.optimize(
            fn=_tokens_of, inputs=[[t for _, t in documents[i : i + 256]] for i in range(0, len(documents), 256)],
            output_dir=str(root / "litdata"), num_workers=1, chunk_size=(SEQ_LEN + 1) * 2048,
            item_loader=litdata.TokensLoader(),
        )  # fmt: skip

    def batches(self, state: Any) -> Iterator[Any]:
        import litdata

        rows = litdata.TokensLoader(block_size=SEQ_LEN + 1)
        data = litdata.StreamingDataset(self.folder, item_loader=rows, shuffle=True, drop_last=True, seed=SEED)
        self.loader = litdata.StreamingDataLoader(data, batch_size=ROWS, num_workers=self.workers, drop_last=True)
        if state is not None:
            self.loader.load_state_dict(state)
        for batch in self.loader:
            yield batch.long()[:, :-1]

    def state(self) -> Any:
        return self.loader.state_dict()


def _tokens_of(documents: list[np.ndarray]) -> Iterator[Any]:
    import torch

    for tokens in documents:
        yield torch.from_numpy(tokens)


class Mosaic:
    needs = "streaming"

    def __init__(self, root: Path, workers: int):
        self.folder, self.workers = str(root / "mosaic"), workers

    @staticmethod
    def prepare(root: Path, documents: list[tuple[str, np.ndarray]]) -> None:
        _without_torchvision()
        from streaming import MDSWriter

        tokens = np.concatenate([tokens for _, tokens in documents])
        n = len(tokens) // (SEQ_LEN + 1)
        with MDSWriter(out=str(root / "mosaic"), columns={"tokens": "bytes"}, size_limit=1 << 22) as writer:
            for row in tokens[: n * (SEQ_LEN + 1)].reshape(n, -1):
                writer.write({"tokens": row.tobytes()})

    def batches(self, state: Any) -> Iterator[Any]:
        _without_torchvision()
        import torch
        from streaming import StreamingDataLoader, StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()

        class Rows(StreamingDataset):
            def __getitem__(self, index: Any) -> Any:
                row = np.frombuffer(super().__getitem__(index)["tokens"], dtype=np.uint16)
                return torch.from_numpy(row.astype(np.int64))

        data = Rows(local=self.folder, shuffle=True, shuffle_seed=SEED, batch_size=ROWS, num_canonical_nodes=1)
        self.loader = StreamingDataLoader(data, batch_size=ROWS, num_workers=self.workers, drop_last=True)
        if state is not None:
            self.loader.load_state_dict(state)
        for batch in self.loader:
            yield batch[:, :-1]

    def state(self) -> Any:
        return self.loader.state_dict()


def _without_torchvision() -> None:
    """MosaicML streaming imports torchvision for its image data sets; empty modules will do for text."""
    if "torchvision" in sys.modules or find_spec("torchvision"):
        return
    needed = {"": {}, ".transforms": {}, ".transforms.functional": {"to_tensor": None}, ".datasets": {},
              ".datasets.folder": {"default_loader": None}, ".datasets.vision": {"VisionDataset": object}}  # fmt: skip
    for suffix, names in needed.items():
        module = types.ModuleType(f"torchvision{suffix}")
        module.__spec__ = ModuleSpec(module.__name__, None)
        module.__path__ = []
        vars(module).update(names, VisionDataset=object)
        sys.modules[module.__name__] = module


LOADERS = {"ours": Ours, "litdata": LitData, "mosaic": Mosaic, "gather": Gather}


def cpu_seconds() -> float:
    return sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def measure(name: str, root: Path, workers: int, n_batches: int) -> dict[str, Any]:
    """One loader in this process: speed, then a state to resume from."""
    import torch

    torch.set_num_threads(1)
    loader = LOADERS[name](root, workers)
    batches = loader.batches(None)
    for _ in range(5):
        batch = next(batches)
    assert batch.shape == (ROWS, SEQ_LEN), batch.shape
    assert batch.dtype == torch.int64
    began, cpu, n = time.perf_counter(), cpu_seconds(), 0
    for _ in batches:
        n += 1
        if n == n_batches:
            break
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    (root / f"state-{name}-{workers}").write_bytes(pickle.dumps(loader.state()))
    tokens = n * ROWS * SEQ_LEN
    return {"tokens_per_second": tokens / seconds, "tokens_per_cpu_second": tokens / cpu, "batches": n}


def resume(name: str, root: Path, workers: int) -> dict[str, Any]:
    """Seconds from a saved state to its first batch; imports are not counted."""
    import torch  # noqa: F401

    loader = LOADERS[name](root, workers)
    state = pickle.loads((root / f"state-{name}-{workers}").read_bytes())
    next(LOADERS[name](root, 0).batches(None))  # what is imported and warmed up once is not what is asked
    began = time.perf_counter()
    next(loader.batches(state))
    return {"resume_seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="where the data is written; kept if given")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--loaders", nargs="+", default=list(LOADERS), choices=list(LOADERS))
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        what, name, workers = options.one
        if what == "prepare":
            LOADERS[name].prepare(options.root, list(corpus()))
        elif what == "measure":
            print(json.dumps(measure(name, options.root, int(workers), options.batches)), flush=True)
        else:
            print(json.dumps(resume(name, options.root, int(workers))), flush=True)
        sys.stdout.flush()
        os._exit(0)  # what the libraries do at exit is not measured
    root = options.root or Path(tempfile.mkdtemp(prefix="loaders-"))
    try:
        compare(root, options)
    finally:
        if not options.root:
            shutil.rmtree(root)


def compare(root: Path, options: argparse.Namespace) -> None:
    root.mkdir(exist_ok=True)
    names = [name for name, loader in LOADERS.items() if name in options.loaders and find_spec(loader.needs)]
    for name in names:
        if not (root / f"ready-{name}").exists():
            run(root, options, "prepare", name, 0)
            (root / f"ready-{name}").touch()
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(options.repeat):  # interleaved, so that a busy machine is busy for all
        for workers in options.workers:
            for name in names:
                one = run(root, options, "measure", name, workers) | run(root, options, "resume", name, workers)
                found.setdefault((name, workers), []).append(one)
    for (name, workers), runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        if options.json:
            print(json.dumps({"loader": name, "workers": workers} | middle))
            continue
        ratio = statistics.median(
            ours["tokens_per_second"] / run["tokens_per_second"]
            for ours, run in zip(found["ours", workers], runs, strict=True)
        )
        print(
            f"{name:8s} workers {workers}: {middle['tokens_per_second'] / 1e6:6.1f}M tokens/s "
            f"({middle['tokens_per_cpu_second'] / 1e6:6.1f}M per CPU second), resume {middle['resume_seconds']:.3f} s, "
            f"ours is {ratio:.2f} times as fast"
        )


def run(root: Path, options: argparse.Namespace, what: str, name: str, workers: int) -> dict[str, Any]:
    words = ["--root", str(root), "--batches", str(options.batches), "--one", what, name, str(workers)]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, timeout=900)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or (what != "prepare" and not lines):
        sys.exit(f"{what} {name}: {done.stderr[-2000:]}")
    return json.loads(lines[-1]) if lines else {}


if __name__ == "__main__":
    main()
