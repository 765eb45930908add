"""How fast are batches of packed rows made, here and elsewhere? Every loader in a fresh process, one after the other.

    python tools/bench/loaders.py [--root DIR] [--repeat 5] [--workers 0 1] [--loaders ours litdata] [--out FILE]
    python tools/bench/loaders.py --loaders text webdataset        # raw text, tokenised on the fly

The corpus is Python's standard library, a token for four bytes, so that lengths are those of real documents; loaders
give int64 rows of the same length, shuffled, from the same tokens. Peers that are not installed are left out: litdata
(`litdata`), MosaicML streaming (`mosaicml-streaming`), Megatron's GPTDataset over its indexed data set
(`megatron-core`), and for raw text webdataset's tars with `tokenizers` by hand. `gather` is no loader but a floor: one
permuted gather from one array, without documents, masks or checks.
"""

import argparse
import dataclasses
import io
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


class Megatron:
    """GPTDataset over an IndexedDataset: document, sample and shuffle index; resume by the samples consumed."""

    needs = "megatron"

    def __init__(self, root: Path, workers: int):
        self.root, self.workers, self.at = root, workers, 0

    @staticmethod
    def prepare(root: Path, documents: list[tuple[str, np.ndarray]]) -> None:
        import torch
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        (root / "megatron" / "cache").mkdir(parents=True, exist_ok=True)
        builder = IndexedDatasetBuilder(str(root / "megatron" / "d.bin"), dtype=np.uint16)
        for _, tokens in documents:
            builder.add_document(torch.from_numpy(tokens.astype(np.int32)), [len(tokens)])
        builder.finalize(str(root / "megatron" / "d.idx"))

    def batches(self, state: Any) -> Iterator[Any]:
        import torch
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

        tokenizer = types.SimpleNamespace(vocab_size=VOCAB, eod=0, pad=VOCAB - 1, unique_identifiers={"of": "bench"})
        config = GPTDatasetConfig(
            random_seed=SEED, sequence_length=SEQ_LEN, blend=([str(self.root / "megatron" / "d")], None), split="1,0,0",
            path_to_cache=str(self.root / "megatron" / "cache"), tokenizer=tokenizer, reset_position_ids=False,
            reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        )  # fmt: skip
        data, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [None, 0, 0], lambda: True, config).build()
        order = [range(i * ROWS, (i + 1) * ROWS) for i in range(state or 0, len(data) // ROWS)]
        loader = torch.utils.data.DataLoader(data, batch_sampler=order, num_workers=self.workers)
        for at, batch in enumerate(loader, state or 0):
            self.at = at
            yield batch["tokens"]

    def state(self) -> Any:
        return self.at + 1


def texts() -> Iterator[str]:
    """The modules as text."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts:
            text = path.read_bytes().decode("utf-8", "ignore")
            if text.strip():
                yield text


def write_tars(folder: Path) -> None:
    """The modules as webdataset's tars, and a tokenizer."""
    import tarfile

    from megatrain.data.tokenizer import train_tokenizer

    folder.mkdir()
    found = list(texts())
    (folder.parent / f"{folder.name}.json").write_bytes(train_tokenizer(found[::8], VOCAB))
    for first in range(0, len(found), 128):
        with tarfile.open(folder / f"{first // 128:05d}.tar", "w") as tar:
            for number, text in enumerate(found[first : first + 128], first):
                header = tarfile.TarInfo(f"{number:07d}.txt")
                header.size = len(text.encode())
                tar.addfile(header, io.BytesIO(text.encode()))


class Text(Ours):
    """megatrain on raw text: what `ours` does, with documents made tokens as they are read."""

    def __init__(self, root: Path, workers: int):
        super().__init__(root, workers)
        source = type(self.data.sources[0])(path=str(root / "text"))
        self.data = dataclasses.replace(self.data, sources=(source,))

    @staticmethod
    def prepare(root: Path, documents: list[tuple[str, np.ndarray]]) -> None:
        from megatrain.data.text_index import IndexOptions, index

        write_tars(root / "text")
        index(IndexOptions(root / "text", root / "text.json", held_out=0.0))


class ByHand:
    """webdataset, a shuffle buffer, `tokenizers` on 32 documents at a time, rows cut from what comes."""

    needs = "webdataset"

    def __init__(self, root: Path, workers: int):
        self.root, self.workers = root, workers

    @staticmethod
    def prepare(root: Path, documents: list[tuple[str, np.ndarray]]) -> None:
        write_tars(root / "by-hand")

    def batches(self, state: Any) -> Iterator[Any]:
        import torch
        import webdataset
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.root / "by-hand.json"))

        def rows(samples: Any) -> Iterator[Any]:
            held, waiting = np.empty(0, dtype=np.int64), []
            for (text,) in samples:
                waiting.append(text)
                if len(waiting) < 32:
                    continue
                encoded = tokenizer.encode_batch_fast(waiting, add_special_tokens=False)
                held, waiting = np.concatenate([held, *(np.array([*one.ids, 0]) for one in encoded)]), []
                whole = len(held) // (SEQ_LEN + 1) * (SEQ_LEN + 1)
                for row in held[:whole].reshape(-1, SEQ_LEN + 1):
                    yield torch.from_numpy(row.copy())
                held = held[whole:]

        tars = sorted(str(path) for path in (self.root / "by-hand").glob("*.tar"))
        data = webdataset.WebDataset(tars, shardshuffle=100, seed=SEED, empty_check=False)
        data = data.decode().to_tuple("txt").shuffle(256, initial=256).compose(rows)
        for batch in torch.utils.data.DataLoader(data, batch_size=ROWS, num_workers=self.workers):
            yield batch[:, :-1]

    def state(self) -> Any:
        return None  # it has none: a resume begins anew


LOADERS = {"ours": Ours, "litdata": LitData, "mosaic": Mosaic, "megatron": Megatron, "gather": Gather}
ALL = LOADERS | {"text": Text, "webdataset": ByHand}


def cpu_seconds() -> float:
    """Of this process and those that it started, which may still be at work."""
    import psutil

    ended = sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return ended + sum(t.user + t.system for t in times)


def measure(name: str, root: Path, workers: int, n_batches: int) -> dict[str, Any]:
    """One loader in this process: speed, then a state to resume from."""
    import torch

    torch.set_num_threads(1)
    loader = ALL[name](root, workers)
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


def lockstep(names: list[str], root: Path, cycles: int, n_batches: int, out: Path | None) -> None:
    """All loaders in this process without workers, some batches each in turn: fair on a machine that is shared."""
    import torch

    torch.set_num_threads(1)
    running: dict[str, Iterator[Any]] = {}
    found: dict[str, list[float]] = {name: [] for name in names}
    for cycle in range(-2, cycles):  # the first two warm up
        for name in names[cycle % len(names) :] + names[: cycle % len(names)]:  # nobody always comes after the same one
            began = time.process_time()
            for _ in range(n_batches):
                if name not in running or next(running[name], None) is None:
                    running[name] = ALL[name](root, 0).batches(None)
                    next(running[name])
            if cycle >= 0:
                found[name].append(n_batches * ROWS * SEQ_LEN / (time.process_time() - began))
    for name in names:
        if out:
            with open(out, "a") as file:
                file.write(json.dumps({"loader": name, "lockstep": found[name]}) + "\n")
        ratios = statistics.quantiles((a / b for a, b in zip(found[names[0]], found[name], strict=True)), n=4)
        print(
            f"{name:10s} {statistics.median(found[name]) / 1e6:6.1f}M tokens per CPU second, {names[0]} is "
            f"{ratios[1]:.2f} [{ratios[0]:.2f} {ratios[2]:.2f}] times as fast"
        )


def resume(name: str, root: Path, workers: int) -> dict[str, Any]:
    """Seconds from a saved state to its first batch; imports are not counted."""
    import torch  # noqa: F401

    loader = ALL[name](root, workers)
    state = pickle.loads((root / f"state-{name}-{workers}").read_bytes())
    next(ALL[name](root, 0).batches(None))  # what is imported and warmed up once is not what is asked
    began = time.perf_counter()
    next(loader.batches(state))
    return {"resume_seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="where the data is written; kept if given")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--loaders", nargs="+", default=list(LOADERS), choices=list(ALL))
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--lockstep", type=int, default=0, metavar="CYCLES", help="one process, no workers, in turns")
    parser.add_argument("--out", type=Path, help="a file that each measurement is appended to, as a JSON line")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        what, name, workers = options.one
        if what == "prepare":
            ALL[name].prepare(options.root, list(corpus()))
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
    names = [name for name, loader in ALL.items() if name in options.loaders and find_spec(loader.needs)]
    for name in names:
        if not (root / f"ready-{name}").exists():
            run(root, options, "prepare", name, 0)
            (root / f"ready-{name}").touch()
    if options.lockstep:
        return lockstep(names, root, options.lockstep, options.batches, options.out)
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(options.repeat):  # interleaved, so that a busy machine is busy for all
        for workers in options.workers:
            for name in names:
                one = run(root, options, "measure", name, workers) | run(root, options, "resume", name, workers)
                found.setdefault((name, workers), []).append(one)
                if options.out:
                    with open(options.out, "a") as file:
                        file.write(json.dumps({"loader": name, "workers": workers} | one) + "\n")
    for (name, workers), runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        first = found[names[0], workers]
        ratio, per_cpu = (
            statistics.median(mine[key] / run[key] for mine, run in zip(first, runs, strict=True))
            for key in ("tokens_per_second", "tokens_per_cpu_second")
        )
        print(
            f"{name:10s} workers {workers}: {middle['tokens_per_second'] / 1e6:6.1f}M tokens/s "
            f"({middle['tokens_per_cpu_second'] / 1e6:6.1f}M per CPU second), resume {middle['resume_seconds']:.3f} s, "
            f"{names[0]} is {ratio:.2f} times as fast ({per_cpu:.2f} by CPU time)"
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
