"""A Hugging Face model's folder, read without executing anything: config, safetensors, tokenizer files."""

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.base.errors import CheckpointError
from megatrain.base.optional import optional
from megatrain.checkpoint.storage import LocalStorage
from megatrain.checkpoint.tensorfile import Entry, decode_header, header_length
from megatrain.checkpoint.tokenizer import SIDE_FILES

WEIGHTS = "weights"
CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
MAX_JSON_BYTES = 32 * 2**20

OLDER_TOKENIZERS = ("vocab.json", "merges.txt", "tokenizer.model", "spiece.model")
"""What tokenizers were kept in before there was one file for all of them."""


def read_bounded_json(path: Path) -> Any:
    """
    Raises:
        CheckpointError: there is no such file, it is too large, or it is not JSON.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes: at most {MAX_JSON_BYTES} are read")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: give the folder of a Hugging Face model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error or 'nested too deep'}") from None


class Folder:
    """Tensors by their names in the format; mapped, so that only what is used is read.

    `home` holds the config and the tokenizer, `path` is what errors name.

    Raises:
        CheckpointError: anything is missing or damaged, or the weights are pickled.
    """

    def __init__(self, path: str | Path, weights: bool = True):
        self.path = self.home = Path(path)
        self.config: dict[str, Any] = read_bounded_json(self.path / CONFIG)
        if not isinstance(self.config, dict) or not isinstance(self.config.get("model_type"), str):
            raise CheckpointError(f"{self.path / CONFIG} names no model_type: give the folder of a Hugging Face model")
        self._storage = LocalStorage(self.path)
        self._tensors: dict[str, tuple[str, int, Entry]] = {}
        self._told: dict[str, str] = {}
        """File of each tensor by the index, where there is one."""
        for file in self._files() if weights else []:
            self._add(file)
        held = {name: file for name, (file, _, _) in self._tensors.items()}
        if self._told and (other := sorted(name for name, file in self._told.items() if held.get(name) != file)):
            raise CheckpointError(
                f"{self.path / INDEX} says that {self._told[other[0]]} holds {other[0]}, and it does not "
                f"({len(other)} such): they are not of one model"
            )

    @property
    def names(self) -> list[str]:
        return sorted(self._tensors)

    @property
    def largest_file(self) -> int:
        """Bytes of the largest file of weights; 0 where there are none."""
        return max((self._storage.size(file) or 0 for file, _, _ in self._tensors.values()), default=0)

    def rename(self, prefix: str, untied: str) -> None:
        """Give names the prefix that they lack in files of the bare model (without its head)."""
        if not any(name.startswith(prefix) for name in self._tensors):
            self._tensors = {name if name == untied else prefix + name: t for name, t in self._tensors.items()}

    def unused(self, used: set[str], left_out: tuple[str, ...]) -> list[str]:
        return [
            name
            for name in self.names
            if name not in used and not any(fnmatchcase(name, pattern) for pattern in left_out)
        ]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    @property
    def moments(self) -> tuple[str, ...]:
        """States of an optimiser that it holds for every weight."""
        return ()

    def read(self, name: str, state: str = WEIGHTS) -> Tensor:
        file, start, entry = self._tensors[name]
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        data = self._storage.read(file, start + entry.begin, start + entry.end)
        return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape)

    def transformers_model(self, transformers: Any) -> Any:
        """The model as the transformers library has it, in float32."""
        return transformers.AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32, local_files_only=True)

    def logits(self, tokens: Tensor) -> Tensor:
        """Of transformers, float32 [rows, tokens, v].

        Raises:
            CheckpointError: it is not installed, or does not take the model.
        """
        transformers = optional("transformers")
        if not transformers:
            raise CheckpointError(
                f"the conversion cannot be checked, transformers is not usable here ({transformers.why_not}): "
                "install it, or convert with --no-check"
            )
        try:
            return self.transformers_model(transformers).eval()(tokens).logits.float()
        except Exception as error:  # whatever it says of a config that it does not take
            said = next(iter(str(error).strip().splitlines()), "")
            raise CheckpointError(
                f"transformers does not take {self.path} ({type(error).__name__}: {said}), so look at its {CONFIG}"
            ) from error

    def side_files(self) -> dict[str, bytes]:
        return {name: (self.home / name).read_bytes() for name in SIDE_FILES if (self.home / name).is_file()}

    def _files(self) -> list[str]:
        if (self.path / INDEX).exists():
            index = read_bounded_json(self.path / INDEX)
            named = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(named, dict):
                raise CheckpointError(f"{self.path / INDEX} has no weight_map from tensors to files: it is damaged")
            for file in named.values():
                if not isinstance(file, str) or "/" in file or not file.endswith(".safetensors"):
                    raise CheckpointError(
                        f"{self.path / INDEX} names {file!r}, which is no safetensors file of this folder"
                    )
            if (self.path / SINGLE).exists() and SINGLE not in named.values():
                raise CheckpointError(
                    f"{self.path} has both {INDEX} and {SINGLE}, which may be two models: remove the one that is not "
                    "meant"
                )
            self._told = named
            return sorted(set(named.values()))
        if (self.path / SINGLE).exists():
            return [SINGLE]
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in self.path.glob(pattern))
        if pickled:
            raise CheckpointError(
                f"{self.path} holds its weights pickled ({pickled[0]}), which can execute code when read: "
                "save it as safetensors first (save_pretrained does)"
            )
        raise CheckpointError(f"{self.path} has neither {INDEX} nor {SINGLE}: give the folder of a Hugging Face model")

    def _add(self, file: str) -> None:
        where = str(self.path / file)
        try:
            size = self._storage.size(file)
            if size is None:
                raise CheckpointError(f"{where} is missing: the index names it")
            length = header_length(bytes(self._storage.read(file, 0, 8)), size, where)
            header = bytes(self._storage.read(file, 8, 8 + length))
        except (OSError, ValueError) as error:  # a folder; a name that no file can have
            raise CheckpointError(f"{where!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
        entries, _ = decode_header(header, size - 8 - length, where)
        for name, entry in entries.items():
            if name in self._tensors:
                raise CheckpointError(f"{where} holds {name}, and so does {self._tensors[name][0]}")
            self._tensors[name] = (file, 8 + length, entry)
