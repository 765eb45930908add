"""megatrain data: build, look at and check data sets. The work is done in megatrain/data, imported when asked for."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import TaskID


@click.group(
    help="""Build, look at and check data sets.

    \b
    Example:
      megatrain data build corpus/ --out data/mine
      megatrain data inspect data/mine
    """
)
def command() -> None: ...


@command.command(
    "build",
    help="""Make a data set of token shards from text files, JSON lines (.jsonl, also .gz and .zst) and folders of
    source files. A build that was stopped goes on where it was when the same command is given again.

    \b
    Example:
      megatrain data build corpus/ --include "*.py" --out data/python --vocab-size 4096
    """,
)
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the data set; must be new.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="A tokenizer.json; without one, it is trained.")
@click.option("--end-of-document", help="The tokenizer's token that ends a document, if it has an unusual name.")
@click.option("--vocab-size", default=32_768, show_default=True, help="Of the tokenizer to train.")
@click.option("--held-out", default=0.01, show_default=True, help="Share of the documents never trained on.")
@click.option("--include", multiple=True, metavar="GLOB", help='Only these files of folders, e.g. "*.py"; repeatable.')
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave out these files or folders; repeatable.")
@click.option("--text-field", default="text", show_default=True, help="Key of the text in JSON lines.")
@click.option("--separator", help='What stands between documents in .txt files, e.g. "<|endoftext|>".')
@click.option("--shard-tokens", default="64M", show_default=True, help="Tokens of a shard.")
@click.option("--dtype", default="auto", show_default=True, type=click.Choice(["auto", "uint16", "uint32"]))
@click.option("--workers", type=int, help="Processes that encode; the result does not depend on it. [default: cores]")
def build_command(**options: Any) -> None:
    from rich.console import Console

    from megatrain.base.errors import ConfigError, PreemptedError
    from megatrain.base.units import count
    from megatrain.data.build import BuildOptions, build

    reading = {name: options.pop(name) for name in ("text_field", "separator")}
    try:
        options["shard_tokens"] = count(options["shard_tokens"], "tokens")
    except ValueError as error:
        raise ConfigError(f"--shard-tokens: {error}") from error
    options["workers"] = options["workers"] or len(os.sched_getaffinity(0))
    console = Console(stderr=True)
    bar = _Bar(console)
    try:
        with bar.progress:
            built = build(BuildOptions(**options, reading=reading), bar)
    except KeyboardInterrupt as interrupt:
        raise PreemptedError("stopped; the same command goes on after the last whole shard") from interrupt
    _report(built, options["out"])


class _Bar:
    """Shows a build's stages, each with its rate and the time left."""

    def __init__(self, console: Any):
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self.progress: Progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TextColumn("{task.fields[tokens]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._tokens = 0

    def stage(self, name: str, total: int) -> None:
        if self._task is not None:
            self.progress.update(self._task, completed=self.progress.tasks[-1].total)
        self._task, self._tokens = self.progress.add_task(name, total=total, tokens=""), 0

    def advance(self, bytes: int, tokens: int) -> None:
        from megatrain.base.units import show_count

        assert self._task is not None
        self._tokens += tokens
        told = f"{show_count(self._tokens)} tokens" if self._tokens else ""
        self.progress.update(self._task, advance=bytes, tokens=told)


def _report(built: Any, out: Path) -> None:
    from megatrain.base.units import show_bytes, show_count

    manifest = built.manifest
    if built.existed:
        click.echo(f"{out} exists: the same input and options built it")
    elif built.resumed_shards:
        click.echo(f"went on after {built.resumed_shards} shards of an earlier build")
    for name, split in manifest.splits.items():
        per_token = f", {split.text_bytes / split.tokens:.2f} bytes per token" if split.tokens else ""
        click.echo(
            f"{name}: {split.documents:,} documents, {show_count(split.tokens)} tokens in {len(split.shards)} shards, "
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
    "inspect",
    help="""Show what is in a data set: counts, lengths, frequent tokens, the beginnings of some documents.

    \b
    Example:
      megatrain data inspect data/python
    """,
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--examples", default=3, show_default=True, help="Documents to show of each split.")
@click.option("--frequent", default=20, show_default=True, help="Tokens to show of the most frequent ones.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON value.")
def inspect_command(folder: Path, examples: int, frequent: int, as_json: bool) -> None:
    from megatrain.data.summary import summarize

    facts = summarize(folder, examples, frequent)
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    for line in _summary_lines(facts):
        click.echo(line)


def _summary_lines(facts: dict[str, Any]) -> Iterator[str]:
    from megatrain.base.units import show_bytes, show_count

    yield f"{facts['name']}: vocabulary of {facts['vocab_size']:,}, ids are {facts['dtype']}"
    yield f"tokenizer {facts['tokenizer'][:16]}"
    for name, split in facts["splits"].items():
        yield ""
        counts = f"{split['documents']:,} documents, {show_count(split['tokens'])} tokens, {split['shards']} shards"
        yield f"{name}: {counts}"
        if not split["documents"]:
            continue
        length = split["length"]
        yield f"  {show_bytes(split['text_bytes'])} of text, {split['bytes_per_token']:.3f} bytes per token"
        yield "  tokens of a document: " + ", ".join(
            f"{key} {length[key]:,.0f}" for key in ("min", "p10", "median", "mean", "p90", "max")
        )
        most = max(row["documents"] for row in length["histogram"])
        for row in length["histogram"]:
            bar = "█" * -(-40 * row["documents"] // most)
            yield f"  {row['from']:>9,} to {row['below'] - 1:>9,} {bar} {row['documents']:,}"
        if split["frequent"]:
            named = (f"{row['token']!r} {row['share']:.1%}" for row in split["frequent"])
            yield "  frequent: " + "  ".join(named)
        for example in split["examples"]:
            yield f"  {example['id']} ({example['tokens']:,} tokens): {example['begins']!r}"


@command.command(
    "verify",
    help="""Check every byte of a data set against its manifest: checksums, sizes, the index against the tar, each
    document. Exits with 1 and the names of the bad files if anything is wrong.

    \b
    Example:
      megatrain data verify data/python
    """,
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--workers", default=1, show_default=True, help="Processes that read shards.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON value.")
def verify_command(folder: Path, workers: int, as_json: bool) -> None:
    from megatrain.base.errors import EXIT_FAILURE
    from megatrain.data.verification import verify

    files, faults = 0, []
    for _, found in verify(folder, workers):
        files += 1
        faults += found
        for fault in () if as_json else found:
            click.echo(f"bad: {fault.path}: {fault.what}")
    bad = sorted({fault.path for fault in faults})
    if as_json:
        rows = [{"path": fault.path, "what": fault.what} for fault in faults]
        click.echo(json.dumps({"ok": not faults, "bad": bad, "faults": rows}))
    elif not faults:
        click.echo(f"{folder} is whole: {files} files are as the manifest says")
    if faults:
        raise click.exceptions.Exit(EXIT_FAILURE)
