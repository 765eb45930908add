"""`verify` finds every planted mistake and says where it begins, and is silent about layouts without one."""

import random
from pathlib import Path

import pytest

from megatrain.engine.schedules import SCHEDULES
from megatrain.train.check import problems_of
from megatrain.train.config import read_run
from megatrain.train.verify import layout_of, prepared
from tests.layouts.mutations import PLANTED
from tests.layouts.sides import ALONE, Job, compared, small_run, take_all

STEPS = 2


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory, text_data: Path) -> str:
    return small_run(tmp_path_factory.mktemp("mutations"), text_data)


@pytest.fixture(scope="module")
def one(run_file: str) -> Path:
    folder = Path(run_file).parent / "one"
    take_all([Job(run_file, ALONE, str(folder), STEPS)])
    return folder


@pytest.fixture(scope="module")
def mutants(run_file: str) -> dict[str, Job]:
    """Every mutant has run: those that need as many ranks in one start."""
    folder = Path(run_file).parent
    jobs = {
        name: Job(run_file, planted.layout, str(folder / name), STEPS, planted.mutate)
        for name, planted in PLANTED.items()
    }
    take_all(list(jobs.values()))
    return jobs


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found_and_named(name: str, one: Path, mutants: dict[str, Job]) -> None:
    verdict = compared(one, mutants[name])
    assert not verdict.equal
    assert verdict.line().startswith("differs: ")
    assert PLANTED[name].names in verdict.line()


def clean_layouts(run_file: str, n: int, most_ranks: int, seed: int) -> list[str]:
    """`n` random layouts of 2 to `most_ranks` ranks that the run above is not refused under."""
    draw = random.Random(seed)
    found: list[str] = []
    while len(found) < n:
        tp, cp, dp, pp = (draw.choice(sizes) for sizes in ((1, 1, 2, 4), (1, 1, 2), (1, 2, 4), (1, 1, 2)))
        if not 2 <= tp * cp * dp * pp <= most_ranks:
            continue
        words = {"tp": tp, "cp": cp, "dp": dp, "pp": pp, "micro_batch": draw.choice([1, 8 // dp // 2 or 1])}
        if pp > 1:
            words["schedule"] = draw.choice(sorted(SCHEDULES))
        if tp > 1:
            words["sequence_parallel"] = draw.choice(["true", "false"])
        if cp > 1:
            words["cp_kind"] = "ring" if tp > 1 else draw.choice(["ring", "ulysses"])
        engine = draw.choice(["plain", "fsdp2", "deepspeed"]) if dp * cp > 1 else "plain"
        if engine == "deepspeed" and most_ranks <= 4 and len(found) % 3:
            engine = "plain"
        words |= {
            "engine": engine,
            "zero": {"plain": 0, "fsdp2": draw.choice([2, 3])}.get(engine, draw.choice([1, 2, 3])),
        }
        words["recompute"] = draw.choice(["none", "selective", "full"])
        text = ",".join(f"{key}={value}" for key, value in words.items())
        if text not in found and not refused(run_file, text):
            found.append(text)
    return found


def refused(run_file: str, layout: str) -> list[str]:
    run = read_run(run_file).run
    chosen, world = layout_of(layout, run.layout)
    return problems_of(prepared(run, chosen), world)


def assert_no_alarm(run_file: str, one: Path, folder: Path, layouts: list[str]) -> None:
    jobs = [Job(run_file, layout, str(folder / str(i)), STEPS) for i, layout in enumerate(layouts)]
    take_all(jobs, timeout=3000)
    for job in jobs:
        verdict = compared(one, job)
        assert verdict.equal, f"{job.layout}: {verdict.line()}"


def test_random_layouts_without_a_mistake_raise_no_alarm(run_file: str, one: Path, tmp_path: Path) -> None:
    assert_no_alarm(run_file, one, tmp_path, clean_layouts(run_file, 6, most_ranks=2, seed=1))


@pytest.mark.slow
@pytest.mark.timeout(2 * 3600)
def test_fifty_random_layouts_without_a_mistake_raise_no_alarm(run_file: str, one: Path, tmp_path: Path) -> None:
    assert_no_alarm(run_file, one, tmp_path, clean_layouts(run_file, 50, most_ranks=8, seed=2))
