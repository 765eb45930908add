"""`megatrain convert ...`: models from and to other projects' formats."""

from typing import Any

import click


@click.group(short_help="Translate a model from or to Hugging Face, proven by its logits.")
def command() -> None:
    """Models from and to other formats. Every conversion ends with both sides' logits on the same tokens.

    \b
    megatrain convert from-hf ~/models/Qwen3-0.6B --out qwen3
    megatrain checkpoint inspect qwen3 --model > qwen3.yaml
    megatrain train run.yaml checkpoint.init_from=qwen3
    megatrain convert to-hf runs/tiny --out tiny-hf
    """


check = click.option(
    "--check/--no-check", default=True, help="Compare logits (needs transformers, and memory for both)."
)


@command.command("from-hf", short_help="A Hugging Face folder to a checkpoint.")
@click.argument("folder")
@click.option("--out", required=True, type=click.Path(), help="The new checkpoint's folder.")
@check
def from_hf(folder: str, out: str, check: bool) -> None:
    """Make a checkpoint of the Hugging Face model in FOLDER, for generate and checkpoint.init_from.

    \b
    megatrain convert from-hf ~/models/Llama-3.2-1B --out llama
    """
    from megatrain.convert.hugging_face import from_hugging_face

    _say(from_hugging_face(folder, out, check=check))


@command.command("from-deepspeed", short_help="A DeepSpeed checkpoint to a checkpoint.")
@click.argument("folder")
@click.option("--like", required=True, type=click.Path(), help="A folder with the model's config.json and tokenizer.")
@click.option("--out", required=True, type=click.Path(), help="The new checkpoint's folder.")
@check
def from_deepspeed(folder: str, like: str, out: str, check: bool) -> None:
    """Make a checkpoint of the DeepSpeed checkpoint FOLDER (ZeRO of any stage, or universal) of a Hugging Face model.

    Float32 weights, and moments where it has them. Nothing in its pickled files is executed.

    \b
    megatrain convert from-deepspeed out/global_step1000 --like ~/models/Llama-3.2-1B --out llama
    """
    from megatrain.convert.deepspeed import from_deepspeed as convert

    _say(convert(folder, like, out, check=check))


@command.command("from-megatron", short_help="A Megatron-LM checkpoint to a checkpoint.")
@click.argument("folder")
@click.option("--tokenizer", type=click.Path(exists=True, dir_okay=False), help="The model's tokenizer.json.")
@click.option("--out", required=True, type=click.Path(), help="The new checkpoint's folder.")
@check
def from_megatron(folder: str, tokenizer: str | None, out: str, check: bool) -> None:
    """Make a checkpoint of the Megatron-LM checkpoint FOLDER: torch_dist, or a file for each model-parallel rank.

    Nothing in its pickled files is executed.

    \b
    megatrain convert from-megatron checkpoints/iter_0005000 --out gpt
    """
    from megatrain.convert.megatron import from_megatron as convert

    _say(convert(folder, out, tokenizer=tokenizer, check=check))


@command.command("to-deepspeed", short_help="A checkpoint to one of DeepSpeed's.")
@click.argument("checkpoint")
@click.option("--out", required=True, type=click.Path(), help="The new folder.")
@click.option(
    "--ranks",
    type=int,
    help="Write ZeRO 1 and 2 for so many ranks; else the universal format, which stage 3 reads too.",
)
@click.option("--family", help="llama, mistral, ...: by default the first that the model can be.")
@check
def to_deepspeed(checkpoint: str, out: str, ranks: int | None, family: str | None, check: bool) -> None:
    """Write CHECKPOINT, with its moments, as DeepSpeed has it for the same model in transformers.

    \b
    megatrain convert to-deepspeed runs/tiny --out tiny-ds
    megatrain convert to-deepspeed runs/tiny --out tiny-ds --ranks 8
    """
    from megatrain.convert.deepspeed import to_deepspeed as convert

    _say(convert(checkpoint, out, ranks=ranks, family=family, check=check))


@command.command("to-hf", short_help="A checkpoint to a Hugging Face folder.")
@click.argument("checkpoint")
@click.option("--out", required=True, type=click.Path(), help="The new model's folder.")
@click.option("--family", help="llama, mistral, ...: by default the first that the model can be.")
@click.option("--dtype", help="fp32, bf16 or fp16: by default as the weights are kept.")
@click.option("--shard", default="4GiB", show_default=True, help="About the largest file.")
@check
def to_hf(checkpoint: str, out: str, family: str | None, dtype: str | None, shard: str, check: bool) -> None:
    """Write CHECKPOINT (a step's or a run's folder) as a model that transformers loads.

    \b
    megatrain convert to-hf runs/tiny --out tiny-hf --dtype bf16
    """
    from megatrain.base.errors import ConfigError
    from megatrain.base.units import n_bytes
    from megatrain.convert.hugging_face import to_hugging_face

    try:
        shard_bytes = n_bytes(shard)
        if not shard_bytes:
            raise ValueError("a file must have room for something")
    except ValueError as error:
        raise ConfigError(f"--shard={shard} is wrong: {error}") from None
    _say(to_hugging_face(checkpoint, out, family=family, dtype=dtype, shard_bytes=shard_bytes, check=check))


def _say(report: Any) -> None:
    import json
    from dataclasses import asdict

    click.echo(json.dumps(asdict(report), indent=1))
