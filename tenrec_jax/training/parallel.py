"""Devices: the only file that knows how many there are.

A training step is written once, per device, with the axis name `AXIS`. `DataParallel` runs it with `jax.pmap` over the local devices:
the batch is split over them, the state is replicated, and sums over the axis make the result that of one device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

AXIS = "data"


class DataParallel:
    """Runs per-device functions over the local devices.

    Args:
        devices: where to run; all local devices by default.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None) -> None:
        self.devices = list(devices or jax.local_devices())

    @property
    def size(self) -> int:
        """Number of devices; batch sizes are multiples of it."""
        return len(self.devices)

    def replicate(self, tree: Any) -> Any:
        """Copies of a tree on every device, with a leading device axis."""
        return jax.device_put(jax.tree.map(lambda x: np.stack([np.asarray(x)] * self.size), tree), self._sharding())

    def unreplicate(self, tree: Any) -> Any:
        """The first device's copy of a replicated tree."""
        return jax.tree.map(lambda x: x[0], tree)

    def split(self, batch: Any) -> Any:
        """Split the leading axis of every leaf over the devices: [B, ...] to [devices, B / devices, ...]."""
        return jax.tree.map(lambda x: np.asarray(x).reshape(self.size, -1, *x.shape[1:]), batch)

    def compile(self, step: Callable, *, donate_state: bool = True, broadcast: Sequence[int] = ()) -> Callable:
        """`jax.pmap` of a per-device function.

        Args:
            step: function of (state, batch, ...), which may sum over `AXIS`.
            donate_state: reuse the memory of argument 0.
            broadcast: positions of arguments without a device axis, the same for all.
        """
        arguments = step.__code__.co_argcount
        in_axes = tuple(None if i in broadcast else 0 for i in range(arguments))
        donate = (0,) if donate_state else ()
        return jax.pmap(step, axis_name=AXIS, in_axes=in_axes, devices=self.devices, donate_argnums=donate)

    def _sharding(self) -> jax.sharding.Sharding:
        mesh = jax.make_mesh((self.size,), (AXIS,), devices=self.devices, axis_types=(jax.sharding.AxisType.Auto,))
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
