"""Kinds of context parallelism: ways for ranks that hold other tokens of the same rows to attend together.

To add one, add a file that registers it. A kind says which tokens of a row a rank computes (`columns`), prepares masks
for a pass (`prepare`), computes attention (`attend`), and names what it cannot do (`length_problems`, `head_problems`).
On an axis of size 1 each of them is the attention kind alone.
"""

from typing import Any

from megatrain.base.registry import Registry

CONTEXT: Registry[Any] = Registry("cp_kind", "megatrain.nn.context")
