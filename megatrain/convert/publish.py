"""How what a conversion made gets its name: after its proof, so that nothing unproven lies where it was asked for."""

import contextlib
import fcntl
import itertools
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from megatrain.base.errors import CheckpointError, FailedCheckpointError
from megatrain.base.files import fsync_folder, write_json
from megatrain.base.log import log
from megatrain.checkpoint.storage import LocalStorage, new_place, refusal
from megatrain.convert.check import Proof, Report

REPORT = "conversion.json"


@contextlib.contextmanager
def made_beside(out: Path) -> Iterator[Path]:
    """A place beside `out` to make it in, gone at the end unless `published`; what a kill left there goes first.

    Raises:
        CheckpointError: another conversion to `out` is under way; or any error of the file system, in words.
    """
    around = out.with_name(f".{out.name}.unproven")
    place = around / out.name
    try:
        with _held(around, out):
            yield place
    except OSError as error:
        raise refusal(error, f"writing {out}", LocalStorage(out.parent)) from None
    except FailedCheckpointError as error:
        raise FailedCheckpointError(str(error).replace(str(place), str(out))) from error


@contextlib.contextmanager
def _held(folder: Path, out: Path) -> Iterator[None]:
    """An empty folder that is this process's alone, and gone afterwards. A process that is killed lets go of it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
                break
        except BlockingIOError:
            os.close(descriptor)
            raise CheckpointError(
                f"another conversion to {out} is under way: wait for it, or name another folder"
            ) from None
        os.close(descriptor)  # the one before removed it between the two lines
    try:
        for left in folder.iterdir():
            shutil.rmtree(left)
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def published(place: Path, out: Path, check: bool, proof: Proof) -> Report:
    """Give what lies in `place` the name `out`, with the report of its proof in it; what fails is called `out`.failed.

    Raises:
        CheckpointError: the other side cannot be computed, or `out` has come to be meanwhile.
        FailedCheckpointError: the logits differ.
    """
    failed = _failed(out)
    try:
        report = proof.report() if check else proof.left_out("asked not to")
    except CheckpointError as error:
        told = str(error).replace(str(place), str(failed))
        _move(place, failed, proof.left_out(told))
        raise CheckpointError(f"{told}; what was made is in {failed}, unproven") from error
    if check and not report.passed:
        _move(place, failed, report)
        raise FailedCheckpointError(f"{_why_failed(report)}: see {failed}, and do not use it")
    new_place(out)
    _move(place, out, report)
    log("%s: logits differ by %s at most", report.target, report.largest_difference)
    return report


def _move(place: Path, name: Path, report: Report) -> None:
    write_json(place / REPORT, asdict(report) | {"passed": report.passed})
    if (name / REPORT).is_file():
        shutil.rmtree(name)
    place.rename(name)
    fsync_folder(name.parent)


def _failed(out: Path) -> Path:
    """Where a failed conversion goes: in the place of one before it, and of nothing else."""
    names = (out.with_name(f"{out.name}.failed{n}") for n in itertools.chain([""], itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name) or (name / REPORT).is_file())


def _why_failed(report: Report) -> str:
    if report.largest_logit is None or not math.isfinite(report.largest_logit):
        return f"the model of {report.source} has logits that are not finite, so nothing can be proven"
    return (
        f"the logits of {report.source} and of what was made of it differ by {report.largest_difference:.3g} (the "
        f"largest is {report.largest_logit:.3g}, {report.tolerance:g} of it is allowed)"
    )
