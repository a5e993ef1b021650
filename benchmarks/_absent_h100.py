"""An H100 to compile for, where there is none: JAX's plugin for CUDA is enough."""

from typing import Any

from jax.experimental import topologies


# Of drivers since CUDA 12.9, which allow the most in graphs. More memory than there is:
# this program has the state in both memories.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 849784340480
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  runtime_version: "12.9.0"
  driver_version: "13.0.0"
  compile_time_toolkit_version: "12.9.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 1 patch: 1 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def h100() -> Any:
    """
    **Raises:**

    `RuntimeError` without JAX's plugin for CUDA.
    """
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology="1x1x1", target_config=_H100
    )
    return topology.devices[0]
