"""Devices and processes: the only file that knows how many there are.

A training step is written once, per device, with the axis name `AXIS`: the batch is split over the devices, the state is the same on all,
and sums over the axis make the result that of one device. Leaves of the state may be divided instead: device d holds the d-th stretch of
their rows. `DataParallel` runs the step with `jax.pmap` over the devices of one process, or with `jax.shard_map` on a mesh over the devices
of all processes.
"""

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tenrec_jax.errors import UserError
from tenrec_jax.training.workers import COORDINATOR, PROCESS, PROCESSES

AXIS = "data"
How = Literal["auto", "pmap", "shard_map"]

# Results of a step are read so many steps later, when they are there without waiting.
STEPS_BEHIND = 2

SLURM_TASKS = "SLURM_STEP_NUM_TASKS"


class DataParallel:
    """Runs per-device functions over devices.

    The state is made of global arrays, of which every process holds its part: a leaf lies on every device, or is divided by its leading
    axis. Only what is divided has another shape within a run by "pmap": the devices are an axis of their own before the rows of each.

    Where a method takes `divided`, it says which leaves of the tree are divided, as a prefix of the tree; by default none is. Their rows
    must be a multiple of the devices.

    Args:
        devices: where to run, in the order of their processes; by default all there are.
        how: "auto" is pmap in a run of one process and shard_map in one of several.

    Raises:
        UserError: pmap for several processes.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None, how: How = "auto") -> None:
        if how == "pmap" and jax.process_count() > 1:
            raise UserError("pmap runs the devices of one process; with --num_processes=2 and more take shard_map.")
        self.devices = list(devices or jax.devices())
        self.how = ("shard_map" if jax.process_count() > 1 else "pmap") if how == "auto" else how
        # `Mesh` keeps the order of the devices: a process's rows of the batch lie where the batch of one process has them.
        self._mesh = Mesh(np.asarray(self.devices), (AXIS,), axis_types=(AxisType.Auto,))

    @property
    def size(self) -> int:
        """Number of devices of all processes; batch sizes are multiples of it."""
        return len(self.devices)

    @property
    def process_index(self) -> int:
        """Which of the processes this is."""
        return jax.process_index()

    @property
    def process_count(self) -> int:
        """Number of processes."""
        return jax.process_count()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes what the run leaves, checkpoints apart: those are written by all."""
        return self.process_index == 0

    def shapes(self, tree: Any, divided: Any = False) -> Any:
        """The shapes of a tree and where its leaves lie in a state that `unreplicate` returns."""

        def shape(x: Any, rows: bool) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding(AXIS) if rows else self._sharding())

        return jax.tree.map(shape, tree, jax.tree.broadcast(divided, tree))

    def replicate(self, tree: Any, divided: Any = False) -> Any:
        """The state of a run from a tree that is the same in all processes.

        Arrays that lie where `shapes` says are taken as they are, and their memory is the run's from then on: a table that is made in
        place is never held twice.
        """

        def place(x: Any, rows: bool) -> jax.Array:
            sharding = self._sharding(AXIS) if rows else self._sharding()
            if not isinstance(x, jax.Array) or x.sharding != sharding:
                x = jax.device_put(x if rows else np.asarray(x), sharding)
            if rows and self.how == "pmap":
                return self._reshaped(x, (self.size, -1, *x.shape[1:]), donate_argnums=0)
            return x

        return jax.tree.map(place, tree, jax.tree.broadcast(divided, tree))

    def unreplicate(self, tree: Any, divided: Any = False) -> Any:
        """The state as checkpoints keep it, of global arrays without an axis of devices. It shares the memory of what is not divided."""

        def plain(x: jax.Array, rows: bool) -> jax.Array:
            return self._reshaped(x, (-1, *x.shape[2:])) if rows and self.how == "pmap" else x

        return jax.tree.map(plain, tree, jax.tree.broadcast(divided, tree))

    def local(self, tree: Any) -> Any:
        """The result of `unreplicate` on this process's first device, to compute with in this process alone.

        All processes call it: the parts of what is divided are gathered.
        """

        def whole(x: jax.Array) -> jax.Array:
            if x.is_fully_replicated:
                return x.addressable_data(0)
            gathered = np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
            return jax.device_put(gathered, x.addressable_data(0).device)

        return jax.tree.map(whole, tree)

    def read(self, tree: Any) -> Any:
        """What is the same on every device, as NumPy arrays. Computes nothing on a device, where it would wait for what runs there."""
        return jax.device_get(self.local(tree))

    def split(self, batch: Any) -> Any:
        """Split the leading axis of every leaf over the devices.

        Args:
            batch: this process's rows, [B / processes, ...]; process i has the i-th stretch of the batch.

        Returns:
            What a compiled step takes: [devices, B / devices, ...] for pmap, the global [B, ...] for shard_map.

        Raises:
            ValueError: the rows cannot be divided.
        """
        devices = sum(device.process_index == self.process_index for device in self.devices)

        def split(x: np.ndarray) -> Any:
            if len(x) % devices:
                raise ValueError(
                    f"{len(x)} rows cannot be divided over {devices} devices: batch sizes must be multiples of {self.size}"
                )
            if self.how == "pmap":
                return np.asarray(x).reshape(devices, -1, *x.shape[1:])
            return jax.make_array_from_process_local_data(self._sharding(AXIS), np.asarray(x))

        return jax.tree.map(split, batch)

    def compile(
        self, step: Callable, *, donate_state: bool = True, broadcast: Sequence[int] = (), divided: Any = False
    ) -> jax.stages.Wrapped:
        """A per-device function as one that runs on all devices.

        Args:
            step: function of (state, batch, ...), which may sum over `AXIS`; what it returns is the same on every device. Where leaves of
                the state are divided, it returns a pair: the state, likewise divided, and what is the same on every device.
            donate_state: reuse the memory of argument 0.
            broadcast: positions of arguments that are not split: every device gets the same.
            divided: leaves of the state that are.

        Returns:
            The function of the replicated state, the split batch and the broadcast arguments; its results are replicated.
        """
        arguments = range(step.__code__.co_argcount)
        donate = (0,) if donate_state else ()
        # pmap names axes of arguments, shard_map those of the mesh.
        whole: Any = None if self.how == "pmap" else PartitionSpec()
        parts: Any = 0 if self.how == "pmap" else PartitionSpec(AXIS)
        state = jax.tree.map(lambda rows: parts if rows else whole, divided)
        places = (state, *(whole if i in broadcast else parts for i in arguments[1:]))
        results = (state, whole) if any(jax.tree.leaves(divided)) else whole
        if self.how == "pmap":
            return jax.pmap(step, AXIS, in_axes=places, out_axes=results, devices=self.devices, donate_argnums=donate)
        # Checking would make the gradient of a replicated argument a sum over the devices already; the step sums itself, as pmap needs it.
        sharded = jax.shard_map(step, mesh=self._mesh, in_specs=places, out_specs=results, check_vma=False)
        return jax.jit(sharded, donate_argnums=donate)

    def wait(self, name: str) -> None:
        """Go on when every process has come to the point of this name."""
        multihost_utils.sync_global_devices(name)

    def any_asked(self) -> Callable[[bool], bool]:
        """A function that all processes call after every step, each with its own answer: whether one of them has said yes.

        All get the same answer at the same step, in a run of several processes `STEPS_BEHIND` steps late: nobody waits for it.
        """
        if self.process_count == 1:
            return bool
        devices = sum(device.process_index == self.process_index for device in self.devices)
        largest = jax.jit(jnp.max, out_shardings=self._sharding())
        answers: deque[jax.Array] = deque()

        def ask(asked: bool) -> bool:
            mine = np.full(devices, asked, np.int32)
            answers.append(largest(jax.make_array_from_process_local_data(self._sharding(AXIS), mine)))
            return len(answers) > STEPS_BEHIND and bool(self.read(answers.popleft()))

        return ask

    def from_main(self, value: float) -> float:
        """The main process's value, in all of them: what they decide by must not differ by a rounding."""
        if self.process_count == 1:
            return value
        # As bytes, since arrays on devices hold 32 bits.
        sent = np.frombuffer(np.float64(value).tobytes(), np.uint8)
        return float(np.frombuffer(np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes(), np.float64)[0])

    def _sharding(self, *axes: str) -> NamedSharding:
        return NamedSharding(self._mesh, PartitionSpec(*axes))

    def _reshaped(self, x: jax.Array, shape: tuple[int, ...], **how: Any) -> jax.Array:
        """An array that is divided by its leading axis, in another shape that is; nothing moves between devices."""
        return jax.jit(jnp.reshape, static_argnums=1, out_shardings=self._sharding(AXIS), **how)(x, shape)


def join_processes(count: int, environment: Mapping[str, str] = os.environ) -> bool:
    """Become one of the processes of a run, before anything else is asked of JAX.

    The environment says which: by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or as a Slurm step of several tasks.

    Args:
        count: processes that the run is meant to have.
        environment: of this process.

    Returns:
        False if the environment names no coordinator; then nothing was done.

    Raises:
        UserError: the environment is incomplete or is that of another number of processes.
    """
    if COORDINATOR in environment:
        found, index = _number(environment, PROCESSES), _number(environment, PROCESS)
        place: dict[str, Any] = {"process_id": index, "cluster_detection_method": "deactivate"}
        place |= {"coordinator_address": environment[COORDINATOR], "num_processes": found}
        if not index < found:
            raise UserError(f"{PROCESS} is {index}; of {found} processes the last is {found - 1}.")
    elif SLURM_TASKS in environment and _number(environment, SLURM_TASKS) > 1:
        found, place = _number(environment, SLURM_TASKS), {"cluster_detection_method": "slurm"}
    else:
        return False
    if found != count:
        raise UserError(
            f"The environment makes this one of {found} processes: pass --num_processes={found}, not {count}."
        )
    # The service would catch SIGTERM and let the process run on; runs end at once and resume from their checkpoint.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(**place)
    return True


def leave_processes() -> None:
    """End as one of the processes of a run, when all of them have come to this point."""
    jax.distributed.shutdown()


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}; it must be a number, since the environment names a coordinator.")
    return int(text)
