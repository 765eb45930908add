"""What the compiler would generate for a card, on a machine without one: the code is written and counted, not run.

Inductor asks a card a handful of questions (its properties, its version, its Triton target). Here they are answered for
it, so it writes the very kernels that the card would launch.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

_LAUNCH = re.compile(r"(triton_\w+)\.run\(|extern_kernels\.(\w+)\(|torch\.ops\.(\w+\.\w+)\.\w+\(")


@contextlib.contextmanager
def code_for(capability: int = 90) -> Iterator[None]:
    """Let Inductor write code for a card of this compute capability, 90 for 9.0 (H100).

    For a process of its own: what Inductor and Triton have been told of the card they do not forget afterwards.
    """
    import torch._dynamo.device_interface as interfaces
    import torch._inductor.config as inductor
    import triton
    from torch.utils._triton import has_triton
    from triton.backends.compiler import GPUTarget

    properties = SimpleNamespace(
        name="fake",
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=132,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        shared_memory_per_block_optin=232448,
        total_memory=80 * 2**30,
    )

    base: Any = interfaces.DeviceInterface

    class Card(base):
        class Worker:
            current_device = staticmethod(lambda: 0)
            get_device_properties = staticmethod(lambda device=None: properties)

        device, Event, Stream = contextlib.nullcontext, torch.Event, torch.Stream
        is_available = is_bf16_supported = is_triton_capable = staticmethod(lambda *a, **k: True)
        current_device = exchange_device = maybe_exchange_device = get_raw_stream = staticmethod(lambda *a: 0)
        set_device = synchronize = raise_if_triton_unavailable = staticmethod(lambda *a: None)
        device_count = staticmethod(lambda: 1)
        get_device_properties = staticmethod(lambda device=None: properties)
        get_compute_capability = staticmethod(lambda device=None: capability)

    interfaces.init_device_reg()  # else the true interface would take this one's place when it is first asked for
    for name in ("cuda", "cuda:0"):
        interfaces.register_interface_for_device(name, Card)
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
    )
    triton.runtime.driver.set_active(driver)
    has_triton.cache_clear()  # it may have been asked for this machine
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.version, "cuda", "12.8"),
        # folding constants runs kernels
        inductor.patch(force_disable_caches=True, compile_threads=1, joint_graph_constant_folding=False),
    ):
        yield


def launches(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Counter[str]:
    """Kernels that Inductor's code for `graph` launches, by name; those that it wrote itself are `triton_...`."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.utils import get_code
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensor

    fake = next(x.fake_mode for x in inputs if isinstance(x, FakeTensor))
    with V.set_fake_mode(fake):
        code = "".join(get_code(compile_fx_inner, graph, list(inputs)))
    body = code[code.index("def call(") :]
    return Counter(next(filter(None, found)) for found in _LAUNCH.findall(body))
