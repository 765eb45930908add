"""What cannot be laid out is refused before anything starts: each with its arithmetic and with what would do."""

from pathlib import Path

import pytest

from megatrain.base.errors import ConfigError
from megatrain.cli.main import main
from megatrain.train.check import refuse
from megatrain.train.config import read_run
from tests.layouts.sides import small_run
from tests.layouts.test_parity import COMMON

REFUSED: list[tuple[int, str, str]] = [
    # ranks, what is set, words of the sentence
    # --- heads, widths, vocabulary
    (4, "model.n_heads=6 model.n_kv_heads=6 model.head_dim=8 layout.tp=4",
     "model.n_heads=6 cannot be split over tp=4: pick tp from [1, 2, 3, 6], or change model.n_heads"),
    (3, "layout.tp=3", "model.n_heads=8 cannot be split over tp=3: pick tp from [1, 2, 4, 8]"),
    (6, "model.n_heads=12 model.head_dim=8 model.n_kv_heads=4 layout.tp=6",
     "model.n_kv_heads=4 can be neither split over tp=6 nor held by equally many of its ranks: pick tp from "
     "[1, 2, 4, 12]"),
    (4, "model.d_ff=50 layout.tp=4", "model.d_ff=50 cannot be split over tp=4: pick tp from [1, 2, 5, 10, 25, 50]"),
    (2, "model.d_ff=49 layout.tp=2", "model.d_ff=49 cannot be split over tp=2: pick tp from [1, 7, 49]"),
    (4, "model.attention.kind=causal model.attention.qk_norm=true model.attention.qk_norm_over=width layout.tp=4",
     "model.n_kv_heads=2 under tp=4 puts a head on several ranks, which a norm over all heads would count more than "
     "once: pick tp from [1, 2], or set attention.qk_norm_over=head"),
    (1, "model.d_model=33", "d_model=33 does not divide by n_heads=8: pick n_heads from [1, 3, 11, 33]"),
    (1, "model.n_kv_heads=3", "n_kv_heads=3 does not divide n_heads=8: pick it from [1, 2, 4, 8]"),
    (1, "model.head_dim=7", "rotary positions turn pairs, and head_dim=7 is odd"),
    (1, "model.n_heads=0", "n_heads=0: it must be at least 1"),
    (1, "model.n_layers=0", "n_layers=0: it must be at least 1"),
    (1, "model.d_ff=0", "d_ff=0: it must be at least 1"),
    (1, "model.dropout=1.0", "dropout=1.0: it is a share from 0 to below 1"),
    (1, "model.vocab_size=10",
     "model.vocab_size=10 is smaller than the tokenizer's vocabulary of 300: leave it out, or set 300"),
    # --- ranks
    (6, "layout.tp=4",
     "tp x pp x cp = 4 x 1 x 1 = 4 does not divide the 6 ranks of this run: start a multiple of 4 ranks, "
     "or pick tp from [1, 2, 3, 6]"),
    (8, "layout.tp=2 layout.cp=2 layout.pp=3",
     "tp x pp x cp = 2 x 3 x 2 = 12 does not divide the 8 ranks of this run: start a multiple of 12 ranks, or make "
     "pp x cp a divisor of 8"),
    (7, "layout.cp=2",
     "tp x pp x cp = 1 x 1 x 2 = 2 does not divide the 7 ranks of this run: start a multiple of 2 ranks"),
    (8, "layout.tp=2 layout.dp=3",
     "layout.dp=3, but 8 ranks / (tp x pp x cp = 2 x 1 x 1 = 2) = 4: leave dp out, or start 6"),
    (2, "layout.dp=4", "layout.dp=4, but 2 ranks / (tp x pp x cp = 1 x 1 x 1 = 1) = 2: leave dp out, or start 4 ranks"),
    (1, "layout.tp=0", "tp=0: it must be at least 1"),
    (1, "layout.cp=-1", "cp=-1: it must be at least 1"),
    (1, "layout.dp=0", "dp=0: it must be at least 1"),
    (1, "layout.pp=0", "pp=0: it must be at least 1"),
    (1, "layout.micro_batch=0", "micro_batch=0: it must be at least 1"),
    (1, "layout.tp=two", "layout.tp (command line) is 'two': it must be a whole number"),
    (1, "layout.tpp=2", "layout.tpp (command line) is not a key: did you mean tp?"),
    # --- engines
    (1, "layout.engine=deepsped", "engine is 'deepsped', which is no engine: did you mean deepspeed?"),
    (2, "layout.zero=4", "zero=4 is no stage of ZeRO: pick 0, 1, 2 or 3"),
    (2, "layout.engine=plain layout.zero=1", "the plain engine shards nothing, so layout.zero=1 is not for it"),
    (2, "layout.engine=fsdp2 layout.zero=1",
     "so layout.zero=1 is not for it: set 2 or 3, or set layout.engine=deepspeed"),
    (4, "layout.pp=2 layout.engine=fsdp2 layout.zero=3", "set layout.zero=2, or layout.engine=deepspeed"),
    (4, "layout.pp=2 layout.engine=deepspeed layout.zero=3",
     "set layout.zero=2, model.tie_embeddings=false, or layout.schedule to zbv or dualpipev"),
    (1, "layout.compile=maybe", "layout.compile (command line) is 'maybe': allowed: 'auto', false, true"),
    (1, "layout.recompute=first", "names no block from 0 to 3: use one of them, or numbers such as 0-3 or 0,2,4"),
    (1, "layout.recompute=norms layout.compile=false", "is for compiled blocks and compile is false: set compile=true"),
    (1, "precision.parameters=bf16", "set compute=bf16, or parameters=fp32"),
    # --- batches
    (3, "layout.engine=plain",
     "train.global_batch=16 does not divide over dp=3 (= 3 ranks / (tp 1 x pp 1 x cp 1)): use a multiple of 3, or "
     "pick dp from [1, 2, 4, 8, 16]"),
    (4, "train.global_batch=6", "use a multiple of 4, or pick dp from [1, 2, 3, 6]"),
    (2, "layout.micro_batch=3", "layout.micro_batch=3 does not divide the 8 sequences that each rank has "
     "(train.global_batch 16 / dp 2): pick it from [1, 2, 4, 8]"),
    (1, "train.global_batch=0", "global_batch=0: it must be at least 1"),
    # --- sequences
    (3, "layout.cp=3", "data.seq_len=32 cannot be cut into 2 x cp = 6 equal chunks, two a rank: pick cp from "
     "[1, 2, 4, 8, 16], make data.seq_len a multiple of 6, or set layout.cp_kind=ulysses"),
    (2, "data.seq_len=31 layout.cp=2 layout.cp_kind=ulysses",
     "data.seq_len=31 cannot be cut over cp=2: pick cp from [1, 31]"),
    (4, "data.seq_len=34 layout.tp=4",
     "data.seq_len=34 / cp 1 cannot be cut over tp=4: pick tp from [1, 2, 17, 34], or set "
     "layout.sequence_parallel=false"),
    (8, "data.seq_len=20 layout.tp=4 layout.cp=2",
     "data.seq_len=20 / cp 2 cannot be cut over tp=4: pick tp from [1, 2, 5, 10]"),
    (2, "layout.cp=2 layout.cp_kind=rign", "cp_kind is 'rign': did you mean ring? (allowed: ring, ulysses)"),
    (4, "layout.cp=2 layout.tp=2 layout.cp_kind=ulysses",
     "model.n_kv_heads=2 leaves 1 heads on a tensor-parallel rank, which cp=2 cannot share: pick cp from [1], change "
     "model.n_kv_heads, or set layout.cp_kind=ring"),
    (4, "layout.cp=4 layout.cp_kind=ulysses",
     "pick cp from [1, 2], change model.n_kv_heads, or set layout.cp_kind=ring"),
    (1, "data.seq_len=0", "data.seq_len is 0: it must be at least 1"),
    # --- pipelines
    (8, "layout.pp=8",
     "model.n_layers=4 cannot make pp 8 x virtual 1 = 8 stages of at least one layer: set model.n_layers to "
     "8 or more, or pick pp from [2, 4]"),
    (2, "layout.pp=2 layout.stages=[2,1]",
     "layout.stages: 2 + 1 = 3 layers, and model.n_layers=4: make them add up to it"),
    (2, "layout.pp=2 layout.stages=[4]", "layout.stages lists 1 stages and pp 2 x virtual 1 = 2 are run"),
    (2, "layout.pp=2 layout.stages=[4,0]",
     "layout.stages=[4, 0] leaves stage 1 without a layer: give every stage at least 1"),
    (2, "layout.pp=2 layout.schedule=interleaved layout.virtual=3",
     "model.n_layers=4 cannot make pp 2 x virtual 3 = 6 stages of at least one layer"),
    (2, "layout.pp=2 layout.schedule=gpipe layout.virtual=2", "layout.virtual=2: schedule gpipe runs 1 stages a rank"),
    (2, "layout.pp=2 layout.schedule=1f2b", "schedule is '1f2b': did you mean 1f1b?"),
    (2, "layout.pp=2 layout.schedule=dualpipev train.global_batch=2",
     "schedule dualpipev needs at least 2 x pp = 4 micro-batches and a step has 2: pick a smaller "
     "layout.micro_batch or pp"),
    (2, "layout.pp=2 train.global_batch=2 layout.micro_batch=2",
     "schedule 1f1b needs at least pp = 2 micro-batches and a step has 1"),
    (2, "layout.pp=2 layout.schedule=interleaved train.global_batch=5",
     "schedule interleaved takes the 5 micro-batches of a step in 5 // pp 2 = 2 equal rounds, which does not divide: "
     "change layout.micro_batch or train.global_batch to make it 4 or 6"),
    (1, "layout.virtual=2", "virtual=2 is for a pipeline and pp is 1: leave it out, or set pp to 2 or more"),
    (1, "layout.stages=[2,2]", "is for a pipeline and pp is 1: leave it out, or set pp to 2 or more"),
]  # fmt: skip


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory, text_data: Path) -> str:
    return small_run(tmp_path_factory.mktemp("refusals"), text_data, **COMMON)


@pytest.mark.parametrize(("ranks", "settings", "words"), REFUSED, ids=[f"{n} {text}" for n, text, _ in REFUSED])
def test_what_cannot_be_laid_out_is_refused_with_what_would(ranks, settings, words, run_file):
    with pytest.raises(ConfigError) as refusal:
        refuse(read_run(run_file, settings.split()).run, ranks)
    assert words in str(refusal.value)


@pytest.mark.parametrize("layout", ["", "layout.tp=2", "layout.pp=2"])
def test_a_pattern_need_only_match_a_parameter_of_some_rank(layout, run_file):
    ranks = 2 if layout else 1
    for pattern in ("embedding.*", "layers.0.*", "layers.3.*"):
        groups = f'optimizer.groups=[{{"match":"{pattern}","lr_scale":0.5}}]'
        refuse(read_run(run_file, [*layout.split(), groups]).run, ranks)
    groups = 'optimizer.groups=[{"match":"layers.4.*","lr_scale":0.5}]'
    with pytest.raises(ConfigError, match=r"optimizer\.groups\.0\.match is 'layers\.4\.\*', which is the name of no"):
        refuse(read_run(run_file, [*layout.split(), groups]).run, ranks)


def test_the_run_itself_is_legal(run_file):
    refuse(read_run(run_file, ()).run, 1)
    assert len(REFUSED) >= 40


def test_all_that_is_wrong_is_said_at_once_with_exit_code_2(run_file, capsys):
    settings = ["model.n_heads=6", "model.n_kv_heads=6", "model.head_dim=8", "model.d_ff=50", "layout.recompute=x"]
    layout = "tp=4,dp=2,engine=plain,micro_batch=3"
    with pytest.raises(SystemExit) as left:
        main(["verify", run_file, "--layout", layout, *settings])
    assert left.value.code == 2
    said = capsys.readouterr().err
    for words in ("micro_batch=3 does not divide", "n_heads=6 cannot", "d_ff=50 cannot", "layout.recompute is 'x'"):
        assert words in said
    assert "Traceback" not in said
