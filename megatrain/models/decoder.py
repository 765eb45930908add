"""The decoder-only Transformer: embedding, blocks, norm, head (Touvron et al. 2023, arXiv:2302.13971)."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from megatrain.models import MODEL
from megatrain.models.block import BLOCKS
from megatrain.models.compiled import compiled
from megatrain.models.head import Head
from megatrain.models.stages import Costs, Span
from megatrain.nn.attention import ATTENTION, AttentionCase
from megatrain.nn.attention.causal import Causal
from megatrain.nn.attention.kernel import takes_borders
from megatrain.nn.attention.layer import SelfAttention, residual_std
from megatrain.nn.batch import Batch
from megatrain.nn.context import CONTEXT
from megatrain.nn.context.ring import Ring
from megatrain.nn.dropout import Dropout, Noise
from megatrain.nn.feed_forward import FEED_FORWARD
from megatrain.nn.feed_forward.swiglu import SwiGLU
from megatrain.nn.norm import NORM
from megatrain.nn.norm.rms_norm import RMSNorm
from megatrain.nn.position import POSITION
from megatrain.nn.position.rotary import Rotary
from megatrain.nn.where import KeyValueCache, Where
from megatrain.parallel.embedding import VocabParallelEmbedding
from megatrain.parallel.mesh import divisors
from megatrain.parallel.product import linear
from megatrain.parallel.shard import normal
from megatrain.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class Flops:
    """Model FLOPs of training on one token, forward and backward, without recomputation.

    `causal` counts the half of the attention square that causal masking leaves; `palm` all of it, as the PaLM paper
    does (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
    """

    causal: float
    palm: float


@MODEL.register("decoder")
@dataclass(frozen=True, kw_only=True)
class Decoder:
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    n_kv_heads: int | None = None
    """Heads of keys and values (Ainslie et al. 2023, arXiv:2305.13245); as many as n_heads by default."""
    head_dim: int | None = None
    """d_model / n_heads by default."""
    vocab_size: int | None = None
    """Rows of the embedding: the tokenizer's vocabulary by default; more are padding that never enters the loss."""
    tie_embeddings: bool = True
    """The head is the embedding (Press and Wolf 2017, arXiv:1608.05859)."""
    scale_embeddings: bool = False
    """Multiply embedded tokens by sqrt(d_model) (Vaswani et al. 2017, arXiv:1706.03762, section 3.4)."""
    dropout: float = 0.0
    """Share of each sublayer's output and of the embedding that is dropped in training."""
    init_std: float = 0.02
    """Standard deviation of the weights at the start; those that feed the residual get less, by depth."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's sum in the gradient, which keeps logits small; 1e-4 where it is used
    (Chowdhery et al. 2022, arXiv:2204.02311, section 5). The loss that is reported is without it."""
    norm: Annotated[Any, NORM] = field(default_factory=RMSNorm)
    position: Annotated[Any, POSITION] = field(default_factory=Rotary)
    attention: Annotated[Any, ATTENTION] = field(default_factory=Causal)
    feed_forward: Annotated[Any, FEED_FORWARD] = field(default_factory=SwiGLU)

    def problems(self) -> list[str]:
        names = ("d_model", "n_layers", "n_heads", "d_ff", "head_dim", "vocab_size")
        sizes = {name: size for name in names if (size := getattr(self, name)) is not None}
        found = [f"{name}={size}: it must be at least 1" for name, size in sizes.items() if size < 1]
        if found:
            return found
        if self.head_dim is None and self.d_model % self.n_heads:
            found.append(
                f"d_model={self.d_model} does not divide by n_heads={self.n_heads}: pick n_heads from "
                f"{divisors(self.d_model)}, or give head_dim"
            )
        if self.kv_heads < 1 or self.n_heads % self.kv_heads:
            found.append(
                f"n_kv_heads={self.kv_heads} does not divide n_heads={self.n_heads}: pick it from "
                f"{divisors(self.n_heads)}"
            )
        if not 0 <= self.dropout < 1:
            found.append(f"dropout={self.dropout}: it is a share from 0 to below 1")
        if self.z_loss < 0:
            found.append(f"z_loss={self.z_loss} must be at least 0")
        if found:
            return found
        if getattr(self.attention, "qk_norm_over", "head") == "width" and not hasattr(self.norm, "build_cut"):
            found.append(
                f"norm {self.norm.kind} cannot go over all heads of a token: set attention.qk_norm_over=head, "
                "or norm.kind=rms_norm"
            )
        case = AttentionCase(self.width_of_head, self.n_heads, self.kv_heads)
        found += [f"attention {self.attention.kind}: {r}" for r in self.attention.unsupported_reasons(case)]
        found += [f"position {self.position.kind}: {r}" for r in self.position.unsupported_reasons(self.width_of_head)]
        return found

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def width_of_head(self) -> int:
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    def layout_problems(self, tp: int, cp: int = 1, cp_kind: str = "ring") -> list[str]:
        """Why this model cannot be cut over `tp` x `cp` ranks, each with what would do."""
        found = []
        for name, n in {"n_heads": self.n_heads, "d_ff": self.d_ff}.items():
            if n % tp:
                fits = divisors(n)
                found.append(
                    f"model.{name}={n} cannot be split over tp={tp}: pick tp from {fits}, or change model.{name}"
                )
        if self.kv_heads % tp and tp % self.kv_heads:
            fits = [d for d in divisors(self.n_heads) if self.kv_heads % d == 0 or d % self.kv_heads == 0]
            found.append(
                f"model.n_kv_heads={self.kv_heads} can be neither split over tp={tp} nor held by equally many of its "
                f"ranks: pick tp from {fits}, or change model.n_kv_heads"
            )
        elif (
            self.kv_heads % tp and self.attention.qk_norm and getattr(self.attention, "qk_norm_over", "head") == "width"
        ):
            found.append(
                f"model.n_kv_heads={self.kv_heads} under tp={tp} puts a head on several ranks, which a norm over all "
                f"heads would count more than once: pick tp from {divisors(self.kv_heads)}, or set "
                "attention.qk_norm_over=head"
            )
        if not found and cp > 1:
            found += CONTEXT[cp_kind].head_problems(self.attention, self.n_heads, self.kv_heads, tp, cp)
        return found

    def vocabulary_problems(self, n_valid: int) -> list[str]:
        """Why this model cannot be trained on `n_valid` different tokens."""
        if self.vocab_size is not None and self.vocab_size < n_valid:
            return [
                f"model.vocab_size={self.vocab_size} is smaller than the tokenizer's vocabulary of {n_valid}: leave it "
                f"out, or set {n_valid} or more"
            ]
        return []

    # --------------------------------------------------------------------------------- counting

    def n_parameters(self, n_valid: int) -> int:
        """All parameters of the undivided model, counted on one built without memory."""
        with torch.device("meta"):
            model = self.build(n_valid=n_valid, seq_len=1)
        return sum(p.numel() for p in model.parameters())

    def flops_per_token(self, n_valid: int, seq_len: int) -> Flops:
        """Matrix products once forward and twice backward; the head counted, the embedding's look-up not."""
        q, kv = self.n_heads * self.width_of_head, self.kv_heads * self.width_of_head
        layer = self.d_model * (q + 2 * kv) + q * self.d_model + self.feed_forward.n_weights(self.d_model, self.d_ff)
        products = 6 * (self.n_layers * layer + self.d_model * n_valid)
        pair = 12 * self.n_layers * q / seq_len  # scores and values, 2 FLOPs each, forward and twice backward
        pairs = self.attention.score_pairs(seq_len)
        return Flops(products + pair * pairs, products + pair * seq_len * seq_len)

    def build(
        self,
        *,
        n_valid: int,
        seq_len: int,
        tp: TensorParallel = TensorParallel(),  # noqa: B008 (a frozen value)
        cp: Any = Ring(),  # noqa: B008 (a frozen value)
        seed: int = 0,
        span: Span | None = None,
        first: "DecoderModel | None" = None,
    ) -> "DecoderModel":
        """The model with uninitialised parameters (see parallel.shard.initialise).

        Args:
            n_valid: size of the tokenizer's vocabulary.
            cp: how ranks that hold other tokens of the same rows attend together (see nn.context).
            seq_len: longest sequence, which learned positions must know.
            seed: what dropout is drawn from.
            span: a pipeline stage of it only.
            first: the first stage where this rank holds it, whose embedding a tied head of the last stage then shares.
        """
        return DecoderModel(self, n_valid, seq_len, tp, cp, seed, span or Span(0, self.n_layers, self.n_layers), first)

    def costs(self, n_valid: int, seq_len: int) -> Costs:
        """FLOPs of a token by layer and of the head; looking up the embedding is free."""
        head = 6.0 * self.d_model * n_valid
        layers = self.flops_per_token(n_valid, seq_len).causal - head
        return Costs((layers / self.n_layers,) * self.n_layers, after=head)


class DecoderModel(nn.Module):
    """A batch in, (loss sum, token count) out; or the stage of it that has the layers of `span`.

    A last stage with a tied head has the embedding's weight too, under the name that the first has it by: shared where
    one rank holds both, else a copy that counts neither in the norm nor in a checkpoint.
    """

    embedding: VocabParallelEmbedding | None
    norm: Any
    head: Any

    def __init__(
        self,
        choice: Decoder,
        n_valid: int,
        seq_len: int,
        tp: TensorParallel,
        cp: Any,
        seed: int,
        span: Span,
        first: "DecoderModel | None",
    ):
        super().__init__()
        c = choice
        self.choice, self.n_valid, self.tp, self.cp, self.seed, self.span = c, n_valid, tp, cp, seed, span
        rows = n_valid if c.vocab_size is None else c.vocab_size
        out_std = residual_std(c.init_std, c.n_layers)
        self.embedding = self.positions = self.norm = self.head = None
        if first is not None and span.last and c.tie_embeddings:
            self.embedding = first.embedding
        elif span.first or (span.last and c.tie_embeddings):
            init = normal(c.init_std)
            self.embedding = VocabParallelEmbedding(rows, c.d_model, tp, init=init, counted=span.first)
        if span.first:
            self.positions = c.position.build(c.d_model, seq_len, tp)
        self.embedding_dropout = Dropout(c.dropout, "embedding")
        self.layers = nn.ModuleDict({str(i): self._block(i, out_std) for i in range(span.start, span.stop)})
        if span.last:
            normalised = BLOCKS[c.norm.placement].ends_normalised
            self.norm = nn.Identity() if normalised else c.norm.build(c.d_model, tp)
            tied = self.embedding.weight if c.tie_embeddings and self.embedding is not None else None
            self.head = Head(rows, c.d_model, tp, c.init_std, tied, c.z_loss)

    @property
    def at_both_ends(self) -> tuple[str, ...]:
        """Names of the parameters that the first and the last stage both have."""
        return ("embedding.weight",) if self.choice.tie_embeddings and self.embedding is not None else ()

    def hidden_shape(self, batch: Batch) -> tuple[int, int, int]:
        """Of the hidden states between layers, [b, t or t / size, d]."""
        b, t = batch.own(batch.tokens).shape
        return b, t // self.tp.size if self.tp.cuts_sequence else t, self.choice.d_model

    def _block(self, i: int, out_std: float) -> nn.Module:
        c, tp, name = self.choice, self.tp, f"layers.{i}"
        attention = SelfAttention(
            d_model=c.d_model,
            n_heads=c.n_heads,
            n_kv_heads=c.kv_heads,
            head_dim=c.width_of_head,
            kind=c.attention,
            position=c.position,
            norm=c.norm,
            tp=tp,
            cp=self.cp,
            name=name,
            init_std=c.init_std,
            out_std=out_std,
            out_bias=getattr(c.feed_forward, "bias", False),
        )
        feed_forward = c.feed_forward.build(c.d_model, c.d_ff, tp, init_std=c.init_std, out_std=out_std)
        return BLOCKS[c.norm.placement](
            attention,
            feed_forward,
            lambda: c.norm.build(c.d_model, tp),
            lambda sublayer: Dropout(c.dropout, sublayer),
        )

    # --------------------------------------------------------------------------------- forward

    def forward(self, batch: Batch, hidden: Tensor | None = None) -> Any:
        """(sum of weighted token losses in nats, sum of weights), float32 scalars, the same on every tp rank.

        A stage that is not the last gives its hidden states, [b, t or t / size, d].

        Args:
            hidden: what the stage before gave; None where there is none.
        """
        by_documents = takes_borders(next(self.parameters()), self.choice.width_of_head)
        whole = Where(batch.positions, batch.documents, batch.most_documents, by_documents)
        # attention sees whole rows, whichever tokens this rank computes
        mask = self.cp.prepare(self.choice.attention, whole)
        where = Where(batch.own(batch.positions), batch.own(batch.documents), batch.most_documents, mask=mask)
        where.noise = self._noise(batch)
        hidden = self.hidden(batch.own(batch.tokens), where, hidden)
        if not self.span.last:
            return hidden
        weights = batch.own(batch.weights)
        loss = self.head(hidden, batch.own(batch.targets), weights, self.n_valid)
        return loss, weights.sum()

    def hidden(self, tokens: Tensor, where: Where, before: Tensor | None = None) -> Tensor:
        """tokens [b, t] -> hidden states after the last norm (on the last stage), [b, t or t / size, d].

        Args:
            before: hidden states of the stage before, which take the tokens' place.
        """
        c = self.choice
        where.tables = c.position.prepare(where.positions, c.width_of_head)
        if where.cache is None and where.mask is None:
            where.mask = c.attention.prepare(where)
        x = self._embedded(tokens, where) if before is None else before
        for name, block in self.layers.items():
            x = block(x, where.within(f"layers.{name}"))
        return x if self.norm is None else self.norm(x)

    def _embedded(self, tokens: Tensor, where: Where) -> Tensor:
        assert self.embedding is not None
        x = self.embedding(tokens)
        if self.choice.scale_embeddings:
            x = x * math.sqrt(self.choice.d_model)
        if self.positions is not None:
            x = x + self.positions(where.positions)
        return self.embedding_dropout(x, where.noise)

    def logits(self, tokens: Tensor, where: Where, *, latest: int | None = None) -> Tensor:
        """tokens [b, t] -> float32 logits [b, t, n_valid], on one tensor-parallel rank.

        Args:
            latest: only of so many tokens at the end, [b, latest, n_valid]; a prompt's others would fill the memory.
        """
        if self.tp.size > 1 or self.cp.axis.size > 1:
            raise ValueError("logits are made on one rank: load the model with tp=1 and cp=1")
        hidden = self.hidden(tokens, where)
        if latest is not None:
            hidden = hidden[:, -latest:]
        return linear(hidden, self.head.weight[: self.n_valid]).float()

    def decode(self, tokens: Tensor, cache: KeyValueCache, *, latest: int | None = None) -> Tensor:
        """Logits [b, t, n_valid] of tokens [b, t] that follow what `cache` holds; the cache then holds them too.

        Args:
            latest: see `logits`.
        """
        b, t = tokens.shape
        where = Where.decoding(cache.length, t, b, tokens.device, cache)
        keys = torch.arange(cache.length + t, device=tokens.device)
        where.mask = self.choice.attention.visible(where.positions[:1, :, None], keys[None, None])[:, None]
        logits = self.logits(tokens, where, latest=latest)
        cache.length += t
        return logits

    def _noise(self, batch: Batch) -> Noise | None:
        if not (self.training and self.choice.dropout):
            return None
        tokens = batch.token_numbers()
        if self.tp.cuts_sequence:
            start, stop = self.tp.axis.part(len(tokens), "sequence length")
            tokens = tokens[start:stop]
        return Noise.of(self.seed, batch.step, tokens, batch.tokens.shape[1])

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the forward of each block and of the last norm; equal blocks share one graph, and hooks of engines
        stay outside of it."""
        for part in (*self.layers.values(), *([] if self.norm is None else [self.norm])):
            part.forward = compiled(part, backend)
