import os


# The TPU compiler may be installed where there is no TPU: JAX must not look for one,
# and the compiler must not ask a cloud what machine it is on. A GPU is for the tests
# that ask for one.
os.environ.setdefault(
    "JAX_PLATFORMS", "cpu,cuda" if os.path.exists("/dev/nvidiactl") else "cpu"
)
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
# Several processes share it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Devices wait for each other in threads of one pool: it must not run out of them, as it
# does where there are few cores.
os.environ.setdefault("PJRT_NPROC", "32")
# Nor is there a TPU that two processes could want at the same time.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")

import hypothesis
import jax
import jaxtyping
import pytest


# For tests of sharding. All others see the first.
jax.config.update("jax_num_cpu_devices", 8)

# A library must not lean on implicit promotion: both are errors here.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline: the first example of every shape compiles. Derandomized, so that a
# failure is a change of the code and not of the dice.
hypothesis.settings.register_profile(
    "flashquinox", deadline=None, derandomize=True, max_examples=40
)
hypothesis.settings.load_profile("flashquinox")


@pytest.fixture
def without_typechecker():
    # The library's own messages, as users get them who run no type checker.
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
