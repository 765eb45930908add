"""A CUDA card that is not there: a CPU build of torch runs the very step a GPU would, on tensors without memory.

    from megatrain.audit import fake_cuda
    fake_cuda.install()                 # before the first `import torch`
    ...
    with FakeTensorMode(), fake_cuda.card():
        engine.step(batch, lr)

`install` compiles a few lines of C++ once (seconds; kept in the user's cache folder). What runs under `card()` takes
the operators that a CUDA build takes. Nothing is computed: values, races between streams and speed are beyond it.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from megatrain.base.errors import UserError

SOURCE = Path(__file__).with_suffix(".cpp")

CAPABILITY = (9, 0)
"""Compute capability of the card that is played: Hopper."""

_library: ctypes.CDLL | None = None


def install() -> None:
    """Make this process believe in eight CUDA cards.

    Raises:
        UserError: torch is loaded already (it asks for its CUDA hooks once, while it is imported), or there is no g++.
    """
    global _library
    if _library is not None:
        return
    if "torch" in sys.modules:
        raise UserError("a fake card must be installed before torch is imported: call install() first of all")
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    library = _compiled(root)
    ctypes.CDLL(str(root / "lib/libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    _library = ctypes.CDLL(str(library))
    _library.host_waits.restype = ctypes.c_int64
    _library.install()
    import torch

    torch.autograd.set_multithreading_enabled(False)  # its device threads outlive the fake card and abort at exit


def host_waits() -> int:
    """How often the host waited for a stream, an event or the device so far."""
    assert _library is not None, "install() comes first"
    return int(_library.host_waits())


def _compiled(torch_root: Path) -> Path:
    """The library for this torch and this source; compiled where it is not kept yet."""
    version = (torch_root / "version.py").read_bytes()
    key = hashlib.sha256(SOURCE.read_bytes() + version).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatrain"
    library = folder / f"fake_cuda_{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    building = library.with_suffix(f".{os.getpid()}")
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(building)]
    command += [f"-I{torch_root}/include", f"-L{torch_root}/lib", "-lc10", "-ltorch_cpu"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("a fake card is compiled by g++, which is not on the PATH: install g++") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"g++ could not compile {SOURCE.name} against this torch: {error.stderr.strip()}") from error
    building.replace(library)  # two processes may build at once; either result will do
    return library


@contextlib.contextmanager
def card(note_wait: Callable[[str], Any] = lambda what: None) -> Iterator[None]:
    """Choose the operators a CUDA build chooses, and answer what libraries ask of torch.cuda.

    These are patches and no function mode, since such a mode is off inside backward, where recomputation runs forwards.

    Args:
        note_wait: called when something waits for the whole device.
    """
    import torch
    import torch.cuda.amp.common
    import torch.nn.functional as F
    import torch.utils._foreach_utils as foreach
    from torch._subclasses.fake_tensor import FakeTensor

    real_attention = F.scaled_dot_product_attention

    def attention(
        q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        """A CPU build would decompose it into plain products, and say nothing."""
        if q.is_cuda and torch.is_autocast_enabled("cuda"):
            q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
        half = q.dtype in (torch.bfloat16, torch.float16)
        if q.is_cuda and half and attn_mask is None:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
        if q.is_cuda and half:  # the efficient kernel wants equal head counts and a mask for every head
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, -torch.inf)
            bias = bias.expand(q.shape[0], q.shape[1], -1, -1)
            efficient = torch.ops.aten._scaled_dot_product_efficient_attention
            return efficient(q, k, v, bias, True, dropout_p, False, scale=scale)[0]
        return real_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    def waits(what: str) -> Callable[..., None]:
        return lambda *_: note_wait(what)

    now = torch.accelerator.current_stream
    answers: dict[str, Any] = {
        "synchronize": waits("torch.cuda.synchronize()"),
        "get_device_capability": lambda device=None: CAPABILITY,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device_count": lambda: 8,
        "current_stream": lambda device=None: now(),
        "default_stream": lambda device=None: torch.Stream("cuda"),
        "Stream": lambda device=None, priority=0: torch.Stream("cuda"),
        "stream": lambda stream: stream,  # one is its own context
        "Event": lambda *_, **__: torch.Event("cuda"),
        "is_bf16_supported": lambda including_emulation=True: True,
        "empty_cache": lambda: None,
        "_DeviceGuard": lambda device: contextlib.nullcontext(),
        "get_rng_state": lambda device=None: torch.empty(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        for owner, name, new in (
            (F, "scaled_dot_product_attention", attention),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),  # autocast would switch itself off
            (torch.Tensor, "record_stream", lambda tensor, stream: None),
            # what clips gradients and steps optimisers asks whether tensors may be taken many at a time
            (foreach, "_foreach_supported_types", [*foreach._foreach_supported_types, FakeTensor]),
            (torch.accelerator, "synchronize", waits("torch.accelerator.synchronize()")),  # does nothing otherwise
        ):
            stack.enter_context(mock.patch.object(owner, name, new))
        yield
