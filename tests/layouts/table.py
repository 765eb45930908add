"""The layouts that are proven equal to one process, a line each: (run, layout). To add one, add a line.

`ROWS` holds every pair of values of the axes below that is possible at all on up to 8 ranks (a test counts them).
"""

import itertools

Row = tuple[str, str]

CI: list[Row] = [
    ("llama", "tp=2,cp=2,engine=fsdp2,zero=3,micro_batch=2,recompute=selective"),
    ("llama", "tp=4,pp=1,engine=plain,micro_batch=4,recompute=full"),
    ("untied", "cp=2,cp_kind=ulysses,dp=2,engine=plain,micro_batch=2"),
    ("gpt", "tp=2,sequence_parallel=false,pp=2,schedule=interleaved,engine=plain,micro_batch=2"),
    ("window", "cp=2,dp=2,engine=deepspeed,zero=1"),
    ("window", "tp=2,pp=2,schedule=dualpipev,engine=plain,recompute=selective"),
    ("best_fit", "dp=2,engine=deepspeed,zero=2,micro_batch=4"),
    ("best_fit", "tp=2,dp=2,engine=deepspeed,zero=3"),
]
"""A few of each kind, quick enough for every change."""

ROWS: list[Row] = [
    ("gpt", "cp=2,engine=fsdp2,zero=2,micro_batch=2,recompute=selective"),
    ("untied", "dp=2,pp=2,engine=deepspeed,recompute=full,compile=true"),
    ("llama", "tp=2,dp=4,engine=fsdp2,zero=3,micro_batch=4"),
    (
        "untied",
        "tp=2,sequence_parallel=false,cp=2,cp_kind=ulysses,pp=2,schedule=zbv,engine=fsdp2,zero=2,micro_batch=4,compile=true",
    ),
    ("untied", "tp=4,pp=2,schedule=gpipe,engine=plain,micro_batch=2,recompute=selective,compile=true"),
    ("window", "tp=2,cp=2,pp=2,schedule=interleaved_zero_bubble,engine=deepspeed,zero=1,recompute=full,compile=true"),
    ("best_fit", "cp=2,cp_kind=ulysses,dp=2,pp=2,schedule=interleaved,engine=plain"),
    (
        "best_fit",
        "tp=2,sequence_parallel=false,cp=2,pp=2,schedule=looped_bfs,engine=deepspeed,micro_batch=4,recompute=selective",
    ),
    ("window", "dp=4,pp=2,schedule=dualpipev,engine=deepspeed,zero=3,recompute=selective"),
    ("untied", "tp=2,cp=2,cp_kind=ulysses,pp=2,schedule=dualpipev,engine=fsdp2,zero=2,micro_batch=2,recompute=full"),
    (
        "gpt",
        "tp=2,sequence_parallel=false,dp=2,pp=2,schedule=dualpipev,engine=deepspeed,zero=2,micro_batch=2,compile=true",
    ),
    ("llama", "cp=2,dp=2,pp=2,schedule=zbv,engine=deepspeed,zero=3,micro_batch=4,recompute=full,compile=true"),
    ("gpt", "tp=2,dp=2,pp=2,schedule=gpipe,engine=deepspeed,zero=1,micro_batch=4,recompute=selective"),
    ("best_fit", "tp=4,sequence_parallel=false,dp=2,engine=fsdp2,zero=2,recompute=full,compile=true"),
    ("llama", "cp=2,cp_kind=ulysses,pp=2,engine=deepspeed,zero=1,micro_batch=2,recompute=selective"),
    ("llama", "tp=4,pp=2,schedule=dualpipev,engine=plain,micro_batch=4,recompute=full"),
    ("llama", "dp=4,pp=2,schedule=looped_bfs,engine=deepspeed,zero=2,recompute=full,compile=true"),
    ("gpt", "dp=4,pp=2,schedule=interleaved_zero_bubble,engine=deepspeed,micro_batch=2"),
    (
        "window",
        "tp=2,sequence_parallel=false,cp=2,pp=2,schedule=interleaved,engine=deepspeed,zero=1,micro_batch=4,compile=true",
    ),
    (
        "window",
        "cp=2,cp_kind=ulysses,dp=2,pp=2,schedule=interleaved_zero_bubble,engine=deepspeed,zero=2,micro_batch=4,recompute=selective",
    ),
    ("gpt", "tp=2,sequence_parallel=false,cp=2,pp=2,engine=plain,recompute=full"),
    ("window", "tp=4,sequence_parallel=false,pp=2,schedule=zbv,engine=plain,micro_batch=2,recompute=selective"),
    ("untied", "tp=4,cp=2,cp_kind=ulysses,engine=fsdp2,zero=3,compile=true"),
    ("untied", "tp=2,cp=2,cp_kind=ulysses,pp=2,schedule=looped_bfs,engine=deepspeed,zero=3,micro_batch=2,compile=true"),
    (
        "untied",
        "tp=2,cp=2,pp=2,schedule=interleaved,engine=deepspeed,zero=2,micro_batch=2,recompute=selective,compile=true",
    ),
    ("gpt", "tp=4,sequence_parallel=false,pp=2,schedule=looped_bfs,engine=plain,micro_batch=4,compile=true"),
    ("best_fit", "cp=2,dp=4,engine=fsdp2,zero=3,micro_batch=2,recompute=full"),
    ("window", "tp=4,cp=2,engine=deepspeed,micro_batch=4"),
    ("gpt", "tp=4,pp=2,schedule=looped_bfs,engine=plain,recompute=selective,compile=true"),
    ("best_fit", "tp=2,dp=2,pp=2,schedule=zbv,engine=deepspeed,zero=2,recompute=full"),
    ("llama", "tp=2,sequence_parallel=false,cp=2,pp=2,schedule=gpipe,engine=fsdp2,zero=2,recompute=full,compile=true"),
    ("untied", "tp=2,cp=2,cp_kind=ulysses,pp=2,engine=deepspeed,zero=3,micro_batch=4,compile=true"),
    ("llama", "dp=4,pp=2,schedule=interleaved,engine=fsdp2,zero=2,micro_batch=2,recompute=full,compile=true"),
    (
        "untied",
        "tp=2,sequence_parallel=false,dp=2,pp=2,schedule=interleaved_zero_bubble,engine=fsdp2,zero=2,micro_batch=4",
    ),
    ("window", "dp=4,pp=2,engine=fsdp2,zero=2,micro_batch=2,recompute=selective,compile=true"),
    ("untied", "dp=4,pp=2,schedule=zbv,engine=deepspeed,zero=1,micro_batch=2,recompute=selective,compile=true"),
    ("window", "tp=2,sequence_parallel=false,dp=2,engine=fsdp2,zero=3,recompute=selective,compile=true"),
    ("untied", "cp=2,cp_kind=ulysses,pp=2,schedule=gpipe,engine=deepspeed,zero=3,micro_batch=4"),
    ("llama", "tp=4,sequence_parallel=false,cp=2,engine=deepspeed,zero=3,micro_batch=4,recompute=full,compile=true"),
    ("gpt", "tp=2,sequence_parallel=false,dp=4,engine=plain,micro_batch=4,recompute=selective"),
    ("best_fit", "tp=4,pp=2,schedule=interleaved_zero_bubble,engine=plain,micro_batch=4,recompute=selective"),
    ("gpt", "cp=2,cp_kind=ulysses,pp=2,engine=deepspeed,zero=2,recompute=full,compile=true"),
    ("best_fit", "tp=4,pp=2,engine=plain,micro_batch=2,compile=true"),
    ("gpt", "tp=2,cp=2,cp_kind=ulysses,pp=2,schedule=interleaved,engine=deepspeed"),
    ("untied", "tp=4,sequence_parallel=false,cp=2,cp_kind=ulysses,engine=deepspeed,zero=1,recompute=full,compile=true"),
    ("gpt", "tp=4,sequence_parallel=false,dp=2,engine=fsdp2,zero=3,recompute=selective"),
    ("best_fit", "cp=2,pp=2,schedule=dualpipev,engine=deepspeed,zero=1,micro_batch=4,recompute=selective"),
    ("gpt", "tp=4,dp=2,engine=deepspeed,zero=3,micro_batch=4,recompute=selective"),
    ("best_fit", "tp=2,sequence_parallel=false,cp=2,engine=deepspeed,zero=3,compile=true"),
    ("window", "tp=4,sequence_parallel=false,dp=2,engine=deepspeed,zero=2,micro_batch=4"),
    ("best_fit", "dp=4,pp=2,schedule=gpipe,engine=deepspeed,micro_batch=2"),
    (
        "window",
        "tp=4,sequence_parallel=false,pp=2,schedule=gpipe,engine=plain,micro_batch=2,recompute=full,compile=true",
    ),
    ("window", "tp=4,sequence_parallel=false,pp=2,schedule=dualpipev,engine=plain,compile=true"),
    ("llama", "tp=4,sequence_parallel=false,dp=2,engine=deepspeed,micro_batch=4,recompute=full"),
    ("gpt", "tp=4,pp=2,schedule=interleaved,engine=plain,micro_batch=4,recompute=full,compile=true"),
    ("window", "dp=2,pp=2,schedule=looped_bfs,engine=deepspeed,zero=1,micro_batch=2,recompute=selective,compile=true"),
    ("best_fit", "dp=2,pp=2,schedule=dualpipev,engine=deepspeed"),
    ("llama", "tp=2,pp=2,schedule=interleaved_zero_bubble,engine=plain,micro_batch=2,recompute=selective,compile=true"),
    ("gpt", "dp=2,pp=2,schedule=zbv,engine=deepspeed,recompute=full"),
    ("untied", "tp=4,sequence_parallel=false,pp=2,schedule=interleaved,engine=plain,micro_batch=2,recompute=full"),
    ("gpt", "tp=4,cp=2,engine=deepspeed,zero=1,micro_batch=2,recompute=full,compile=true"),
    (
        "gpt",
        "tp=4,sequence_parallel=false,pp=2,schedule=interleaved_zero_bubble,engine=plain,micro_batch=4,recompute=selective",
    ),
    ("gpt", "tp=4,dp=2,engine=deepspeed,zero=2,micro_batch=4,recompute=selective"),
    (
        "untied",
        "cp=2,cp_kind=ulysses,pp=2,schedule=interleaved_zero_bubble,engine=deepspeed,zero=3,recompute=selective",
    ),
    ("gpt", "cp=2,pp=2,schedule=gpipe,engine=deepspeed,zero=2,recompute=selective,compile=true"),
    ("best_fit", "dp=2,pp=2,schedule=looped_bfs,engine=fsdp2,zero=2,recompute=full"),
    ("untied", "tp=4,cp=2,cp_kind=ulysses,engine=fsdp2,zero=2,recompute=selective,compile=true"),
    ("llama", "tp=4,sequence_parallel=false,pp=2,engine=plain,micro_batch=4,recompute=full"),
    ("untied", "dp=2,pp=2,schedule=interleaved,engine=deepspeed,zero=3,micro_batch=4,recompute=selective"),
    ("untied", "tp=4,pp=2,schedule=zbv,engine=plain"),
    ("llama", "cp=2,cp_kind=ulysses,dp=4,engine=deepspeed,zero=1"),
]


def axes_of(row: Row) -> dict[str, str]:
    """The value of each axis in a row."""
    name, layout = row
    words = dict(word.split("=") for word in layout.split(","))
    sequence = "" if words.get("sequence_parallel") != "false" else " replicated"
    return {
        "run": name,
        "tp": words.get("tp", "1") + sequence,
        "cp": words.get("cp_kind", "ring") if words.get("cp", "1") != "1" else "1",
        "dp": words.get("dp", "1"),
        "pp": words.get("schedule", "1f1b") if words.get("pp", "1") != "1" else "1",
        "engine": f"{words['engine']} {words.get('zero', '0')}",
        "compile": words.get("compile", "false"),
        "micro_batch": words.get("micro_batch", "1"),
        "recompute": words.get("recompute", "none"),
    }


def pairs_of(row: Row) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    """Pairs of (axis, value) that a row holds."""
    return set(itertools.combinations(sorted(axes_of(row).items()), 2))


def impossible(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """No layout of up to 8 ranks has both values of two axes."""
    axes = dict([one, other])
    too_many_ranks = axes.get("tp", "").startswith("4") and axes.get("dp") == "4"
    needs_whole_stages = axes.get("engine") == "fsdp2 3" and axes.get("pp", "1") != "1"
    return too_many_ranks or needs_whole_stages
