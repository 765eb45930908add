"""`megatrain generate`: continue prompts with a trained model."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from megatrain.base.errors import ConfigError

if TYPE_CHECKING:
    from megatrain.generate.load import Loaded


@click.command(short_help="Continue prompts with a trained model.")
@click.argument("checkpoint")
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; may be given several times.")
@click.option("--prompt-file", type=click.Path(), help="A file with one prompt; - is standard input.")
@click.option("--max-tokens", default=128, show_default=True, help="Tokens to add, at most.")
@click.option("--temperature", default=1.0, show_default=True, help="0 takes the most probable token, always.")
@click.option("--top-k", type=int, help="Draw from this many of the most probable tokens.")
@click.option(
    "--top-p", default=1.0, show_default=True, help="Draw from the fewest tokens with this share of probability."
)
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same text.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times.")
@click.option("--beams", type=int, help="Search for the most probable text with this many beams, instead of drawing.")
@click.option("--length-penalty", default=0.0, show_default=True, help="Favours longer texts in a beam search.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--dtype", default="auto", show_default=True, type=click.Choice(["auto", "fp32", "bf16"]))
@click.option("--json", "as_json", is_flag=True, help="A JSON object a prompt, each on a line; prompts share passes.")
@click.pass_context
def command(
    context: click.Context,
    checkpoint: str,
    prompts: tuple[str, ...],
    prompt_file: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue prompts with the model of CHECKPOINT: a step's folder, or a run's folder, whose newest one is taken.

    The prompt and what follows it are written to standard output as they come; the speed to standard error. Without a
    prompt, a document is begun.

    \b
    megatrain generate runs/tiny --prompt "def main("
    megatrain generate runs/tiny/checkpoints/step-00000100 --prompt "import " --temperature 0.8 --top-p 0.95 --seed 7
    """
    from megatrain.generate.load import load

    given = {name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    _refuse_useless(given)
    prompt_from_file = None if prompt_file is None else _read_prompt(prompt_file)
    loaded = load(checkpoint, device=options.pop("device"), dtype=options.pop("dtype"))
    texts = [*prompts, *([prompt_from_file] if prompt_from_file is not None else [])] or [""]
    beams, length_penalty = options.pop("beams"), options.pop("length_penalty")
    if beams is None:
        _sample(loaded, texts, as_json, **options)
    else:
        _search(loaded, texts, as_json, beams, length_penalty, options)


def _read_prompt(path: str) -> str:
    """The text of a file, or of standard input where `path` is "-"."""
    try:
        if path != "-":
            return Path(path).read_bytes().decode()
        if sys.stdin is None:
            raise ConfigError("--prompt-file - reads standard input, which is closed: give a file, or --prompt")
        return sys.stdin.buffer.read().decode()
    except OSError as error:
        raise ConfigError(f"--prompt-file {path} cannot be read ({error.strerror}): give a text file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--prompt-file {path} is not UTF-8 at byte {error.start}: convert it, for example with iconv"
        ) from None


def _refuse_useless(given: set[str]) -> None:
    """An option that would change nothing is a misunderstanding."""
    drawing = ["temperature", "top_k", "top_p", "seed", "stop"]
    words = ["--" + name.replace("_", "-") for name in drawing if name in given]
    if "beams" in given and words:
        raise click.UsageError(f"--beams searches and does not draw: leave out {', '.join(words)}, or --beams")
    if "length_penalty" in given and "beams" not in given:
        raise click.UsageError("--length-penalty belongs to a beam search: give --beams as well")


def _sample(
    loaded: "Loaded",
    prompts: list[str],
    as_json: bool,
    *,
    max_tokens: int,
    seed: int,
    stop: tuple[str, ...],
    **how: Any,
) -> None:
    from megatrain.generate.choose import Choosing
    from megatrain.generate.sample import begin, proceed

    rows = begin(loaded, prompts, max_tokens=max_tokens, seed=seed, stop=stop)
    choosing = Choosing(**how)
    for together in [rows] if as_json else [[row] for row in rows]:  # what is shown as it comes, comes one by one
        start = time.perf_counter()
        pieces = proceed(loaded, together, choosing)
        if not as_json:
            _write(together[0].prompt)
        for _, piece in pieces:
            if not as_json:
                _write(piece)
        speed = sum(len(row.tokens) for row in together) / (time.perf_counter() - start)
        for row in together:
            facts = {"tokens": len(row.tokens), "ended": row.ended, "seed": seed, "tokens_per_second": round(speed, 1)}
            _conclude(loaded, row.prompt, row.text, facts, as_json, len(row.ids))


def _search(
    loaded: "Loaded", prompts: list[str], as_json: bool, width: int, length_penalty: float, options: dict[str, Any]
) -> None:
    from megatrain.generate.beam import Beam, beam_text
    from megatrain.generate.sample import encode_prompt

    beam = Beam(width=width, length_penalty=length_penalty, max_tokens=options["max_tokens"])
    for prompt in prompts:
        start = time.perf_counter()
        text, found = beam_text(loaded, prompt, beam)
        seconds = time.perf_counter() - start
        if not as_json:
            _write(prompt + text)
        complete = found.tokens[-1] == loaded.tokenizer.end_of_document
        n = len(found.tokens) - complete
        ended = "end_of_document" if complete else "max_tokens" if n == beam.max_tokens else "positions"
        facts = {"tokens": n, "ended": ended, "log_probability": found.log_probability}
        n_read = len(encode_prompt(loaded, prompt)) + n
        _conclude(loaded, prompt, text, facts | {"tokens_per_second": round(n / seconds, 1)}, as_json, n_read)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _conclude(loaded: "Loaded", prompt: str, text: str, facts: dict[str, Any], as_json: bool, n_read: int) -> None:
    """End one prompt's output, and say how it went."""
    if as_json:
        _write(json.dumps({"prompt": prompt, "text": text, "step": loaded.step, **facts}, ensure_ascii=False))
    _write("\n")
    told = (
        f"step {loaded.step}: {facts['tokens']} tokens, {facts['tokens_per_second']} tokens/s, ended: {facts['ended']}"
    )
    if n_read > loaded.seq_len:
        told += f"; {n_read} tokens were read and the model was trained on sequences of {loaded.seq_len}"
    click.echo(told, err=True)
