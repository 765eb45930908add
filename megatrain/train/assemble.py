"""From a run file to a trainer: who we are, the mesh, the model, the engine, the data, the hooks."""

import contextlib
import dataclasses
import math
import os
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from megatrain.base.device import Device, cpu_threads
from megatrain.base.errors import PreemptedError, RunError
from megatrain.base.files import written_whole
from megatrain.base.log import log, start_logging, warn
from megatrain.checkpoint.checkpoints import Checkpoints
from megatrain.checkpoint.exchange import Exchange
from megatrain.checkpoint.keys import acknowledged
from megatrain.checkpoint.origin import revision, versions
from megatrain.checkpoint.read import Commit, only_weights
from megatrain.checkpoint.retention import SCORE
from megatrain.cluster.identity import Identity, identity_of
from megatrain.cluster.start import connected, lost_peer
from megatrain.config.build import plain
from megatrain.data.feed import held_out
from megatrain.data.held_out import HeldOut
from megatrain.data.ledger import order_of
from megatrain.data.manifest import HELD_OUT, TOKENIZER, TRAIN, Manifest
from megatrain.data.slots import merged
from megatrain.engine.guard import Guarded
from megatrain.nn.batch import Batch
from megatrain.parallel.mesh import Axis, Mesh
from megatrain.train.agreement import Drift, refuse_disagreement, refuse_drift
from megatrain.train.build import build_engine, context_part, open_feed
from megatrain.train.check import refuse
from megatrain.train.config import Run
from megatrain.train.examine import examine
from megatrain.train.facts import facts_of, throughput_of
from megatrain.train.folder import RunFolder
from megatrain.train.hook import Handle, Hook, Record, restore_states, states_of
from megatrain.train.hooks.console import Console
from megatrain.train.hooks.evaluation import Evaluation
from megatrain.train.hooks.guard import GuardLog
from megatrain.train.hooks.ledger import Bookkeeping
from megatrain.train.hooks.metrics import Metrics
from megatrain.train.hooks.saving import Saving
from megatrain.train.hooks.wandb import Wandb
from megatrain.train.narration import loss_of_a_peer, say_what_came, say_what_runs
from megatrain.train.resume import (
    commit_to_resume,
    finished,
    lineage,
    refuse_other_ledger,
    refuse_other_model,
    refuse_other_tokenizer,
)
from megatrain.train.stop import StopRequest, StopVote
from megatrain.train.throughput import Throughput
from megatrain.train.trainer import State, Trainer


def launch(run: Run) -> str:
    """Run `run` as this process's rank of the job; see `megatrain.train.run.train`."""
    identity = identity_of(os.environ)
    start_logging(identity.rank)
    manifests = refuse(run, identity.world)
    if finished(run):
        return "already finished"
    device = Device.of(run.layout.device, identity.local_rank)
    threads = cpu_threads(identity.local_world)
    torch.set_num_threads(threads)
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # of `tokenizers`, which data workers inherit
    with connected(identity, device), StopRequest().listening() as request:
        refuse_different_ranks(run, manifests, identity)
        mesh = run.layout.mesh(identity.world).at(identity.rank)
        if identity.world > 1:
            mesh = mesh.connect()
        with ExitStack() as stack:
            session = Session(run, manifests, mesh, device, identity, request, stack)
            session.train()
    return "finished"


def refuse_different_ranks(run: Run, manifests: tuple[Manifest, ...], identity: Identity) -> None:
    """Ranks with other files than this one's are told so, before they open groups by layouts that may differ: they
    would wait for each other for ever.

    Raises:
        ConfigError: on every rank.
    """
    exchange = Exchange(Axis("world", identity.world, identity.rank, tuple(range(identity.world))))
    code = {"revision": revision(), "versions": versions()}
    facts = {"config": run.shown(), "tokenizer": manifests[0].tokenizer.fingerprint, **code}
    with contextlib.closing(exchange):
        refuse_disagreement(facts, exchange)


@dataclass
class Session:
    """One rank's parts of a run, opened in order and closed in the reverse order by `stack`."""

    run: Run
    manifests: tuple[Manifest, ...]
    """Of the run's data sets, in order."""
    mesh: Mesh
    device: Device
    identity: Identity
    request: StopRequest
    stack: ExitStack

    def __post_init__(self) -> None:
        run = self.run
        self.tokenizer = self.manifests[0].tokenizer  # of all of them
        self.state = State()
        self.states_of_hooks: dict[str, Any] = {}
        self.exchange = Exchange(self.mesh.axis("world"))
        self.folder = RunFolder(run.folder)
        self.folder.make()
        self.checkpoints = Checkpoints(
            run.commits,
            self.mesh.axis("world"),
            keep=run.checkpoint.keep,
            go_on=run.checkpoint.failed_save == "go_on",
            committed=lambda step: self.folder.note("saved", step, asynchronous=run.checkpoint.async_),
        )
        self.checkpoints.claim(run.folder)
        self.stack.push(self._close_checkpoints)
        commit = commit_to_resume(run, self.checkpoints)
        self.lineage = lineage(run, commit)
        if commit is not None:
            refuse_other_ledger(commit, self.folder.path)
        self.engine = build_engine(run, self.tokenizer, self.mesh, self.device)
        self.stack.callback(self.engine.close)
        self._restore(commit)
        if run.checkpoint.every:
            self.checkpoints.reserve(self.engine.slices())
        self.resumed_at = self.state.step
        refuse_drift(self.engine, self.exchange, self.resumed_at)
        if self.rank == 0:
            self._prepare_folder(commit)
        self.feed = open_feed(run, self.mesh, self.device, self.manifests, self.state.cursors)
        self.stack.callback(self.feed.close)
        self.held_out = self._held_out()

    @property
    def rank(self) -> int:
        return self.identity.rank

    # --------------------------------------------------------------------------------- building

    def _restore(self, commit: Commit | None) -> None:
        """Take up the state of `commit`, or the weights of another run."""
        acknowledge = self.run.checkpoint.acknowledge
        if commit is not None:
            refuse_other_tokenizer(commit, self.tokenizer.fingerprint, acknowledge)
            reader = commit.reader(cast=acknowledged("precision.parameters", acknowledge))
            self.checkpoints.load(reader, self.engine)
            self.engine.load_scalars(reader.state["engine"])
            self.state.restore(reader.state["run"])
            self.states_of_hooks = reader.state.get("hooks", {})
        elif self.run.checkpoint.init_from:
            source = self.checkpoints.open(self.run.checkpoint.init_from, only_weights)
            refuse_other_model(source, self.run)
            refuse_other_tokenizer(source, self.tokenizer.fingerprint, acknowledge)
            self.checkpoints.load(source.reader(cast=True), self.engine, states=only_weights)
            log("weights are those of %s (step %d)", self.run.checkpoint.init_from, source.step)

    def _prepare_folder(self, commit: Commit | None) -> None:
        self.folder.write_config(self.run.shown())
        tokenizer = self.run.data.corpora(TRAIN, self.run.seed, self.manifests)[0].tokenizer_file()
        if tokenizer is not None:
            with written_whole(self.folder.path / TOKENIZER, "wb") as file:
                file.write(tokenizer)
            if self.run.checkpoint.dir is not None:
                self.checkpoints.keep_beside(TOKENIZER, tokenizer)
        self.folder.rewind_metrics(0 if commit is None else commit.step)  # it may have been killed before any commit
        if commit is None:
            self.folder.note("started", 0, facts=self.facts)
        else:
            self.folder.note("resumed", commit.step, facts=self.facts, changed=self.lineage[-1]["changed"])

    def _held_out(self) -> list[Batch]:
        """This rank's held-out rows; none where a source has no such split."""
        run, dp = self.run, self.mesh.axis("dp")
        splits = [manifest.splits.get(HELD_OUT) for manifest in self.manifests]
        if not all(split is not None and split.tokens for split in splits):
            log("no held-out loss: not every data set has a held-out split")
            return []
        self.held_out_bytes_per_token = HeldOut(run.data, manifests=self.manifests).bytes_per_token
        cp = run.layout.context(self.mesh)
        batches = held_out(
            run.data,
            global_batch=run.train.global_batch,
            n_batches=run.train.eval_batches,
            dp_rank=dp.rank,
            dp_size=dp.size,
            manifests=self.manifests,
        )
        return [context_part(batch, cp) for batch in batches]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What does not change while the run goes on."""
        return facts_of(self.run, self.tokenizer, self.mesh, self.device, self.checkpoints.run)

    # --------------------------------------------------------------------------------- running

    def train(self) -> None:
        """The run, with its hooks; whatever ends it is written to events.jsonl."""
        throughput = throughput_of(self.run, self.tokenizer, self.identity.world, self.device)
        say_what_runs(self.facts, throughput, self.run.layout.schedule, self.resumed_at)
        handle = self._handle(throughput)
        if self.resumed_at == 0 and self.held_out:
            self.note("evaluated", **self.evaluate())
        self.hooks = hooks = self._hooks(handle)
        self.trainer = trainer = Trainer(
            state=self.state,
            feed=self.feed,
            engine=self.engine,
            schedule=self._lr,
            total_steps=self.run.total_steps,
            global_batch=self.run.train.global_batch,
            max_skips=self.run.train.max_skips,
            throughput=throughput,
            vote=StopVote(self.request, self.mesh.axis("world")),
            hooks=hooks,
            go_back=self._go_back,
        )
        restore_states(self.hooks, self.states_of_hooks)
        outcome, stopped = "failed", None
        try:
            stopped = self._to_its_end(trainer)
            outcome = "finished" if stopped is None else "preempted"
        except Exception as error:
            self.note("failed", error=f"{type(error).__name__}: {error}"[:2000])
            if lost_peer(error):
                saved = self.checkpoints.committed
                saved = self.resumed_at if saved is None else saved
                raise RunError(loss_of_a_peer(error, self.state.step, saved)) from error
            raise
        finally:
            if outcome != "failed":
                trainer.vote.close()
                self.note(outcome)
            for hook in hooks:
                hook.finish(outcome)
            if self.rank == 0:
                say_what_came(self.folder)
        if stopped is not None:
            raise stopped

    def _to_its_end(self, trainer: Trainer) -> PreemptedError | None:
        """Train until the budget is spent or the run is asked to stop, and have that state saved; returns the stop.

        Raises:
            FailedCheckpointError: it could not be saved, whatever `checkpoint.failed_save` says of those before.
        """
        stopped = None
        try:
            trainer.run()
        except PreemptedError as error:
            stopped = error
        self.checkpoints.wait()
        if self.state.step > self.resumed_at:
            self.save()  # nothing, where a hook has saved this step
            self.checkpoints.wait()
            self.checkpoints.require(self.state.step)
        return stopped

    def _go_back(self) -> None:
        """To the newest checkpoint, and on from there with the data that comes next."""
        self.checkpoints.wait()
        commit = self.checkpoints.newest()
        if commit is None:
            warn("there is no checkpoint yet to go back to: step %d stays", self.state.step)
            return
        left, cursors = self.state.step, self.cursors()
        self._restore(commit)
        self.state.cursors = cursors
        self.checkpoints.committed = commit.step
        for hook in self.hooks:
            hook.rewound(commit.step)
        restore_states(self.hooks, self.states_of_hooks)
        log("went back from step %d to the checkpoint of step %d; the data between is left out", left, commit.step)

    def _hooks(self, handle: Handle) -> list[Hook]:
        run = self.run
        every = run.checkpoint.every or 0
        return [
            Drift(run.train.drift_every, self.engine, self.exchange),
            Evaluation(run.train.eval_every, handle),
            *(choice.build(handle) for choice in run.hooks),
            *([GuardLog(self.engine.guard, handle)] if isinstance(self.engine, Guarded) else []),
            Metrics(handle),
            Console(handle),
            Wandb(run.log.wandb.mode, run.log.wandb.project, handle),
            self._bookkeeping(every, handle),
            Saving(every, handle),
        ]

    def _bookkeeping(self, every: int, handle: Handle) -> Bookkeeping:
        run, fingerprints = self.run, [manifest.fingerprint for manifest in self.manifests]
        order = order_of(plain(run.data), run.seed, run.train.global_batch, fingerprints)
        self.bookkeeping = Bookkeeping(every, handle, order, self.cursors)
        return self.bookkeeping

    def cursors(self) -> Any:
        """Where all data slots stand after the last step; every rank calls it.

        Ranks that read raw text know the places of their own slots only.
        """
        found = self.state.cursors
        if found is not None and "own" in found:
            parts = {part["own"][0]: part for part in self.exchange.all(found)}
            self.state.cursors = merged(list(parts.values()))
        return self.state.cursors

    def _handle(self, throughput: Throughput) -> Handle:
        return Handle(
            folder=self.folder.path,
            rank=self.rank,
            world=self.identity.world,
            total_steps=self.run.total_steps,
            first_step=self.resumed_at + 1,
            facts=self.facts | {"peak_flops": throughput.peak, "peak_source": throughput.peak_source},
            config=self.run.shown(),
            evaluate=self.evaluate,
            examine=self.examine,
            save=self.save,
            limit_loss=lambda step, most: self.trainer.most_loss.update({step: most}),
            rewind=self._rewind,
            stop=self._stop,
            note=self.note,
        )

    def _lr(self, step: int) -> float:
        return self.run.optimizer.lr * self.run.schedule.lr_factor(step, self.run.total_steps)

    # --------------------------------------------------------------------------------- what hooks ask for

    def evaluate(self) -> Record:
        """Held-out loss in nats per token, and bits per byte of text."""
        total = torch.zeros(2, dtype=torch.float64)
        for batch in self.held_out:
            loss_sum, count = self.engine.evaluate(batch)
            total += torch.stack([loss_sum, count]).double().cpu()
        if total[1] == 0:
            return {}
        loss = float(total[0] / total[1])
        return {
            "held_out_loss": round(loss, 6),
            "bits_per_byte": round(loss / math.log(2) / self.held_out_bytes_per_token, 6),
        }

    def save(self, held_out_loss: float | None = None) -> None:
        """A checkpoint of the state as it is, of which this is the held-out loss if it was measured."""
        if self.checkpoints.committed == self.state.step or self.trainer.rewinding:
            return
        self.cursors()
        state = {"run": self.state.saved(), "engine": self.engine.scalars(), "hooks": states_of(self.hooks)}
        tokenizer = {
            "fingerprint": self.tokenizer.fingerprint,
            "end_of_document": self.tokenizer.end_of_document,
            "vocab_size": self.tokenizer.vocab_size,
        }
        facts = {"config": self.run.shown(), "tokenizer": tokenizer, "lineage": self.lineage, SCORE: held_out_loss}
        if (head := self.bookkeeping.head) is not None:
            facts["ledger"] = dataclasses.asdict(head)
        self.checkpoints.save(
            self.state.step, self.engine.slices(), state, facts, asynchronous=self.run.checkpoint.async_
        )

    def examine(self) -> Record:
        """The documents, gradient norms and activations of the step whose record hooks are told now."""
        assert self.trainer.delivered is not None
        return examine(self.trainer.delivered, self.run, self.engine, self.exchange, self.manifests)

    def _rewind(self) -> None:
        self.trainer.rewinding = True

    def _stop(self) -> None:
        self.trainer.stopping = True

    def note(self, kind: str, **facts: Any) -> None:
        if self.rank == 0:
            self.folder.note(kind, self.state.step, **facts)

    def _close_checkpoints(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Wait for the last save after a good end; after a failure do not wait for ranks that may be gone."""
        if error is None or isinstance(error, PreemptedError):
            self.checkpoints.close()
        elif self.checkpoints.lease is not None:
            self.checkpoints.lease.release()
