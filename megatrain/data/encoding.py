"""Chunks of documents to token ids, in this process or in many: what comes out does not depend on how many."""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from megatrain.base.errors import DataError, RunError
from megatrain.data.documents import Chunk, Document, Refused
from megatrain.data.tokenizer import Tokenizer

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class EncodeJob:
    """What a process needs to know to encode a chunk."""

    chunk: Chunk
    tokenizer: Path
    fingerprint: str
    """Of the tokenizer, so that a process that knew another one under this path does not take that."""
    end_of_document: int
    held_out: float
    """Documents whose hash is below this are held out; in [0, 1]."""
    wants: tuple[bool, bool] = (True, True)
    """Whether the documents to train on are wanted, and the held-out ones. After a restart those that are on disk
    already are read, so that they are counted, but not encoded."""


@dataclass(frozen=True)
class EncodedDocument:
    id: str
    tokens: NDArray[np.uint32]
    """Closed by the end-of-document token."""
    text_bytes: int
    held_out: bool


@dataclass(frozen=True)
class EncodedChunk:
    documents: list[EncodedDocument]
    """Those that were wanted, in order."""
    refused: list[Refused]
    size: int


def hash_fraction(document: Document) -> float:
    """A number in [0, 1) that depends on the document's content alone: equal documents fall on the same side."""
    content = document.text.encode() if document.tokens is None else document.tokens.tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") / 2**64


def encode(job: EncodeJob) -> EncodedChunk:
    """Make the documents of a chunk and encode them."""
    tokenizer = _open(job.tokenizer, job.fingerprint, job.end_of_document)
    kept: list[tuple[Document, bool]] = []
    refused: list[Refused] = []
    for found in job.chunk.documents():
        if isinstance(found, Refused):
            refused.append(found)
            continue
        held_out = hash_fraction(found) < job.held_out
        if job.wants[held_out]:
            kept.append((found, held_out))
    ids = iter(tokenizer.encode_documents([document.text for document, _ in kept if document.tokens is None]))
    encoded = []
    for document, held_out in kept:
        if document.tokens is None:
            tokens, text_bytes = next(ids), len(document.text.encode())
        else:
            tokens, text_bytes = _checked(document, tokenizer)
        encoded.append(EncodedDocument(document.id, tokens, text_bytes, held_out))
    return EncodedChunk(encoded, refused, job.chunk.size)


def _checked(document: Document, tokenizer: Tokenizer) -> tuple[NDArray[np.uint32], int]:
    """The ids of a document that came as ids, with its end, and the bytes of its text."""
    ids = document.tokens
    assert ids is not None
    if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
        raise DataError(
            f"document {document.id} holds the id {int(ids.max())} and the tokenizer has {tokenizer.vocab_size}: give "
            "the --tokenizer that made these ids"
        )
    if not len(ids) or ids[-1] != tokenizer.end_of_document:
        ids = np.append(ids, np.uint32(tokenizer.end_of_document))
    return ids, len(tokenizer.decode(ids).encode())


@cache
def _open(path: Path, fingerprint: str, end_of_document: int) -> Tokenizer:
    return Tokenizer.open(path, end_of_document)


def ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`function` of each item, in order, computed by `workers` processes (by this one if there is one).

    A few items a worker are under way at a time, so that neither a slow consumer nor a long input fills the memory.

    Raises:
        RunError: a worker died.
    """
    if workers == 1:
        yield from map(function, items)
        return
    # Fresh processes, since one forked from a process whose tokenizer has run threads can hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise RunError(
            "a worker process died (killed from outside, most often for want of memory): take fewer --workers and run "
            "the same command again; it goes on where it stopped"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def _end_with_parent() -> None:
    """A pool's processes would wait for ever for work from a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
