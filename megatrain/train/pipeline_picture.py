"""The schedule of a run's pipeline, drawn before anything is started."""

from pathlib import Path

from megatrain.base.errors import ConfigError
from megatrain.data.manifest import TRAIN
from megatrain.engine.timeline import as_text, draw, timeline
from megatrain.models.stages import spans_of
from megatrain.train.check import problems_of
from megatrain.train.config import Run


def show(run: Run, ranks: int | None, png: str | None, columns: int) -> str:
    """The timeline of a step as text that fits `columns`, and as a picture in `png`.

    It is drawn as if all stages cost the same; how idle ranks are with the costs that are predicted is said below.

    Args:
        ranks: of the whole run; as few as tp, pp, cp and a given dp ask for where not said.

    Raises:
        ConfigError: the run has no pipeline, or one that cannot be run.
        DataError: the data, whose vocabulary makes the head's cost, is missing or damaged.
    """
    layout = run.layout
    if layout.pp == 1:
        raise ConfigError(
            "layout.pp is 1, so there is no schedule to draw: set it to 2 or more, for example with layout.pp=2"
        )
    world = ranks or layout.tp * layout.pp * layout.cp * (layout.dp or 1)
    if problems := problems_of(run, world):
        raise ConfigError(problems)
    tokenizer = run.data.corpora(TRAIN, run.seed)[0].manifest.tokenizer
    costs = run.model.costs(tokenizer.vocab_size, run.data.seq_len)
    plan = layout.pipeline(costs)
    assert plan is not None
    dp = layout.mesh(world).dp
    m = run.train.global_batch // dp // layout.micro_batch
    line = timeline(plan, m)
    predicted = timeline(plan, m, [costs.of(span) for span in spans_of(plan.layers)])
    shape = f"{layout.schedule}: pp {plan.pp} x {plan.virtual} stages, {m} micro-batches"
    path = Path(png or f"{run.name}-schedule.png")
    draw(line, f"{run.name}, {shape}", path)
    lines = [f"{shape}; layers of each stage: {', '.join(map(str, plan.layers))}", "", as_text(line, columns), ""]
    if m >= plan.pp:
        closed = float(plan.schedule.bubble_share(plan.pp, m, plan.virtual))
        lines.append(f"closed form, stages of equal cost: {closed:.1%} ({plan.schedule.paper})")
    shares = ", ".join(f"{float(share):.1%}" for share in predicted.bubble_shares())
    lines.append(f"with the cost that each stage is predicted to have, ranks are idle {shares}")
    return "\n".join([*lines, f"picture: {path}"])
