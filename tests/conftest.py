import collections
import gc
import os
import shutil
import tempfile
import zlib


# The TPU compiler may be installed where there is no TPU: JAX must not look for one,
# and the compiler must not ask a cloud what machine it is on. A GPU is for the tests
# that ask for one.
os.environ.setdefault(
    "JAX_PLATFORMS", "cpu,cuda" if os.path.exists("/dev/nvidiactl") else "cpu"
)
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
# LLVM's first level of optimization, where XLA compiles for CPUs alone. It takes an
# eighth less time, and rounds as the others do: from this one on, a product and a sum
# are one operation.
if "cuda" not in os.environ["JAX_PLATFORMS"]:
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
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

# By default, Python looks through millions of objects of JAX for garbage every few
# hundred allocations of a trace: a tenth of the time.
gc.set_threshold(100_000, 50, 100)

# Compiled programs, which the processes of this run share: several test files, and the
# programs that tests start, take the same steps. The first process makes the folder,
# and removes it.
_programs = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.mkdtemp(prefix="flashquinox-tests-")
    for _name, _value in {
        "jax_compilation_cache_dir": _programs,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
        jax.config.update(_name, _value)
        os.environ[_name.upper()] = str(_value)

# A library must not lean on implicit promotion: both are errors here.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline: the first example of every shape compiles. Derandomized, so that a
# failure is a change of the code and not of the dice.
hypothesis.settings.register_profile(
    "flashquinox", deadline=None, derandomize=True, max_examples=40
)
hypothesis.settings.load_profile("flashquinox")


@pytest.fixture(scope="session", autouse=True)
def kernels_for_gpus_on_cpus():
    # Not before: types are checked in what is imported from now on.
    from .backends import host

    host.install()


@pytest.fixture
def without_typechecker():
    # The library's own messages, as users get them who run no type checker.
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_addoption(parser):
    parser.addoption(
        "--part",
        choices=["first", "second"],
        help="CI runs one part on each of two Pythons. The second: one case of each "
        "test, or one for each kernel, and half of the tests with a single case, but "
        "none of what is marked as `once`. The first: all that the second has not; but "
        "half of the cases of tests that are marked as `product`.",
    )


# After cases that are slow were left out.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    part = config.getoption("part")
    if part is None:
        return
    groups = collections.defaultdict(list)
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        kernel = parameters.get("backend")
        groups[item.nodeid.split("[")[0], kernel].append(item)
    kept = set()
    for group in groups.values():
        marks = {mark.name for mark in group[0].iter_markers()}
        first, second = _halves(group) if "product" in marks else (group, group)
        # Another one for each test.
        number = zlib.crc32(group[0].nodeid.encode())
        is_in_first = "once" in marks or (len(group) == 1 and number % 2 == 1)
        chosen = None if is_in_first else second[number % len(second)]
        if part == "first":
            kept.update(x for x in first if x is not chosen)
        elif chosen is not None:
            kept.add(chosen)
    config.hook.pytest_deselected(items=[x for x in items if x not in kept])
    items[:] = [x for x in items if x in kept]


def _halves(group):
    """The cases of one test in two halves. Of each two, one is in the first half, so
    that values of options are in both as often as can be. A single case is in both."""
    if len(group) == 1:
        return group, group
    # How many more cases of this value are in the first half.
    surplus = collections.Counter()
    values = [item.callspec.id.split("-") for item in group]
    of = lambda i: sum(surplus[value] for value in values[i])
    # A test with two cases has its first one in either half.
    tie = zlib.crc32(group[0].nodeid.encode()) % 2 == 0
    halves = [], []
    first = False
    for i, item in enumerate(group):
        if i % 2 == 1:
            first = not first
        else:
            other = of(i + 1) if i + 1 < len(group) else 0
            first = tie if of(i) == other else of(i) < other
        surplus.update({value: 1 if first else -1 for value in values[i]})
        halves[0 if first else 1].append(item)
    return halves


def pytest_unconfigure():
    if _programs is not None:
        shutil.rmtree(_programs, ignore_errors=True)
