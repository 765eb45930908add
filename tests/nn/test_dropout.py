"""Dropout masks are a function of the element: of no layout, no order and no hidden state."""

import pytest
import torch

from megatrain.nn.dropout import Dropout, Noise, kept
from tests.contract import leaf


def noise(
    step: int = 1, first_row: int = 0, first_token: int = 0, last_token: int = 0, seq_len: int = 64, seed: int = 5
) -> Noise:
    return Noise.of(seed, step, torch.arange(first_token, last_token or seq_len) + first_row * seq_len, seq_len)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_of_elements_is_dropped(share):
    keep = kept((16, 64, 100), noise(), salt=3, share=share)
    n = keep.numel()
    deviation = (float(keep.float().mean()) - (1 - share)) / (share * (1 - share) / n) ** 0.5
    assert abs(deviation) < 4  # standard deviations of n independent draws


def test_no_row_token_or_channel_is_favoured():
    keep = kept((32, 64, 128), noise(), salt=3, share=0.5).float() - 0.5
    for dims in [(1, 2), (0, 2), (0, 1)]:
        means = keep.mean(dims) * 2 * (keep.numel() / keep.mean(dims).numel()) ** 0.5
        assert means.abs().max() < 4.5
        assert 0.6 < means.std() < 1.4  # as wide as chance makes it, and no wider


def test_neighbours_are_independent():
    keep = kept((8, 64, 256), noise(), salt=3, share=0.5).float() * 2 - 1
    for dim in range(3):
        n = keep.shape[dim] - 1
        product = keep.narrow(dim, 0, n) * keep.narrow(dim, 1, n)
        assert abs(float(product.mean())) * product.numel() ** 0.5 < 4


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((noise(step=1), 3), (noise(step=2), 3)),
        ((noise(seed=1), 3), (noise(seed=2), 3)),
        ((noise(), 3), (noise(), 4)),
        ((noise().within("layers.0"), 3), (noise().within("layers.1"), 3)),
    ],
    ids=["step", "seed", "layer", "block"],
)
def test_masks_of_different_things_are_independent(a, b):
    x, y = (kept((8, 64, 128), n, salt, 0.5).float() * 2 - 1 for n, salt in (a, b))
    assert abs(float((x * y).mean())) * x.numel() ** 0.5 < 4


def test_a_micro_batch_has_the_rows_of_the_whole_batch_mask():
    whole = kept((6, 64, 16), noise(), salt=3, share=0.3)
    parts = [kept((2, 64, 16), noise(first_row=row), salt=3, share=0.3) for row in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_rank_that_holds_part_of_the_sequence_has_its_part_of_the_mask():
    whole = kept((2, 64, 16), noise(), salt=3, share=0.3)
    parts = [kept((2, 32, 16), noise(first_token=token, last_token=token + 32), salt=3, share=0.3) for token in (0, 32)]
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_stays_is_scaled_up_and_so_is_its_gradient(dtype):
    layer, x = Dropout(0.25, "attention"), leaf(2, 64, 16, dtype=dtype)
    y = layer(x, noise())
    keep = kept((2, 64, 16), noise(), layer.salt, 0.25)
    torch.testing.assert_close(y, torch.where(keep, x / 0.75, 0.0).to(dtype))
    cotangent = leaf(2, 64, 16, dtype=dtype, seed=4).detach()
    (grad,) = torch.autograd.grad(y, x, cotangent)
    torch.testing.assert_close(grad, torch.where(keep, cotangent / 0.75, 0.0).to(dtype))
    assert y.dtype == grad.dtype == dtype


def test_the_mean_over_steps_is_the_input():
    layer, x = Dropout(0.5, "attention"), torch.ones(1, 8, 8)
    n = 400
    mean = sum(layer(x, noise(step=step, seq_len=8)) for step in range(n)) / n
    assert (mean - 1).abs().max() < 4.5 / n**0.5  # an element is 0 or 2: deviation 1


def test_without_noise_or_share_nothing_happens():
    x = torch.ones(1, 8, 8)
    assert Dropout(0.5, "attention")(x, None) is x
    assert Dropout(0.0, "attention")(x, noise(seq_len=8)) is x


def test_compiled_dropout_has_the_same_mask_and_is_not_compiled_again_for_another_step():
    from torch._dynamo.testing import CompileCounterWithBackend

    layer, counter = Dropout(0.25, "attention"), CompileCounterWithBackend("aot_eager")
    fast = torch.compile(layer.forward, fullgraph=True, backend=counter)
    x = leaf(2, 64, 16)
    for step in range(3):
        here = noise(step=step, first_row=2 * step).within(f"layers.{step}")
        assert torch.equal(fast(x, here), layer(x, here))
    assert counter.frame_count == 1
