"""The schedule of a run's pipeline, drawn before anything is started."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from megatrain.base.errors import ConfigError
from megatrain.data.manifest import TRAIN
from megatrain.engine.timeline import Timeline, as_text, draw, timeline
from megatrain.models.stages import spans_of
from megatrain.train.check import problems_of
from megatrain.train.config import Run

MOST_BARS = 20_000
"""Actions that a picture still shows something of, and that are drawn within seconds."""


@dataclass(frozen=True)
class Picture:
    """The timeline of a step as if all stages cost the same, and with the costs that are predicted."""

    run: Run
    equal: Timeline
    predicted: Timeline

    @classmethod
    def of(cls, run: Run, ranks: int | None) -> Self:
        """The picture for `ranks` ranks of the whole run; as few as tp, pp, cp and a given dp ask for where not said.

        Raises:
            ConfigError: the run has no pipeline, one that cannot be run, or one too large to draw.
            DataError: the data, whose vocabulary makes the head's cost, is missing or damaged.
        """
        layout = run.layout
        if layout.pp == 1:
            raise ConfigError(
                "layout.pp is 1, so there is no schedule to draw: set it to 2 or more, for example with layout.pp=2"
            )
        world = ranks or layout.fewest_ranks
        if problems := problems_of(run, world):
            raise ConfigError(problems)
        tokenizer = run.data.corpora(TRAIN, run.seed)[0].manifest.tokenizer
        costs = run.model.costs(tokenizer.vocab_size, run.data.seq_len)
        plan = layout.pipeline(costs)
        assert plan is not None
        m = run.train.global_batch // layout.mesh(world).dp // layout.micro_batch
        if (bars := 2 * m * plan.n_stages) > MOST_BARS:
            raise ConfigError(
                f"{m} micro-batches over {plan.n_stages} stages are {bars:,} actions, more than the {MOST_BARS:,} that "
                f"can be drawn: pick train.global_batch or --ranks for at most {MOST_BARS // 2 // plan.n_stages} "
                "micro-batches, since a longer step only repeats its middle"
            )
        return cls(run, timeline(plan, m), timeline(plan, m, [costs.of(span) for span in spans_of(plan.layers)]))

    @property
    def shape(self) -> str:
        plan, m = self.equal.plan, self.equal.n_micro_batches
        return f"{self.run.layout.schedule}: pp {plan.pp} x {plan.virtual} stages, {m} micro-batches"

    @property
    def closed_form(self) -> float | None:
        """The bubble share of the schedule's paper; None where it has none for so few micro-batches."""
        plan, m = self.equal.plan, self.equal.n_micro_batches
        return float(plan.schedule.bubble_share(plan.pp, m, plan.virtual)) if m >= plan.pp else None

    def text(self, columns: int) -> str:
        """Drawn in letters that fit `columns`."""
        plan = self.equal.plan
        layers = ", ".join(map(str, plan.layers))
        lines = [f"{self.shape}; layers of each stage: {layers}", "", as_text(self.equal, columns), ""]
        if self.closed_form is not None:
            lines.append(f"closed form, stages of equal cost: {self.closed_form:.1%} ({plan.schedule.paper})")
        shares = ", ".join(f"{float(share):.1%}" for share in self.predicted.bubble_shares())
        return "\n".join([*lines, f"with the cost that each stage is predicted to have, ranks are idle {shares}"])

    def plain(self) -> dict[str, Any]:
        """As JSON values; times in forwards of an average stage, shares from 0 to 1, by rank."""
        plan = self.equal.plan
        return {
            "schedule": self.run.layout.schedule,
            "pp": plan.pp,
            "stages_a_rank": plan.virtual,
            "micro_batches": self.equal.n_micro_batches,
            "layers": list(plan.layers),
            "idle_closed_form": self.closed_form,
            "idle": [float(share) for share in self.equal.bubble_shares()],
            "idle_predicted": [float(share) for share in self.predicted.bubble_shares()],
            "ranks": [
                [
                    {
                        "action": bar.action.kind,
                        "stage": bar.action.stage,
                        "micro_batch": bar.action.micro_batch,
                        "begin": float(bar.begin),
                        "end": float(bar.end),
                    }
                    for bar in bars
                ]
                for bars in self.equal.ranks
            ],
        }

    def draw(self, png: str | None) -> Path:
        """A picture, in `png` or NAME-schedule.png here.

        Raises:
            ConfigError: it cannot be written there.
        """
        path = Path(png or f"{self.run.name}-schedule.png")
        if path.suffix.lower() != ".png" or path.is_dir():
            raise ConfigError(f"--png {path}: it is no name of a PNG file: write for example --png schedule.png")
        try:
            draw(self.equal, f"{self.run.name}, {self.shape}", path)
        except OSError as error:
            raise ConfigError(
                f"the picture {path} cannot be written ({error.strerror}): choose another --png"
            ) from None
        return path
