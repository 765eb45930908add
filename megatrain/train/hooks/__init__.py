"""What happens beside the steps: evaluation, metrics, the console, wandb, saving, and whatever a run file adds.

A hook sees records of finished steps and has a narrow handle; it cannot reach the engine's insides. To add one, add a
file that registers a frozen dataclass with `build(handle) -> Hook`; a run file names it under `hooks`.
"""

from megatrain.base.registry import Registry
from megatrain.train.hook import HookChoice

HOOK: Registry[HookChoice] = Registry("hook", "megatrain.train.hooks")
