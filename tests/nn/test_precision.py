"""Products in eight bits: casts bit for bit, linears against their three steps, layouts, choice of layers."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from megatrain.base.optional import torchao
from megatrain.models.decoder import Decoder
from megatrain.nn.precision.fp8 import FORMATS, Fp8, cast
from megatrain.nn.precision.int8 import Int8, uniform
from megatrain.nn.precision.mx import in_tiles
from megatrain.nn.precision.quantised import Quantised, quantised_linear
from megatrain.nn.precision.recipe import GRADIENT
from megatrain.nn.precision.select import linears, quantise, selection_problems
from megatrain.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatrain.parallel.mesh import ALONE, Mesh
from megatrain.parallel.shard import initialise, normal, shard_of
from megatrain.parallel.tensor import TensorParallel
from tests.contract import batch, leaf
from tests.ranks import run

EXAMPLES = [*Fp8.examples(), *Int8.examples()]


def name_of(recipe: Any) -> str:
    return "-".join(str(v) for k, v in vars(recipe).items() if k in ("kind", "weight_gradient", "stochastic_rounding"))


EVERY_BF16 = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def nearest(x: Tensor, digits: int, lowest: int, end: float) -> Tensor:
    """The number of a format with so many binary digits, smallest exponent and end that is nearest to each of float64
    `x`, ties to even."""
    exponent = torch.floor(torch.log2(x.abs().clamp(min=1e-300))).clamp(min=lowest)
    step = torch.exp2(exponent - digits)
    return (torch.round(x / step) * step).clamp(-end, end)


@pytest.mark.parametrize(("name", "digits", "lowest", "end"), [("e4m3", 3, -6, 448.0), ("e5m2", 2, -14, 57344.0)])
def test_casts_of_all_bf16_values_are_the_nearest_numbers_of_the_format(name, digits, lowest, end):
    x = EVERY_BF16.float()
    found = cast(x, FORMATS[name])
    expected = nearest(x.double().nan_to_num(posinf=end, neginf=-end), digits, lowest, end)
    numbers = ~x.isnan()
    assert torch.equal(found.double()[numbers], expected[numbers])
    assert found.float()[~numbers].isnan().all()
    within = numbers & (x.abs() <= end)
    assert torch.equal(found.view(torch.uint8)[within], EVERY_BF16.to(FORMATS[name]).view(torch.uint8)[within])


def written_out(x: Tensor, w: Tensor, g: Tensor, recipe: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y, grad x and grad w of x w^T by scale, cast, product, for bf16 matrices x [n, i], w [o, i], g [n, o]."""

    def rounded(m: Tensor, gradient: bool = False) -> tuple[Tensor, Tensor]:
        rows = m.float().abs().amax(-1, keepdim=True).clamp(min=1e-12)
        if isinstance(recipe, Int8):
            scale = rows / 127
            if gradient and recipe.stochastic_rounding:
                return (m.float() / scale + uniform(scale, m.shape[1])).floor().clamp(-127, 127), scale
            return (m.float() / scale).round(), scale
        dtype = recipe.format(GRADIENT) if gradient else torch.float8_e4m3fn
        if recipe.kind == "mx":
            m = torch.cat([m.float(), torch.zeros(len(m), -m.shape[1] % 32)], 1)
            blocks = m.split(32, 1)
            scales = [b.abs().amax(1, keepdim=True).clamp(min=1e-12) / torch.finfo(dtype).max for b in blocks]
            scales = [2.0 ** s.log2().ceil() for s in scales]
            numbers = [(b / s).to(dtype).float() * s for b, s in zip(blocks, scales, strict=True)]
            return torch.cat(numbers, 1), torch.ones(1, 1)
        scale = (rows.amax().view(1, 1) if recipe.kind == "tensorwise" else rows) / torch.finfo(dtype).max
        if recipe.kind == "rowwise":
            scale = 2.0 ** scale.log2().ceil()
        return (m.float() / scale).to(dtype).float(), scale

    def product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
        return (a[0] @ b[0].T) * (a[1] * b[1].T)

    y = product(rounded(x), rounded(w)).bfloat16()
    grad_x = product(rounded(g, gradient=True), rounded(w.T)).bfloat16()
    if recipe.weight_gradient == "high":
        return y, grad_x, g.float().T @ x.float()
    return y, grad_x, product(rounded(g.T, gradient=True), rounded(x.T))


def operands(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    return leaf(4, 8, 48, dtype=dtype), leaf(32, 48, dtype=dtype, seed=1), leaf(4, 8, 32, dtype=dtype, seed=2).detach()


@pytest.mark.parametrize("recipe", EXAMPLES, ids=name_of)
def test_a_linear_is_exactly_scale_cast_and_product(recipe):
    x, w, g = operands()
    y = quantised_linear(x, w, None, recipe, ALONE)
    w.grad_dtype = torch.float32
    y.backward(g)
    flat = [t.detach().flatten(0, -2) for t in (x, w, g)]
    expected = written_out(*flat, recipe)
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert torch.equal(y.detach().flatten(0, -2), expected[0])
    assert torch.equal(x.grad.flatten(0, -2), expected[1])
    torch.testing.assert_close(w.grad, expected[2], rtol=1e-6, atol=1e-6)


def test_mx_numbers_and_scales_are_those_of_torchao():
    ao = torchao("prototype.mx_formats.mx_tensor")
    config = torchao("prototype.mx_formats.config")
    x = leaf(8, 96).detach() * torch.exp2(torch.arange(96) % 7).flip(0)
    theirs_scale, theirs = ao.to_mx(x, torch.float8_e4m3fn, 32, config.ScaleCalculationMode.RCEIL)
    ours = Fp8(kind="mx").round(x, "input", ALONE)
    assert torch.equal(ours.values.float(), theirs.float())
    assert torch.equal(ours.scale, theirs_scale.float().view(8, 3))


def test_scales_of_blocks_stand_where_tensor_cores_look_for_them():
    rows, columns = 200, 6
    scale = torch.exp2((torch.arange(rows * columns) % 200 - 100).float()).view(rows, columns)
    found = in_tiles(scale)
    assert found.shape == (2 * 2 * 512,)
    for r in (0, 1, 31, 32, 127, 128, 199):
        for c in range(columns):
            tile = r // 128 * 2 + c // 4
            at = 512 * tile + 16 * (r % 128 % 32) + 4 * (r % 128 // 32) + c % 4
            assert found[at].float() == scale[r, c]


@pytest.mark.parametrize(
    ("kind", "capability", "words"),
    [
        ("mx", (9, 0), "compute capability 10.0: B200 or newer) and this one has 9.0: set precision.fp8.kind"),
        ("mx", (8, 0), "leave precision.fp8 out"),
        ("mx", (10, 0), ""),
        ("rowwise", (8, 9), ""),
        ("rowwise", (8, 0), "leave precision.fp8 out"),
    ],
)
def test_a_card_without_the_units_is_refused(kind, capability, words):
    problem = Fp8(kind=kind).card_problem(capability)
    assert words in problem
    assert bool(problem) is bool(words)


@pytest.mark.parametrize("kind", ["tensorwise", "rowwise"])
def test_an_fp8_linear_is_that_of_torchao(kind):
    ao = torchao("float8")
    config = ao.Float8LinearConfig.from_recipe_name(kind)
    config = dataclasses.replace(config, emulate=True)
    x, w, g = operands()
    theirs = nn.Linear(48, 32, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        theirs.weight.copy_(w)
    theirs = ao.convert_to_float8_training(nn.Sequential(theirs), config=config)[0]
    x2 = x.detach().clone().requires_grad_()
    y2 = theirs(x2)
    y2.backward(g)
    recipe = Fp8(kind=kind, weight_gradient="low")
    y = quantised_linear(x, w, None, recipe, ALONE)
    y.backward(g)
    for ours, other in ((y, y2), (x.grad, x2.grad), (w.grad, theirs.weight.grad)):
        error = (ours.float() - other.float()).norm() / other.float().norm()
        assert error < 4e-3, error  # a rounding of bf16


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
@pytest.mark.parametrize("recipe", [Fp8(weight_gradient="low"), Int8()], ids=name_of)
def test_a_compiled_product_is_the_eager_one(recipe):
    product = Quantised(recipe)
    x, w, g = operands()
    y = product(x, w, None)
    expected = torch.autograd.grad(y, (x, w), g)
    compiled = torch.compile(lambda x, w: product(x, w, None), fullgraph=True, backend="aot_eager")
    again = compiled(x, w)
    found = torch.autograd.grad(again, (x, w), g)
    for a, b in zip((y, *expected), (again, *found), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_a_compiled_block_takes_any_layers_in_bf16_and_compiles_each_choice_once():
    """More choices than torch compiles of one function unless it is told to; equal blocks share each."""
    counter = CompileCounterWithBackend("eager")
    models, found = [], []
    for compiled in (False, True):
        model = decoder(n_layers=2)
        products = list(quantise(model, Fp8(min_size=0, keep_first=0, keep_last=0), 2).values())
        if compiled:
            model.compile_blocks(counter)
        models.append((model, [products[i : i + 4] for i in range(0, len(products), 4)]))
    given = batch((3, 5), vocab_size=31)
    for _ in range(2):
        for choice in range(10):
            losses = []
            for model, blocks in models:
                for block in blocks:
                    for i, product in enumerate(block):
                        product.demoted = bool(choice >> i & 1)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(given)[0]
                loss.backward()
                losses.append(float(loss.detach()))
            found.append(losses)
    for eager, compiled in found:
        assert compiled == pytest.approx(eager, rel=1e-4)
    assert counter.frame_count == 10 + 1  # and the last norm


def through_two_layers(recipe: Any, tp_size: int) -> dict[str, Tensor]:
    """Output and gradients of a column- and a row-parallel layer, whole."""
    mesh = Mesh.of(tp=tp_size).at(torch.distributed.get_rank()).connect() if tp_size > 1 else Mesh()
    tp = TensorParallel(mesh.axis("tp"))
    layers = nn.ModuleDict(
        {
            "up": ColumnParallelLinear(32, 64, tp, init=normal(1.0)),
            "down": RowParallelLinear(64, 32, tp, init=normal(1.0)),
        }
    )
    initialise(layers, seed=1)
    with torch.no_grad():
        first = shard_of(layers["up"].weight).parts[0].start
        layers["up"].weight *= 1 + (torch.arange(64 // tp_size) + first)[:, None] / 8  # parts of unequal size
    for layer in layers.values():
        layer.product = Quantised(recipe, tp.axis)
    layers["down"].product.summed_over = tp.axis
    for layer in layers.values():
        layer.product.measuring = torch.zeros(5)
    x = leaf(2, 8, 32)
    y = layers["down"](F.silu(layers["up"](x)))
    y.backward(leaf(2, 8, 32, seed=4).detach())
    error, size, *_ = layers["down"].product.measuring
    whole = {"y": y.detach(), "x": x.grad, "error of down": (error / size).sqrt()}
    for name, layer in layers.items():
        whole[name] = layer.weight.grad
    return whole


@pytest.mark.parametrize("recipe", [Fp8(), Fp8(weight_gradient="low")], ids=name_of)
def test_tensorwise_scales_are_agreed_over_tensor_parallel_ranks(recipe):
    [alone] = run(through_two_layers, 1, recipe, 1)
    a, b = run(through_two_layers, 2, recipe, 2)
    found = {
        "y": a["y"],
        "x": a["x"],
        "up": torch.cat([a["up"], b["up"]]),
        "down": torch.cat([a["down"], b["down"]], 1),
        "error of down": a["error of down"],  # of the sum, and not of a rank's part of it
    }
    assert torch.equal(a["y"], b["y"])
    # values of fp8 are equal bit for bit; sums over ranks round otherwise
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-5, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


class Sent(TorchDispatchMode):
    """Bytes that each gather sends, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if "all_gather_into_tensor" in str(op):
            self.bytes.append(args[0].numel() * args[0].itemsize)
        return op(*args, **(kwargs or {}))


def with_rows_cut(recipe: Any, dtype: torch.dtype) -> dict[str, Any]:
    """A column-parallel layer that sends rounded rows, and one that collects them first."""
    axis = Mesh.of(tp=2).at(torch.distributed.get_rank()).connect().axis("tp")
    tp = TensorParallel(axis, sequence=True)
    found: dict[str, Any] = {}
    for how in ("sent", "first"):
        layer = ColumnParallelLinear(48, 64, tp, init=normal(1.0), bias=True)
        initialise(layer, seed=1)
        layer.to(dtype)
        layer.product = product = Quantised(recipe, axis)
        x = leaf(2, 32, 48, dtype=dtype, seed=5 + axis.rank)
        kept: list[int] = []
        with (
            Sent() as sent,
            torch.autograd.graph.saved_tensors_hooks(lambda y: (kept.append(y.numel()), y)[1], lambda y: y),  # noqa: B023
        ):
            y = layer(x) if how == "sent" else product(tp.enter(x), layer.weight, layer.bias)
        y.backward(leaf(2, 64, 32, dtype=dtype, seed=7).detach())
        of_weight, of_bias = layer.weight.grad, layer.bias.grad
        found[how] = {"y": y.detach(), "x": x.grad, "weight": of_weight, "bias": of_bias}
        found[f"{how} bytes"], found[f"{how} kept"] = sent.bytes, max(kept)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", EXAMPLES, ids=name_of)
def test_rows_that_travel_rounded_give_the_bits_of_rows_that_are_rounded_when_they_have_come(recipe, dtype):
    for found in run(with_rows_cut, 2, recipe, dtype):
        for name, tensor in found["first"].items():
            assert torch.equal(found["sent"][name], tensor), name
        values = 2 * 32 * (64 if getattr(recipe, "kind", "") == "mx" else 48)  # which fills blocks of 32 up
        scales = {"tensorwise": [], "mx": [2 * 32 * 2 * 4]}.get(getattr(recipe, "kind", ""), [2 * 32 * 4])
        assert found["sent bytes"] == [values, *scales]
        assert found["first bytes"] == [2 * 32 * 48 * dtype.itemsize]
        assert found["sent kept"] == 2 * 32 * 48  # its own rows
        assert found["first kept"] == 2 * 64 * 48


def test_stochastic_rounding_to_int8_is_exact_in_the_mean():
    n = 10_000
    value, scale = 3.3, 10.0 / 127
    rows = torch.full((n, 2), value)
    rows[:, 1] = 10.0 + torch.arange(n) * 1e-5  # other scales, other bits
    rounded = Int8().round(rows, GRADIENT, ALONE)
    found = (rounded.values.float() * rounded.scale)[:, 0]
    chance = value / scale % 1
    assert abs(found.mean() - value) < 3 * scale * math.sqrt(chance * (1 - chance) / n)
    assert len(found.round(decimals=2).unique()) > 1


def test_stochastic_rounding_does_not_ask_which_rows_come_together():
    rows = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    whole = Int8().round(rows, GRADIENT, ALONE).values
    assert torch.equal(whole[40:], Int8().round(rows[40:], GRADIENT, ALONE).values)
    assert not torch.equal(whole, Int8(stochastic_rounding=False).round(rows, GRADIENT, ALONE).values)


MODEL = Decoder(d_model=32, n_layers=4, n_heads=2, d_ff=48)


def decoder(n_layers: int = MODEL.n_layers) -> Any:
    model = dataclasses.replace(MODEL, n_layers=n_layers).build(n_valid=31, seq_len=8)
    initialise(model, seed=0)
    return model


def test_layers_are_chosen_by_pattern_size_and_block():
    down = [f"layers.{i}.feed_forward.down" for i in range(4)]
    assert set(quantise(decoder(), Fp8(min_size=0, layers="*.down"), 4)) == {down[1], down[2]}
    every = Fp8(min_size=0, keep_first=0, keep_last=0)
    model = decoder()
    products = quantise(model, every, 4)
    assert set(products) == set(linears(model))
    assert all(linears(model)[name].product is product for name, product in products.items())
    large = quantise(decoder(), dataclasses.replace(every, min_size=96 * 32), 4)
    assert {name.split(".")[-1] for name in large} == {"gate_up", "to_qkv"}


@pytest.mark.parametrize(
    ("selection", "n_heads", "words"),
    [
        (Fp8(), 2, "precision.fp8 is for none of the model's layers: with layers=*, min_size=1048576"),
        (Fp8(min_size=0, layers="*.dwon"), 2, "layers=*.dwon"),
        (Fp8(min_size=0), 2, "layers.1.feed_forward.gate_up has 72 outputs on a rank, which is no multiple of 16"),
    ],
)
def test_layers_that_cannot_be_are_refused_by_name(selection, n_heads, words):
    model = dataclasses.replace(MODEL, d_ff=36).build(n_valid=31, seq_len=8)
    assert words in " ".join(selection_problems(model, selection, 4, "precision.fp8"))
    assert selection_problems(decoder(), Fp8(min_size=0), 4, "precision.fp8") == []


def test_a_product_measures_its_error_against_the_format_of_the_run():
    product = Quantised(Fp8())
    x, w, _ = operands()
    for demoted in (False, True):
        product.measuring, product.demoted = torch.zeros(5), demoted
        y = product(x, w, None)
        error, size, ends, zeros, count = product.measuring.tolist()
        assert 0.01 < math.sqrt(error / size) < 0.06
        assert count == x.numel() + w.numel()
        assert ends >= 2
        assert zeros < count / 100
        assert torch.equal(y, F.linear(x, w)) is demoted or demoted
    product.measuring = torch.zeros(5)
    with torch.no_grad():
        w[0, 0] = 1e7  # all other weights become 0
    product(x * (torch.arange(48) > 0), w, None)
    error, size, _, zeros, _ = product.measuring.tolist()
    assert error / size > 0.5
    assert zeros > 1000
