"""Decoders of the transformers library to checkpoints of ours, and back: tensor by tensor, then checked by logits."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatrain.base.errors import CheckpointError, ConfigError, DataError, FailedCheckpointError, did_you_mean
from megatrain.base.files import write_json
from megatrain.base.log import log, warn
from megatrain.checkpoint.compare import differences
from megatrain.checkpoint.manifest import digest_of
from megatrain.checkpoint.model import config_of, model_choice, shapes_of, trained_here
from megatrain.checkpoint.read import Commit, Reader, find, only_weights
from megatrain.checkpoint.storage import LocalStorage, new_place, refusal
from megatrain.checkpoint.stream import FILE_BYTES, Named, bytes_of, write_checkpoint
from megatrain.checkpoint.tensorfile import Entry, encode_header
from megatrain.checkpoint.tokenizer import tokenizer_of
from megatrain.convert.check import TOLERANCE, OtherSide, Report, compare
from megatrain.convert.families import FAMILY
from megatrain.convert.folder import CONFIG, INDEX, SIDE_FILES, SINGLE, WEIGHTS, Folder
from megatrain.convert.mapping import converted_from, family_for, rows_of, sizes_of
from megatrain.convert.table import Row, Theirs
from megatrain.data.manifest import TOKENIZER
from megatrain.data.tokenizer import Tokenizer, with_in_front

REPORT = "conversion.json"
SHARD_BYTES = 4 * 2**30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_WORDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


# ------------------------------------------------------------------------------------------------ from theirs


def from_hugging_face(folder: str | Path, out: str | Path, *, check: bool = True) -> Report:
    """Make a checkpoint of weights from the model in `folder`; `generate` and `checkpoint.init_from` take it.

    Every value keeps its bits. Memory holds the tensors of one file at a time.

    Raises:
        CheckpointError: the model is of no family here or cannot be ours, a tensor is missing or left over, or the
            logits differ (what was made is then in `out`.failed).
    """
    return convert_in(Folder(folder), Path(out), check)


def convert_in(theirs: Folder, out: Path, check: bool) -> Report:
    """What all ways in have in common, once their names and config can be read."""
    out = new_place(out)
    kind = theirs.config["model_type"]
    if kind not in FAMILY:
        raise CheckpointError(f"{theirs.path} is a {kind!r} model: {did_you_mean(kind, FAMILY.kinds())}")
    family = FAMILY[kind]()
    read = Theirs(theirs.config)
    try:
        section = family.model(read)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise CheckpointError(
            f"{theirs.home / CONFIG} has a value that no {kind} model has ({type(error).__name__}: {error})"
        ) from error
    seq_len = read.get("max_position_embeddings", read.get("n_positions", 2048))
    if type(seq_len) is not int or seq_len < 1:
        raise CheckpointError(f"{theirs.home / CONFIG} is for rows of {seq_len!r} tokens: it must be 1 or more")
    read.finish(kind)
    choice = model_choice(section, str(theirs.home / CONFIG))
    if choice.n_layers > len(theirs.names):  # so many rows could fill the memory
        raise CheckpointError(
            f"{theirs.home / CONFIG} speaks of {choice.n_layers} layers, and {theirs.path} holds {len(theirs.names)} "
            "tensors: one of them is not of this model"
        )
    rows = rows_of(family, choice)
    theirs.rename(family.prefix, family.untied)
    _refuse_other_tensors(theirs, family, choice, rows)
    side = theirs.side_files()
    written = write_checkpoint(
        out,
        ours(theirs, rows, choice, shapes_of(choice, section["vocab_size"], seq_len)),
        step=0,
        state=None,
        facts={
            "config": {"model": section, "data": {"seq_len": seq_len, "sources": []}},
            "tokenizer": _tokenizer_entry(side, theirs),
            "lineage": [{"step": 0, "converted": str(theirs.path), "family": kind, "config": read.kept()}],
        },
        file_bytes=min(theirs.largest_file or FILE_BYTES, FILE_BYTES),
        beside=side,
    )
    return proven(out, check, written, theirs, kind, str(theirs.path), str(out), None)


def _refuse_other_tensors(theirs: Folder, family: Any, choice: Any, rows: list[Row]) -> None:
    needed = {name for row in rows for name in row.theirs}
    problems = [f"{name} is missing" for name in sorted(needed) if name not in theirs]
    if choice.tie_embeddings and family.untied in theirs:
        needed.add(family.untied)
        (embedding,) = next(row.theirs for row in rows if row.ours == "embedding.weight")
        if embedding in theirs and not torch.equal(theirs.read(family.untied), theirs.read(embedding)):
            problems.append(f"{family.untied} differs from {embedding}, and the config says that they are tied")
    problems += [f"{name} is in no row of the table" for name in theirs.unused(needed, family.left_out)]
    if problems:
        n = len(problems)
        more = [f"and {n - 20} more"] if n > 20 else []
        raise CheckpointError(
            "\n".join([f"{theirs.path} does not hold the tensors of its config:", *problems[:20], *more])
        )


class Source(Protocol):
    """Another project's tensors, by its names."""

    path: Path

    @property
    def moments(self) -> tuple[str, ...]: ...

    def read(self, name: str, state: str = WEIGHTS) -> Tensor: ...


def ours(theirs: Source, rows: list[Row], choice: Any, shapes: dict[str, tuple[int, ...]]) -> Iterator[Named]:
    """Our tensors, one after the other as they are asked for.

    Raises:
        CheckpointError: they do not make the model of these `shapes`.
    """
    sizes = sizes_of(choice)
    for state in (WEIGHTS, *theirs.moments):
        made = {}
        for row in rows:
            tensor = row.join([theirs.read(name, state) for name in row.theirs], sizes)
            made[row.ours] = tuple(tensor.shape)
            if problems := differences(made, {name: shapes.get(name, ()) for name in made}):
                raise CheckpointError(f"{theirs.path}: {', '.join(row.theirs)} do not fit: {problems[0]}")
            yield state, row.ours, tensor
        if problems := differences(made, shapes):
            raise CheckpointError("\n".join([f"{theirs.path} does not make the model of its config:", *problems]))


def _tokenizer_entry(side: dict[str, bytes], theirs: Folder) -> dict[str, Any] | None:
    """Fingerprint of the tokenizer, and the id that ends a document: the model's own word for it."""
    if TOKENIZER not in side:
        return None
    end: Any = theirs.config.get("eos_token_id")
    if isinstance(end, list):
        end = end[0] if end else None
    if end is not None and (type(end) is not int or end < 0):
        raise CheckpointError(f"{theirs.home / CONFIG}: eos_token_id is {end!r}: it must be a whole number from 0 on")
    tokenizer = Tokenizer.parse(side[TOKENIZER], str(theirs.path / TOKENIZER), end)
    return {"fingerprint": digest_of(side[TOKENIZER]), "end_of_document": tokenizer.end_of_document}


# ------------------------------------------------------------------------------------------------ to theirs


@dataclass(frozen=True)
class Shard:
    """A file to write: rows of the table, and their tensors as they will lie in it."""

    rows: list[Row]
    entries: list[Entry]

    @property
    def bytes(self) -> int:
        return self.entries[-1].end


def to_hugging_face(
    place: str | Path,
    out: str | Path,
    *,
    family: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    check: bool = True,
) -> Report:
    """Write a checkpoint's weights as a model that transformers loads: config, safetensors, tokenizer.

    One tensor of ours is in memory at a time.

    Args:
        family: by default the one that it was converted from, else the first that it can be.
        dtype: fp32, bf16 or fp16; by default as they are kept.
        shard_bytes: about the largest file.

    Raises:
        CheckpointError: it can be of no family, or the logits differ (what was made is then in `out`.failed).
    """
    out, commit = new_place(out), find(place, states=only_weights)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype}: {did_you_mean(dtype, DTYPES)}")
    cast = None if dtype is None else DTYPES[dtype]
    config = config_of(commit)
    choice = model_choice(config["model"], commit.storage.describe(commit.folder))
    kind = family_for(choice, commit, family)
    table = FAMILY[kind]()
    rows, reader = rows_of(table, choice), commit.reader()
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    storage = LocalStorage(staging)
    try:
        staging.mkdir(parents=True)
        _write_shards(storage, _shards(rows, reader, sizes_of(choice), cast, shard_bytes), reader, choice, cast)
        write_side_files(staging, commit, table, choice, config["data"]["seq_len"], cast)
        os.rename(staging, out)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise refusal(error, f"writing {out}", LocalStorage(out.parent)) from None
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return proven(out, check, commit, Folder(out), kind, commit.storage.describe(commit.folder), str(out), cast)


def _shards(
    rows: list[Row], reader: Reader, sizes: dict[str, int], cast: torch.dtype | None, shard_bytes: int
) -> list[Shard]:
    """What goes into which file; a row is not cut, so a file may be larger where one is."""
    shards: list[Shard] = []
    for row in rows:
        stored = reader.stored(row.ours)
        shapes = [tuple(x.shape) for x in row.split(torch.empty(stored.shape, device="meta"), sizes)]
        dtype = cast or stored.dtype
        n_bytes = sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize
        if not shards or (shards[-1].entries and shards[-1].bytes + n_bytes > shard_bytes):
            shards.append(Shard([], []))
        shards[-1].rows.append(row)
        for name, shape in zip(row.theirs, shapes, strict=True):
            at = shards[-1].bytes if shards[-1].entries else 0
            end = at + torch.Size(shape).numel() * dtype.itemsize
            shards[-1].entries.append(Entry(name, dtype, shape, at, end))
    return shards


def _write_shards(
    storage: LocalStorage, shards: list[Shard], reader: Reader, choice: Any, cast: torch.dtype | None
) -> None:
    sizes = sizes_of(choice)
    weight_map: dict[str, str] = {}
    for n, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{n:05d}-of-{len(shards):05d}.safetensors"

        def chunks(shard: Shard = shard) -> Iterator[bytes | memoryview]:
            yield encode_header(shard.entries, {"format": "pt"})
            for row in shard.rows:
                for x in row.split(reader.read_full(row.ours), sizes):
                    yield bytes_of(x if cast is None else x.to(cast))

        storage.write(file, chunks())
        weight_map |= {entry.key: file for entry in shard.entries}
    if len(shards) > 1:
        total = sum(shard.bytes for shard in shards)
        write_json(storage.root / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_side_files(
    folder: Path, commit: Commit, family: Any, choice: Any, seq_len: int, cast: torch.dtype | None
) -> None:
    """config.json, generation_config.json and what the tokenizer needs."""
    for name in SIDE_FILES:
        path = f"{commit.folder}/{name}"
        if (size := commit.storage.size(path)) is not None:
            (folder / name).write_bytes(commit.storage.read(path, 0, size))
    end = _write_tokenizer(folder, commit)
    embedding = commit.manifest.tensors["weights", "embedding.weight"]
    config = {
        "architectures": [family.architecture],
        "model_type": family.kind,
        "vocab_size": embedding.shape[0],
        "n_positions" if family.kind == "gpt2" else "max_position_embeddings": seq_len,
        "tie_word_embeddings": choice.tie_embeddings,
        "dtype": DTYPE_WORDS.get(cast or embedding.dtype, "float32"),
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": None,
    }
    origin = converted_from(commit)
    kept = origin.get("config") if origin.get("family") == family.kind else None
    write_json(folder / CONFIG, config | family.config(choice) | (kept if isinstance(kept, dict) else {}))
    if end is not None and not (folder / "generation_config.json").exists():
        write_json(folder / "generation_config.json", {"bos_token_id": end, "eos_token_id": end})


def _write_tokenizer(folder: Path, commit: Commit) -> int | None:
    """The checkpoint's tokenizer, if it can be found; returns the id that ends a document.

    A model that was trained here has read each document behind that token, so the file says to put it in front.
    """
    try:
        tokenizer, content = tokenizer_of(commit)
    except DataError as error:
        warn("the model is written without a tokenizer: %s", error)
        return None
    if trained_here(config_of(commit)):
        content = with_in_front(content, tokenizer.end_of_document)
    (folder / TOKENIZER).write_bytes(content)
    if not (folder / "tokenizer_config.json").exists():
        name = tokenizer.backend.id_to_token(tokenizer.end_of_document)
        words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": name, "bos_token": name}
        write_json(folder / "tokenizer_config.json", words)
    return tokenizer.end_of_document


# ------------------------------------------------------------------------------------------------ the proof


def proven(
    out: Path,
    check: bool,
    commit: Commit,
    theirs: OtherSide,
    kind: str,
    source: str,
    target: str,
    cast: torch.dtype | None,
) -> Report:
    """The report of a conversion, stored beside what it made; what fails is moved out of the way."""
    if not check:
        report = Report(kind, source, target, 0, None, None, TOLERANCE, not_checked="asked not to")
    else:
        try:
            report = compare(commit, theirs, kind, source, target, cast)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; what was made is in {_out_of_the_way(out)}, unproven") from error
    write_json(out / REPORT, asdict(report) | {"passed": report.passed})
    if check and not report.passed:
        raise FailedCheckpointError(
            f"the logits of {source} and of what was made of it differ by {report.largest_difference:.3g} (the largest "
            f"is {report.largest_logit:.3g}, {TOLERANCE:g} of it is allowed): see {_out_of_the_way(out)}, and do not "
            "use it"
        )
    log("%s: logits differ by %s at most", target, report.largest_difference)
    return report


def _out_of_the_way(out: Path) -> Path:
    failed = out.with_name(f"{out.name}.failed")
    shutil.rmtree(failed, ignore_errors=True)
    out.rename(failed)
    return failed
