"""From a tree to frozen dataclasses: what each type of field accepts, and every problem at once."""

from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.base.errors import ConfigError
from megatrain.base.registry import Registry
from megatrain.config.build import build, flat, plain
from megatrain.config.source import Node, read

NORM: Registry[Any] = Registry("norm", "tests_config_norm")
HOOK: Registry[Any] = Registry("hook", "tests_config_norm")


@pytest.fixture(autouse=True)
def scanned_package(monkeypatch):
    """The registries' package to scan: empty, since their members stand in this file."""
    package = ModuleType("tests_config_norm")
    package.__path__ = []
    monkeypatch.setitem(__import__("sys").modules, "tests_config_norm", package)


@NORM.register("rms")
@dataclass(frozen=True, kw_only=True)
class RMS:
    eps: float = 1e-5
    placement: Literal["pre", "post"] = "pre"

    def problems(self) -> list[str]:
        return ["eps must be above 0"] if self.eps <= 0 else []


@NORM.register("layer")
@dataclass(frozen=True, kw_only=True)
class Layer:
    bias: bool = True


@HOOK.register("spike")
@dataclass(frozen=True, kw_only=True)
class Spike:
    factor: float


@dataclass(frozen=True)
class Train:
    steps: int | None = None
    tokens: Annotated[int | None, "tokens"] = None
    async_: bool = True
    betas: tuple[float, float] = (0.9, 0.95)
    limit: Annotated[int, "bytes"] = 2**30

    def problems(self) -> list[str]:
        return ["give steps or tokens, exactly one"] if (self.steps is None) == (self.tokens is None) else []


@dataclass(frozen=True)
class Root:
    name: str
    train: Train
    norm: Annotated[Any, NORM] = field(default_factory=RMS)
    final_norm: Annotated[Any | None, NORM] = None
    hooks: Annotated[tuple[Any, ...], HOOK] = ()
    more: tuple[Annotated[Any, NORM], ...] = ()
    compile: Literal["auto", True, False] = "auto"
    stages: Literal["auto"] | tuple[int, ...] = "auto"
    label: str | int | None = None
    weights: dict[str, float] = field(default_factory=dict)
    lr: float = 0.1
    KNOWN: ClassVar[int] = 3

    @cached_property
    def derived(self) -> str:
        return self.name * 2


MINIMAL = "name: x\ntrain: {steps: 1}\n"


@pytest.fixture
def made(tmp_path):
    """Root from MINIMAL and the text given; or its problems, where it is refused."""

    def make(text: str = "", *words: str, cls: type = Root) -> Any:
        (tmp_path / "run.yaml").write_text(MINIMAL + text)
        return build(cls, read(tmp_path / "run.yaml", words), also_allowed=("base",))

    return make


def problems(made, text: str = "", *words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        made(text, *words)
    return caught.value.problems


# ------------------------------------------------------------------------------------------------ what is accepted


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("lr=1", "lr", 1.0),
        ("lr=3e-4", "lr", 3e-4),
        ("train.steps=2.0", "steps", 2),
        ("train.limit=2GiB", "limit", 2**31),
        ("train.async=false", "async_", False),
        ("train.betas=[0.9, 1]", "betas", (0.9, 1.0)),
        ("name=7", "name", "7"),
        ("label=7", "label", 7),
        ("label=seven", "label", "seven"),
        ("label=null", "label", None),
        ("compile=true", "compile", True),
        ("compile=auto", "compile", "auto"),
        ("stages=[3, 4]", "stages", (3, 4)),
        ("stages=auto", "stages", "auto"),
        ("weights={a: 1, b: 2.5}", "weights", {"a": 1.0, "b": 2.5}),
        ("norm=layer", "norm", Layer()),
        ("norm={kind: rms, eps: 0.5}", "norm", RMS(eps=0.5)),
        ("final_norm=rms", "final_norm", RMS()),
        ("final_norm=null", "final_norm", None),
        ("hooks=[{kind: spike, factor: 3}]", "hooks", (Spike(factor=3.0),)),
        ("more=[rms, {kind: layer, bias: false}]", "more", (RMS(), Layer(bias=False))),
    ],
)
def test_each_type_of_field_takes_what_it_says(made, word, key, value):
    root, _ = made("", word)
    found = getattr(root.train if hasattr(root.train, key) else root, key)
    assert found == value
    assert type(found) is type(value)


def test_a_quantity_may_stand_alone(made):
    root, _ = made("", "train.steps=null", "train.tokens=4B tokens")
    assert root.train.tokens == 4 * 10**9


def test_every_value_has_an_origin_and_defaults_say_so(made, tmp_path):
    root, origins = made("norm: {kind: rms, eps: 2}\n", "train.steps=5")
    assert origins["name"] == f"{tmp_path}/run.yaml:1"
    assert origins["norm.kind"] == origins["norm.eps"] == f"{tmp_path}/run.yaml:3"
    assert origins["train.steps"] == "command line"
    assert origins["norm.placement"] == origins["lr"] == origins["train.async"] == "default"
    scalars = {k for k, v in flat(plain(root)).items() if not isinstance(v, list | dict)}
    assert scalars - {"train.betas.0", "train.betas.1"} <= set(origins)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("nam=x", "nam (command line) is not a key: did you mean name? (allowed: base, compile, final_norm, "),
        ("bas=x", "did you mean base?"),
        ("train.step=1", "train.step (command line) is not a key: did you mean steps?"),
        ("norm.esp=1", "has no kind: (allowed: layer, rms)"),
        ("norm={kind: rms, esp: 1}", "norm.esp (command line) is not a key of norm rms: did you mean eps?"),
        ("norm={kin: rms}", "norm (command line) has no kind: did you mean kind instead of kin? (allowed: layer, rms)"),
        ("norm={}", "norm (command line) has no kind: (allowed: layer, rms)"),
        ("norm=rsm", "norm.kind (command line) is 'rsm', which is no norm: did you mean rms? (allowed: layer, rms)"),
        ("norm={kind: [rms]}", "which is no norm"),
        ("norm=3", "norm (command line) is 3: it must name a norm kind"),
        ("norm={kind: rms, eps: -1}", "norm: eps must be above 0"),
        ("norm={kind: rms, placement: pree}", "norm.placement (command line) is 'pree': did you mean 'pre'?"),
        ("lr=fast", "lr (command line) is 'fast': it must be a number"),
        ("lr=true", "lr (command line) is true: it must be a number"),
        ("lr=.nan", "lr (command line) is nan: it must be a finite number"),
        ("lr=-.inf", "lr (command line) is -inf: it must be a finite number"),
        ("train.steps=1.5", "train.steps (command line) is 1.5: it must be a whole number"),
        ("train.steps=.inf", "train.steps (command line) is inf: it must be a whole number"),
        ("train.async=1", "train.async (command line) is 1: it must be true or false"),
        ("train.betas=[1]", "train.betas (command line) has 1 elements: it must have 2"),
        ("train.betas=0.9", "train.betas (command line) is 0.9: it must be a list"),
        ("train.betas=[0.9, x]", "train.betas.1 (command line) is 'x': it must be a number"),
        ("train.limit=80 tokens", "train.limit (command line) is wrong: '80 tokens' is not a number of bytes"),
        ("train.limit=[1]", "[1] is not a number of bytes"),
        ("train=3", "train (command line) is 3: it must hold keys (steps, tokens, async, betas, limit)"),
        ("compile=1", "compile (command line) is 1: "),
        ("compile=maybe", "allowed: 'auto', false, true"),
        ("stages=x", "stages (command line) is 'x': it must be 'auto' or a list"),
        ("label=[1]", "label (command line) is [1]: it must be text or a whole number"),
        ("weights=3", "weights (command line) is 3: it must be a mapping"),
        ("weights={a: x}", "weights.a (command line) is 'x': it must be a number"),
        ("hooks=spike", "hooks (command line) is 'spike': it must be a list"),
        ("hooks=[spike]", "hooks.0.factor is missing (needed by command line): give it a value"),
        ("train.steps=null", "train: give steps or tokens, exactly one"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_sentence_that_says_where(made, word, message):
    text = "norm: {}\n" if word.startswith("norm.") else ""
    found = problems(made, text, word)
    assert len(found) == 1
    assert message in found[0]


def test_all_problems_are_shown_at_once(made):
    text = "lr: fast\ncompil: true\nnorm: {kind: rms, eps: x, esp: 1}\nhooks: [{kind: spike}, {kind: spyke}]\n"
    found = problems(made, text, "train.step=1", "train.betas=[a, b]")
    keys = [
        "lr",
        "compil",
        "norm.eps",
        "norm.esp",
        "hooks.0.factor",
        "hooks.1.kind",
        "train.step",
        "train.betas.0",
        "train.betas.1",
    ]
    for key in keys:
        assert sum(f"{key} " in problem for problem in found) == 1, key
    assert len(found) == len(keys)


_KEYS = ["name", "train", "norm", "final_norm", "hooks", "compile", "stages", "weights", "train.steps", "train.limit"]


@given(st.sampled_from(_KEYS), st.data())
def test_a_key_with_one_letter_changed_is_always_refused(key, data):
    at = data.draw(st.integers(len(key) - len(key.split(".")[-1]), len(key) - 1))
    letter = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"))
    typo = key[:at] + letter + key[at + 1 :]
    if typo == key:
        return
    tree: dict[str, Any] = {"name": "x", "train": {"steps": 1}}
    place, last = (tree["train"], typo.split(".")[1]) if "." in typo else (tree, typo)
    place[last] = 1
    with pytest.raises(ConfigError, match=f"{typo} .* is not a key"):
        build(Root, nodes(tree))


def test_a_field_without_annotation_is_a_mistake_in_the_code(made):
    @dataclass(frozen=True)
    class Wrong:
        name: str
        train: Any
        steps = 3

    with pytest.raises(TypeError, match=r"Wrong\.steps has no annotation, so it is not a field"):
        made(cls=Wrong)


# ------------------------------------------------------------------------------------------------ and back


def nodes(value: Any) -> Node:
    if isinstance(value, dict):
        return Node({k: nodes(v) for k, v in value.items()}, "test")
    return Node([nodes(v) for v in value] if isinstance(value, list) else value, "test")


_FLOATS = st.floats(allow_nan=False, allow_infinity=False)
_NORMS = st.builds(RMS, eps=st.floats(1e-9, 10), placement=st.sampled_from(["pre", "post"])) | st.builds(
    Layer, bias=st.booleans()
)
_TRAINS = st.builds(Train, tokens=st.integers(0, 2**60)) | st.builds(
    Train, steps=st.integers(), async_=st.booleans(), betas=st.tuples(_FLOATS, _FLOATS), limit=st.integers(0, 2**70)
)
_ROOTS = st.builds(
    Root,
    name=st.text(),
    train=_TRAINS,
    norm=_NORMS,
    final_norm=st.none() | _NORMS,
    hooks=st.lists(st.builds(Spike, factor=_FLOATS), max_size=2).map(tuple),
    more=st.lists(_NORMS, max_size=2).map(tuple),
    compile=st.sampled_from(["auto", True, False]),
    stages=st.just("auto") | st.lists(st.integers(), max_size=3).map(tuple),
    label=st.none() | st.integers() | st.text(),
    weights=st.dictionaries(st.text(min_size=1), _FLOATS, max_size=2),
    lr=_FLOATS,
)


@given(_ROOTS)
def test_a_configuration_as_plain_values_builds_the_same_again(root):
    assert build(Root, nodes(plain(root)))[0] == root


def test_flat_keys_address_every_scalar():
    root = Root("x", Train(steps=1), more=(RMS(),))
    keys = flat(plain(root))
    assert keys["more.0.kind"] == "rms"
    assert keys["train.async"] is True
    assert keys["hooks"] == []
    assert keys["weights"] == {}
