"""The result of a memory plan, and the table that shows it."""

import dataclasses
import textwrap
from collections.abc import Callable
from typing import Any

from .._common.text import aligned


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """The bytes on one device in a [`flashquinox.MemoryPlan`][].

    - `parameters`: the parameters that are trained, over the number of devices.
    - `weights`: the weights that are trained.
    - `corrections`: the corrections of bfloat16 and float16 weights.
    - `master_weights`: in mixed precision, the float32 weights.
    - `moments`: the codes of compressed moments, and uncompressed moments.
    - `scales`: the scales of moments, and the parameters of codecs that learn.
    - `gradients`: the most that exist at one time, in the dtypes of the weights. `None`
        if that is not known.
    - `accumulators`: the sums of gradients of [`flashquinox.accumulate`][] or
        `optax.MultiSteps`.
    - `averages`: the average of weights of [`flashquinox.ema`][].
    - `frozen`: arrays of the model that are not trained.
    - `other`: the number of steps, and the state of Optax's wrappers.
    - `host`: what of the state is in host memory, and in no other figure.
    """

    parameters: float
    weights: int
    corrections: int
    master_weights: int
    moments: int
    scales: int
    gradients: int | None
    accumulators: int
    averages: int
    frozen: int
    other: int
    host: int = 0

    def transfer_seconds(self, bandwidth: int | float) -> float:
        """How long a step moves the state between the host and the device, at so many
        bytes a second in each direction at once."""
        return self.host / bandwidth

    @property
    def at_rest(self) -> int:
        """The bytes between steps: all but the gradients."""
        return sum(getattr(self, name) for name in CATEGORIES if name != "gradients")

    @property
    def total(self) -> int | None:
        """All bytes; `None` if the gradients are not known."""
        return None if self.gradients is None else self.at_rest + self.gradients

    @property
    def bytes_per_parameter(self) -> float | None:
        """`total` over `parameters`."""
        return None if self.total is None else self.total / max(1, self.parameters)


# The rows of the table.
CATEGORIES = (
    "weights",
    "corrections",
    "master_weights",
    "moments",
    "scales",
    "accumulators",
    "averages",
    "frozen",
    "other",
    "gradients",
)


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """The result of [`flashquinox.memory_plan`][]. `str(plan)` is a table.

    - `parameters`: the number of parameters that are trained, on all devices together.
    - `devices`: the number of devices.
    - `step`: an ordinary step of this optimizer, with all gradients at once.
    - `gradient_release`: a step in which each layer is updated as soon as its gradient
        is known. Its `gradients` are `None` if the model has no stacked blocks, or if
        gradients are accumulated.
    - `mixed_precision`: the same optimizer in Optax, in mixed precision: float32 master
        weights and float32 moments, sums of gradients and averages of weights, with the
        same weights and gradients.
    - `whole`: the bytes of weights that are replicated on every device.
    """

    parameters: int
    devices: int
    step: DeviceMemory
    gradient_release: DeviceMemory
    mixed_precision: DeviceMemory
    whole: int

    def columns(self) -> dict[str, DeviceMemory]:
        """The columns of the table, by their names."""
        return {
            "flashquinox": self.step,
            "gradient release": self.gradient_release,
            "mixed precision": self.mixed_precision,
        }

    def table(
        self, device_memory: int | None = None, host_bandwidth: int | float = 40e9
    ) -> str:
        """The table as text, with notes.

        **Arguments:**

        - `device_memory`: the memory of a device, in bytes. If given, the table has a
            line with what is left of it.
        - `host_bandwidth`: the bytes a second that move between host and device in each
            direction at once, for the time that a state in host memory takes.
        """
        columns = self.columns()
        sizes = [x.total or x.at_rest for x in columns.values()]
        unit, name = unit_of(max(sizes))
        cell = lambda size: f"{size / unit:.3f} {name}"
        rows = [("on each device", *columns)]
        for category in CATEGORIES:
            found = [getattr(x, category) for x in columns.values()]
            if any(size is None or size >= unit / 2000 for size in found):
                label = category.replace("_", " ")
                unknown = "no blocks" if self.step.accumulators == 0 else "-"
                rows.append((label, *map(_or(cell, unknown, "-"), found)))
        of_all = lambda show: [
            _or(show, "-", "-")(x) for x in (y.total for y in columns.values())
        ]
        rows.append(("total", *of_all(cell)))
        share = max(1, self.step.parameters)
        # Of frozen weights, nothing here knows how many parameters they are.
        of = "trained parameter" if self._is_mostly_frozen() else "parameter"
        rows.append((f"bytes per {of}", *of_all(lambda x: f"{x / share:.3f}")))
        if device_memory is not None:
            left = lambda x: (
                f"{cell(device_memory - x)} left"
                if x <= device_memory
                else f"{cell(x - device_memory)} too much"
            )
            rows.append((f"of {cell(device_memory)}", *of_all(left)))
        notes = self._notes()
        if self.step.host > 0:
            away = [x.host for x in columns.values()]
            rows.append(("in host memory", *map(_or(cell, "-", "-"), away)))
            seconds = self.step.transfer_seconds(host_bandwidth)
            notes.append(
                f"State in host memory: at {host_bandwidth / 1e9:g} GB/s each way at "
                f"once, a step moves it in {seconds:.3f} seconds."
            )
        notes = [textwrap.fill(note, 80) for note in notes]
        return "\n".join([aligned(rows, left=1), "", *notes])

    def _is_mostly_frozen(self) -> bool:
        return self.step.frozen > self.step.weights

    def _notes(self) -> list[str]:
        mixed = self.mixed_precision
        beside = (
            "Mixed precision: Optax with float32 master weights and float32 moments, "
            "beside the same weights and gradients"
        )
        if not self._is_mostly_frozen():
            share = max(1, mixed.parameters)
            beside += (
                f"; without gradients, {mixed.at_rest / share:.3f} bytes per parameter"
            )
        notes = ["Not in it: activations, and the temporaries of a step.", f"{beside}."]
        if self.gradient_release.gradients is None and self.step.accumulators > 0:
            notes.append(
                "Gradient release: not with sums of gradients, which need all of them."
            )
        elif self.gradient_release.gradients is None:
            notes.append(
                "Gradient release: not known here, as it takes the layers of a stack "
                "one at a time."
            )
        if self.devices > 1 and self.whole > 0:
            unit, name = unit_of(self.whole)
            notes.append(
                f"Weights of {self.whole / unit:.3f} {name} are whole on every device."
            )
        return notes

    def __str__(self) -> str:
        return self.table()


def unit_of(size: int) -> tuple[float, str]:
    """The unit in which to write a size, and its name."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return unit, name
    return 1e3, "kB"


# How to write a number that may be unknown or 0.
def _or(show: Callable[[Any], str], unknown: str, nothing: str) -> Callable[[Any], str]:
    return lambda x: unknown if x is None else nothing if x == 0 else show(x)
