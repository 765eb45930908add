"""megatrain data: build, look at and check data sets. The work is done in megatrain/data, imported when asked for."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import click


@click.group(
    help="""Build, look at and check data sets.

    \b
    Example:
      megatrain data build corpus/ --out data/mine
      megatrain data inspect data/mine
    """
)
def command() -> None: ...


_WORKERS = "Processes; the result is the same for any.  [default: cores]"
_READING = ("text_field", "id_field", "separator")


def input_options(function: Any) -> Any:
    """The arguments of commands that read a corpus."""
    for add in reversed(
        (
            click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path)),
            click.option("--include", multiple=True, metavar="GLOB", help='Only such files of folders, e.g. "*.py".'),
            click.option("--exclude", multiple=True, metavar="GLOB", help="Leave out such files or folders."),
            click.option("--text-field", default="text", show_default=True, help="Key of the text in JSON or parquet."),
            click.option("--id-field", help="Key of the documents' ids there; one without is FILE:LINE."),
            click.option("--separator", help='What stands between documents in .txt, e.g. "<|endoftext|>".'),
            click.option("--workers", type=click.IntRange(min=1), help=_WORKERS),
        )
    ):
        function = add(function)
    return function


@command.command(
    "build",
    short_help="Text, JSON lines, parquet or source trees to token shards.",
    help="""Make a data set of token shards from text files, JSON lines, parquet, webdataset's tars of text,
    Megatron-LM's .bin and .idx, and folders of source files; text and JSON lines also as .gz and .zst. A build that was
    stopped goes on where it was when the same command is given again.

    \b
    Example:
      megatrain data build corpus/ --include "*.py" --out data/python --vocab-size 4096
    """,
)
@input_options
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the data set; must be new.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="A tokenizer.json; without one, it is trained.")
@click.option("--end-of-document", help="The tokenizer's token that ends a document, if it has an unusual name.")
@click.option("--vocab-size", type=int, help="Of the tokenizer to train.  [default: 32768]")
@click.option("--held-out", default=0.01, show_default=True, help="Share of the documents never trained on.")
@click.option("--shard-tokens", default="64M", show_default=True, help="Tokens of a shard.")
@click.option("--dtype", default="auto", show_default=True, type=click.Choice(["auto", "uint16", "uint32"]))
def build_command(**options: Any) -> None:
    from megatrain.base.errors import ConfigError, PreemptedError
    from megatrain.base.units import count
    from megatrain.cli.common import Bar
    from megatrain.data.build import BuildOptions, build

    reading = {name: options.pop(name) for name in _READING}
    try:
        options["shard_tokens"] = count(options["shard_tokens"], "tokens")
    except ValueError as error:
        raise ConfigError(f"--shard-tokens: {error}") from error
    options["workers"] = options["workers"] or len(os.sched_getaffinity(0))
    try:
        with Bar() as bar:
            built = build(BuildOptions(**options, reading=reading), bar)
    except KeyboardInterrupt as interrupt:
        raise PreemptedError("stopped; the same command goes on after the last whole shard") from interrupt
    _report(built, options["out"])
    if options["tokenizer"] is None and built.manifest.tokenizer.vocab_size < (options["vocab_size"] or 0):
        click.echo(f"the text has no more tokens in it, so the vocabulary is smaller than {options['vocab_size']:,}")


@command.command(
    "index",
    short_help="Train on raw text where it lies: tars and JSON lines.",
    help="""Make a folder of raw text a data set where it lies. Webdataset's tars (.txt, or the text of .json) and JSON
    lines are indexed, not copied, and become tokens as they are read in training. Held-out documents are kept as token
    shards beside them.

    \b
    Example:
      megatrain data index corpus/ --tokenizer data/mine/tokenizer.json
    """,
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--tokenizer", required=True, type=click.Path(path_type=Path), help="A tokenizer.json.")
@click.option("--end-of-document", help="The tokenizer's token that ends a document, if it has an unusual name.")
@click.option("--text-field", default="text", show_default=True, help="Key of the text in JSON.")
@click.option("--held-out", default=0.01, show_default=True, help="Share of the documents never trained on.")
@click.option("--workers", type=click.IntRange(min=1), help=_WORKERS)
def index_command(**options: Any) -> None:
    from megatrain.cli.common import Bar
    from megatrain.data.text_index import IndexOptions, files_of, index

    options["workers"] = options["workers"] or len(os.sched_getaffinity(0))
    with Bar() as bar:
        bar.stage("indexing", sum(source.size for source in files_of(options["folder"])))
        manifest = index(IndexOptions(**options), lambda size: bar.advance(size, 0))
    _report_manifest(manifest)


def _report(built: Any, out: Path) -> None:
    if built.existed:
        click.echo(f"{out} exists: the same input and options built it")
    elif built.resumed_shards:
        click.echo(f"went on after {built.resumed_shards} shards of an earlier build")
    _report_manifest(built.manifest)


def _report_manifest(manifest: Any) -> None:
    from megatrain.base.units import show_bytes, show_count

    for name, split in manifest.splits.items():
        per_token = f", {split.text_bytes / split.tokens:.2f} bytes per token" if split.tokens else ""
        tokens = "raw text" if split.is_text else f"{show_count(split.tokens)} tokens"
        click.echo(
            f"{name}: {split.documents:,} documents, {tokens} in {len(split.shards)} shards, "
            f"{show_bytes(split.text_bytes)} of text{per_token}"
        )
    click.echo(f"vocabulary: {manifest.tokenizer.vocab_size:,}, ids are {manifest.dtype}")
    for reason, found in manifest.provenance.get("refused", {}).items():
        first = ", ".join(found["first"][:3])
        click.echo(
            f"left out: {found['documents']:,} documents: {reason} ({first}{', ...' if found['documents'] > 3 else ''})"
        )
    if not manifest.splits["held_out"].documents and manifest.provenance.get("held_out"):
        click.echo("nothing is held out: the input is a single document (or the same one again)")


@command.command(
    "clean",
    short_help="Leave out copies, evaluation text and low quality.",
    help="""Leave out documents that are no good to train on: copies and near copies of others, passages of evaluation
    sets, and what breaks rules of quality. Each is recorded with its reason in DIR/dropped.jsonl; the documents that
    are kept are written to DIR/kept as JSON lines, for `megatrain data build`.

    \b
    Rules of quality: gopher_quality, gopher_repetition, c4; "kind:limit=value" sets a limit.

    \b
    Example:
      megatrain data clean pages.jsonl.zst --out cleaned --rule gopher_quality:min_words=20 --against eval/
      megatrain data build cleaned/kept --id-field id --out data/pages
    """,
)
@input_options
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the result; must be new.")
@click.option("--rule", "rules", multiple=True, metavar="KIND[:LIMIT=VALUE,...]", help="A rule of quality; repeatable.")
@click.option("--against", multiple=True, type=click.Path(path_type=Path), help="Evaluation sets; repeatable.")
@click.option("--ngram", default=13, show_default=True, help="Words in a row that may not be shared with those.")
@click.option("--shortest", default=6, show_default=True, help="Words of their shortest sentence that is looked for.")
@click.option("--near", default=0.8, show_default=True, help="Least resemblance of near copies; 0 for exact ones only.")
def clean_command(**options: Any) -> None:
    from megatrain.cli.common import Bar
    from megatrain.data.clean import CleanOptions, clean

    reading = {name: options.pop(name) for name in _READING}
    options["workers"] = options["workers"] or len(os.sched_getaffinity(0))
    with Bar() as bar:
        cleaned = clean(CleanOptions(**options, reading=reading), bar)
    click.echo(f"kept: {cleaned.kept:,} documents, in {options['out']}")
    if not cleaned.kept:
        click.echo("nothing is left: loosen the rules, or look at dropped.jsonl for what was taken for what")
    for reason, n in cleaned.dropped.most_common():
        click.echo(f"left out: {n:,} documents: {reason}")


@command.command(
    "inspect",
    short_help="Counts, lengths, frequent tokens, examples.",
    help="""Show what is in a data set: counts, lengths, frequent tokens, the beginnings of some documents. DATA is its
    folder or its address (https://, s3://).

    \b
    Example:
      megatrain data inspect data/python
      megatrain data inspect s3://bucket/python
    """,
)
@click.argument("data")
@click.option(
    "--examples", default=3, type=click.IntRange(min=0), show_default=True, help="Documents to show of each split."
)
@click.option(
    "--frequent",
    default=20,
    type=click.IntRange(min=0),
    show_default=True,
    help="Tokens to show of the most frequent ones.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON value.")
def inspect_command(data: str, examples: int, frequent: int, as_json: bool) -> None:
    from megatrain.data.summary import drawn, summarize

    facts = summarize(data, examples, frequent)
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    for line in drawn(facts):
        click.echo(line)


@command.command(
    "verify",
    short_help="Check every byte against the manifest.",
    help="""Check every byte of a data set against its manifest: checksums, sizes, the index against the tar, each
    document. Exits with 1 and the names of the bad files if anything is wrong. DATA is its folder or its address
    (https://, s3://), which is copied to the cache.

    \b
    Example:
      megatrain data verify data/python
    """,
)
@click.argument("data")
@click.option("--workers", default=1, type=click.IntRange(min=1), show_default=True, help="Processes that read shards.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON value.")
def verify_command(data: str, workers: int, as_json: bool) -> None:
    from megatrain.base.errors import EXIT_FAILURE
    from megatrain.data.store import redacted
    from megatrain.data.verification import verify

    files, faults = 0, []
    for _, found in verify(data, workers):
        files += 1
        faults += found
        for fault in () if as_json else found:
            click.echo(f"bad: {fault.path}: {fault.what}")
    bad = sorted({fault.path for fault in faults})
    if as_json:
        rows = [{"path": fault.path, "what": fault.what} for fault in faults]
        click.echo(json.dumps({"ok": not faults, "bad": bad, "faults": rows}))
    elif not faults:
        click.echo(f"{redacted(data)} is whole: {files} files are as the manifest says")
    if faults:
        raise click.exceptions.Exit(EXIT_FAILURE)


@command.command(
    "trace",
    short_help="What each global batch of a run is made of.",
    help="""Print what each global batch of a run is made of, without training: a hash of its tokens and its documents.

    The hash is the sha256 of the tokens as little-endian int64 [global_batch, seq_len]. Step 0 is the first batch, and
    the end of the range is left out.

    \b
    Example:
      megatrain data trace configs/run/tiny.yaml --steps 0:40 --dp 2 --json
    """,
)
@click.argument("run_file", metavar="RUN.yaml")
@click.argument("overrides", nargs=-1, metavar="[key=value ...]")
@click.option("--steps", default="0:10", show_default=True, metavar="A:B", help="Half-open range of steps.")
@click.option(
    "--dp",
    default=1,
    type=click.IntRange(min=1),
    show_default=True,
    help="Data-parallel ranks whose rows are put together.",
)
@click.option("--workers", type=int, help="Reading processes of each rank.  [default: the run's]")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line.")
def trace_command(
    run_file: str, overrides: tuple[str, ...], steps: str, dp: int, workers: int | None, as_json: bool
) -> None:
    from megatrain.data.trace import trace
    from megatrain.train.config import read_run

    start, stop = _step_range(steps)
    if workers is not None:
        overrides = (*overrides, f"data.workers={workers}")
    run = read_run(run_file, overrides).run
    for row in trace(run.data, seed=run.seed, global_batch=run.train.global_batch, start=start, stop=stop, dp=dp):
        if as_json:
            click.echo(json.dumps(row, ensure_ascii=False))
        else:
            documents = row["documents"]
            more = f" and {len(documents) - 4} more" if len(documents) > 4 else ""
            click.echo(f"{row['step']:>8}  {row['sha256'][:16]}  {', '.join(documents[:4])}{more}")


@command.command(
    "seen",
    short_help="At which steps a run was trained on a document.",
    help="""Ask what a run was trained on: the steps whose batches held tokens of a document, known by its id or by a
    text in it. RUN is the folder of a run, or its run file.

    \b
    Example:
      megatrain data seen runs/tiny --document os.py
      megatrain data seen runs/tiny --contains "This program is free software"
    """,
)
@click.argument("run", metavar="RUN")
@click.option("--document", help="Id of a document.")
@click.option("--contains", help="Text to look for in all documents.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line.")
def seen_command(run: str, document: str | None, contains: str | None, as_json: bool) -> None:
    from megatrain.base.errors import ConfigError
    from megatrain.data.seen import seen

    if (document is None) == (not contains):
        raise ConfigError("give either --document ID or --contains TEXT")
    folder, access = Path(run), None
    if folder.is_file():
        from megatrain.train.config import read_run

        described = read_run(run).run
        folder, access = described.folder, described.data
    for found in seen(folder, document, contains, access):
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(found), ensure_ascii=False))
            continue
        steps = ", ".join(map(str, found.steps[:8])) + (f" ... {found.steps[-1]}" if len(found.steps) > 8 else "")
        when = f"{len(found.steps)} steps: {steps}" if found.steps else f"not trained on ({found.split})"
        click.echo(f"{found.document} of {found.source}: {when}")


def _step_range(text: str) -> tuple[int, int]:
    from megatrain.base.errors import ConfigError

    start, colon, stop = text.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal() and int(start) <= int(stop)):
        raise ConfigError(f"--steps {text!r} is no range of steps: write FIRST:END, for example 0:40; END is left out")
    return int(start), int(stop)
