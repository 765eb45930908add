"""A model cut into stages is the model: the same names, the same values, the same results."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatrain.models.decoder import Decoder
from megatrain.models.stages import Costs, Span, Stages, balanced, spans_of
from megatrain.nn.batch import Batch
from megatrain.parallel.shard import initialise, shards

VOCABULARY, SEQ_LEN, N_LAYERS = 13, 6, 5


def choice(**changes: object) -> Decoder:
    return Decoder(d_model=8, n_layers=N_LAYERS, n_heads=2, d_ff=12, dropout=0.2, **changes)  # type: ignore[arg-type]


def batch() -> Batch:
    tokens = torch.randint(0, VOCABULARY, (2, SEQ_LEN + 1), generator=torch.Generator().manual_seed(1))
    return Batch(
        tokens[:, :-1],
        tokens[:, 1:],
        torch.ones(2, SEQ_LEN),
        torch.arange(SEQ_LEN).expand(2, -1),
        torch.zeros(2, SEQ_LEN, dtype=torch.int32),
        most_documents=1,
    )


def drawn(model: torch.nn.Module) -> torch.nn.Module:
    initialise(model, seed=4)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_stages_one_after_another_give_the_loss_of_the_whole_to_the_last_bit(tied: bool, position: str) -> None:
    from megatrain.nn.position import POSITION

    c = choice(tie_embeddings=tied, position=POSITION[position]())
    facts = {"n_valid": VOCABULARY, "seq_len": SEQ_LEN}
    whole = drawn(c.build(**facts))
    stages = [drawn(c.build(span=span, **facts)) for span in spans_of([2, 1, 2])]
    hidden = None
    for stage in stages[:-1]:
        hidden = stage(batch(), hidden)
        assert hidden.shape == stage.hidden_shape(batch())
    loss, count = stages[-1](batch(), hidden)
    expected, _ = whole(batch())
    assert torch.equal(loss, expected)
    assert count == 2 * SEQ_LEN
    named = [dict(stage.named_parameters()) for stage in stages]
    assert set().union(*named) == {name for name, _ in whole.named_parameters()}
    counted = [n for stage in stages for n, s in shards(stage).items() if all(part.counted for part in s.parts)]
    assert sorted(counted) == sorted(n for n, _ in whole.named_parameters()), "each is counted on one stage"
    for name, p in whole.named_parameters():
        for of_stage in named:
            assert name not in of_stage or torch.equal(of_stage[name], p), f"{name} does not start from the same bits"


def test_stages_of_one_rank_are_one_model_with_one_embedding() -> None:
    c, facts = choice(), {"n_valid": VOCABULARY, "seq_len": SEQ_LEN}
    first = c.build(span=Span(0, 2, N_LAYERS), **facts)
    last = c.build(span=Span(4, 5, N_LAYERS), first=first, **facts)
    both = Stages({0: first, 3: last})
    assert last.head.weight is first.embedding.weight
    assert {n.split(".")[1] for n, _ in both.named_parameters() if n.startswith("layers.")} == {"0", "1", "4"}
    assert {n.split(".")[0] for n, _ in both.named_parameters()} == {"embedding", "layers", "norm"}
    both.eval()
    assert not last.training
    both.train()
    assert last.training


def worst(costs: Costs, counts: tuple[int, ...] | list[int]) -> float:
    return max(costs.of(span) for span in spans_of(counts))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(0, 20), st.integers(0, 5), st.data())
def test_no_cut_has_a_cheaper_worst_stage(layers: list[int], after: int, before: int, data: st.DataObject) -> None:
    n_stages = data.draw(st.integers(1, len(layers)))
    costs = Costs(tuple(map(float, layers)), before=before, after=after)
    found = balanced(costs, n_stages)
    assert len(found) == n_stages
    assert sum(found) == len(layers)
    cuts = [c for c in itertools.product(range(1, len(layers) + 1), repeat=n_stages) if sum(c) == len(layers)]
    assert worst(costs, found) == min(worst(costs, cut) for cut in cuts)


def test_a_costly_head_takes_layers_off_the_last_stage() -> None:
    assert balanced(Costs((1.0,) * 8), 4) == [2, 2, 2, 2]
    assert (
        balanced(Costs((1.0,) * 8, after=1.0), 4) == [3, 2, 2, 1] or balanced(Costs((1.0,) * 8, after=1.0), 4)[-1] < 3
    )
    large = choice().costs(10_000, SEQ_LEN)
    assert balanced(large, 2) == [4, 1]


def test_fewer_layers_than_stages_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="2 layers cannot make 3 stages"):
        balanced(Costs((1.0, 1.0)), 3)
