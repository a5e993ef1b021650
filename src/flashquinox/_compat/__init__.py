"""All uses of parts of JAX that JAX does not promise to keep: `jax.extend`,
`jax.interpreters`, and the structure of jaxprs.

- `jax.extend.core.Primitive` and `jax.interpreters` define primitives that kernels
    recognize, derivatives that are errors, and steps and copies that are lowered for
    each platform by functions of their own. Without them, this library cannot be
    imported.
- The parameters of primitives in a jaxpr, and `jax.extend.core.Literal`, are needed to
    check the rules of users and to evaluate functions in kernels. Without them, no
    optimizer can be made.
- `jax.extend.core.jaxpr_as_fun`: kernels apply what was traced once. Without it, no
    kernel can be traced; `backend="xla"` works.
- `partial_eval.dce_jaxpr` tells `release_step` which gradients are zero, so that it
    does not store them. Without it, they are stored.
- The `abstract_device` of a mesh and `jax_default_device` give the device that a
    program is traced for, which decides its kernels. Without them, the first local
    device decides.

- The `manual_axis_type` of an array's type tells whether weights differ between the
    devices of an enclosing `shard_map`. Without it, nothing warns of norms that are
    those of parts.

Pallas is only imported by backends, when they are needed: see `_backends.platforms`.
"""

from .by_platform import ByPlatform as ByPlatform
from .control_flow import Branches as Branches, Scan as Scan, While as While
from .devices import traced_device as traced_device
from .functions import (
    as_function as as_function,
    called as called,
    CALLS as CALLS,
    evaluate as evaluate,
    Function as Function,
    inputs_read as inputs_read,
    Literal as Literal,
)
from .kernel_call import KernelCall as KernelCall
from .manual_axes import varying_axes as varying_axes
from .primitives import (
    operation as operation,
    Primitive as Primitive,
    refusal as refusal,
    unchanged as unchanged,
)
from .tape import Tape as Tape
