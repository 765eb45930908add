"""A small model with random weights and a small tokenizer, in memory or saved as a run saves them."""

import functools
import json
from pathlib import Path

import torch

from megatrain.checkpoint.checkpoints import Checkpoints
from megatrain.config.build import plain
from megatrain.data.tokenizer import Tokenizer, train_tokenizer
from megatrain.generate.load import Loaded
from megatrain.models.decoder import Decoder
from megatrain.parallel.shard import shards, slices_of
from tests.contract import randomise

SEQ_LEN = 24
TEXTS = [
    "def main(argv):\n    return 0\n",
    "Zwölf Boxkämpfer jagen Viktor",
    "日本語 und 🙂🙃 na\u0308chstens",
    "e\u0301te\u0301 😀",
]
SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}


@functools.cache
def tokenizer_bytes() -> bytes:
    """One that puts nothing in front of a text: prompts are read as they are."""
    return json.dumps(json.loads(train_tokenizer(TEXTS * 3, 290)) | {"post_processor": None}).encode()


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.parse(tokenizer_bytes(), "toy")


@functools.cache
def loaded(choice: Decoder = Decoder(**SHAPE), seed: int = 7) -> Loaded:  # noqa: B008 (a frozen value)
    """In memory, with logits lively enough that neighbouring tokens differ."""
    model = choice.build(n_valid=tokenizer().vocab_size, seq_len=SEQ_LEN)
    randomise(model, seed)
    return Loaded(model.requires_grad_(False).eval(), tokenizer(), {}, 0, SEQ_LEN, torch.device("cpu"))


def save_run(folder: Path, model: Loaded, step: int = 3, **facts) -> Path:
    """What a training leaves in its run folder, and needs to be loaded: a commit and the tokenizer."""
    config = {"model": plain(model.model.choice), "data": {"seq_len": SEQ_LEN, "sources": []}}
    known = {"config": config, "tokenizer": tokenizer().fingerprint}
    named, held = dict(model.model.named_parameters()), shards(model.model)
    slices = [s for name, p in named.items() for s in slices_of("weights", name, held[name], p.data.view(-1))]
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(step, slices, {}, known | facts, asynchronous=False)
    checkpoints.close()
    (folder / "tokenizer.json").write_bytes(tokenizer_bytes())
    return folder / "checkpoints" / f"step-{step:08d}"
