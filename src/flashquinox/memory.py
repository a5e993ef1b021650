"""Planning the memory of training, before anything is allocated."""

from ._memory.plan import memory_plan as memory_plan
from ._memory.report import DeviceMemory as DeviceMemory, MemoryPlan as MemoryPlan
