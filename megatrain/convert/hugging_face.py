"""Decoders of the transformers library to checkpoints of ours, and back: tensor by tensor, then checked by logits."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatrain.base.errors import CheckpointError, ConfigError, DataError, did_you_mean
from megatrain.base.files import write_json
from megatrain.base.log import warn
from megatrain.checkpoint.compare import differences
from megatrain.checkpoint.manifest import digest_of
from megatrain.checkpoint.model import config_of, model_choice, shapes_of, trained_here
from megatrain.checkpoint.read import Commit, Reader, find, only_weights
from megatrain.checkpoint.storage import LocalStorage, new_place
from megatrain.checkpoint.stream import FILE_BYTES, Named, bytes_of, write_checkpoint
from megatrain.checkpoint.tensorfile import Entry, encode_header
from megatrain.checkpoint.tokenizer import side_files, tokenizer_of, valid_tokens
from megatrain.convert.check import Proof, Report
from megatrain.convert.families import FAMILY
from megatrain.convert.folder import CONFIG, INDEX, OLDER_TOKENIZERS, SINGLE, WEIGHTS, Folder
from megatrain.convert.mapping import converted_from, family_for, rows_of, sizes_of
from megatrain.convert.publish import made_beside, published
from megatrain.convert.table import Row, Theirs
from megatrain.data.manifest import TOKENIZER
from megatrain.data.tokenizer import Tokenizer, with_in_front

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
    if theirs.path.resolve() in out.resolve().parents:
        raise CheckpointError(f"{out} is inside of {theirs.path}, which is only read: name a folder elsewhere")
    said = understood(theirs.config, theirs.home / CONFIG)
    family, choice = FAMILY[said.kind](), said.choice
    if choice.n_layers > len(theirs.names):  # so many rows could fill the memory
        raise CheckpointError(
            f"{theirs.home / CONFIG} speaks of {choice.n_layers} layers, and {theirs.path} holds {len(theirs.names)} "
            "tensors: one of them is not of this model"
        )
    rows = rows_of(family, choice)
    theirs.rename(family.prefix, family.untied)
    _refuse_other_tensors(theirs, family, choice, rows)
    side, vocab_size = theirs.side_files(), said.section["vocab_size"]
    origin = {"step": 0, "converted": str(theirs.path), "family": said.kind, "config": said.kept}
    facts = {
        "config": {"model": said.section, "data": {"seq_len": said.seq_len, "sources": []}},
        "tokenizer": _tokenizer_entry(side, theirs, vocab_size),
        "lineage": [origin],
    }
    with made_beside(out) as place:
        written = write_checkpoint(
            place,
            ours(theirs, rows, choice, shapes_of(choice, vocab_size, said.seq_len)),
            step=0,
            state=None,
            facts=facts,
            file_bytes=min(theirs.largest_file or FILE_BYTES, FILE_BYTES),
            beside=side,
        )
        return published(place, out, check, Proof(written, theirs, said.kind, str(theirs.path), str(out)))


@dataclass(frozen=True)
class Understood:
    """A config.json as a model of ours."""

    kind: str
    section: dict[str, Any]
    """Our `model` section."""
    choice: Any
    seq_len: int
    kept: dict[str, Any]
    """What the way back writes again."""


def understood(config: dict[str, Any], where: Path) -> Understood:
    """
    Raises:
        CheckpointError: the config is of no family here, or of a model that ours cannot be.
    """
    kind = config["model_type"]
    if kind not in FAMILY:
        raise CheckpointError(f"{where} is of a {kind!r} model: {did_you_mean(kind, FAMILY.kinds())}")
    read = Theirs(config)
    try:
        section = FAMILY[kind]().model(read)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise CheckpointError(
            f"{where} has a value that no {kind} model has ({type(error).__name__}: {error})"
        ) from error
    seq_len = read.get("max_position_embeddings", read.get("n_positions", 2048))
    if type(seq_len) is not int or seq_len < 1:
        raise CheckpointError(f"{where} is for rows of {seq_len!r} tokens: it must be 1 or more")
    read.finish(kind)
    return Understood(kind, section, model_choice(section, str(where)), seq_len, read.kept())


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


def _tokenizer_entry(side: dict[str, bytes], theirs: Folder, vocab_size: int) -> dict[str, Any] | None:
    """Fingerprint of the tokenizer, and the id that ends a document: the model's own word for it."""
    if TOKENIZER not in side:
        if older := [name for name in OLDER_TOKENIZERS if (theirs.home / name).is_file()]:
            warn(
                "%s has %s and no %s, so the model comes without a tokenizer: transformers writes one "
                "(AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))",
                theirs.home,
                " and ".join(older),
                TOKENIZER,
            )
        return None
    end: Any = theirs.config.get("eos_token_id")
    if isinstance(end, list):
        end = end[0] if end else None
    if end is not None and (type(end) is not int or end < 0):
        raise CheckpointError(f"{theirs.home / CONFIG}: eos_token_id is {end!r}: it must be a whole number from 0 on")
    tokenizer = Tokenizer.parse(side[TOKENIZER], str(theirs.home / TOKENIZER), end)
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{theirs.home / TOKENIZER} has {tokenizer.vocab_size} tokens and the embedding {vocab_size} rows: remove "
            "the tokens that the model does not know, or the file (the model is then converted without a tokenizer)"
        )
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
    table, reader, where = FAMILY[kind](), commit.reader(), commit.storage.describe(commit.folder)
    shards = _shards(rows_of(table, choice, valid_tokens(commit)), reader, sizes_of(choice), cast, shard_bytes)
    with made_beside(out) as place:
        place.mkdir(parents=True)
        _write_shards(LocalStorage(place), shards, reader, choice, cast)
        write_side_files(place, commit, table, choice, config["data"]["seq_len"], cast)
        return published(place, out, check, Proof(commit, Folder(place), kind, where, str(out), cast))


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
                parts = row.split(reader.read_full(row.ours), sizes)
                for name, x in zip(row.theirs, parts, strict=True):
                    yield bytes_of(x if cast is None else _rounded(name, x, cast))

        storage.write(file, chunks())
        weight_map |= {entry.key: file for entry in shard.entries}
    if len(shards) > 1:
        total = sum(shard.bytes for shard in shards)
        write_json(storage.root / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _rounded(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """
    Raises:
        CheckpointError: a value is too large for `dtype`.
    """
    rounded = x.to(dtype)
    if lost := int((x.isfinite() & ~rounded.isfinite()).sum()):
        largest, word = float(x[x.isfinite()].abs().max()), DTYPE_WORDS[dtype]
        raise CheckpointError(
            f"{lost} values of {name} are too large for {word} (up to {largest:.4g}, {torch.finfo(dtype).max:g} is "
            "the most): take another --dtype, or leave it out to keep the weights as they are"
        )
    return rounded


def write_side_files(
    folder: Path, commit: Commit, family: Any, choice: Any, seq_len: int, cast: torch.dtype | None
) -> None:
    """config.json, generation_config.json and what the tokenizer needs."""
    for name, content in side_files(commit).items():
        (folder / name).write_bytes(content)
    end = _write_tokenizer(folder, commit)
    embedding = commit.manifest.tensors["weights", "embedding.weight"]
    config = {
        "architectures": [family.architecture],
        "model_type": family.kind,
        "vocab_size": valid_tokens(commit),
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
