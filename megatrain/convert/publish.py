"""How what a conversion made gets its name: after its proof, so that nothing unproven lies where it was asked for."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from megatrain.base.errors import CheckpointError, FailedCheckpointError
from megatrain.base.files import fsync_folder, write_json
from megatrain.base.log import log
from megatrain.checkpoint.storage import LocalStorage, refusal
from megatrain.convert.check import Proof, Report

REPORT = "conversion.json"


@contextlib.contextmanager
def made_beside(out: Path) -> Iterator[Path]:
    """A place beside `out` to make it in, gone at the end unless `published`; what a kill left there goes first.

    Raises:
        CheckpointError: for any error of the file system, in words that name `out`.
    """
    around = out.with_name(f".{out.name}.unproven")
    place = around / out.name
    try:
        shutil.rmtree(around, ignore_errors=True)
        yield place
    except OSError as error:
        raise refusal(error, f"writing {out}", LocalStorage(out.parent)) from None
    except FailedCheckpointError as error:
        raise FailedCheckpointError(str(error).replace(str(place), str(out))) from error
    finally:
        shutil.rmtree(around, ignore_errors=True)


def published(place: Path, out: Path, check: bool, proof: Proof) -> Report:
    """Give what lies in `place` the name `out`, with the report of its proof in it; what fails is called `out`.failed.

    Raises:
        CheckpointError: the other side cannot be computed.
        FailedCheckpointError: the logits differ.
    """
    try:
        report = proof.report() if check else proof.left_out("asked not to")
    except CheckpointError as error:
        failed = _failed(place, out)
        told = str(error).replace(str(place), str(failed))
        raise CheckpointError(f"{told}; what was made is in {failed}, unproven") from error
    write_json(place / REPORT, asdict(report) | {"passed": report.passed})
    if check and not report.passed:
        raise FailedCheckpointError(
            f"the logits of {report.source} and of what was made of it differ by {report.largest_difference:.3g} (the "
            f"largest is {report.largest_logit:.3g}, {report.tolerance:g} of it is allowed): see {_failed(place, out)},"
            " and do not use it"
        )
    place.rename(out)
    fsync_folder(out.parent)
    log("%s: logits differ by %s at most", report.target, report.largest_difference)
    return report


def _failed(place: Path, out: Path) -> Path:
    failed = out.with_name(f"{out.name}.failed")
    shutil.rmtree(failed, ignore_errors=True)
    place.rename(failed)
    return failed
