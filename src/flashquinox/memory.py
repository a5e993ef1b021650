"""What a device holds in training, before anything is allocated."""

from ._memory.plan import (
    DeviceMemory as DeviceMemory,
    memory_plan as memory_plan,
    MemoryPlan as MemoryPlan,
)
