"""Four virtual CPU devices, so that data parallelism is tested for real; set before JAX starts."""

import jax

jax.config.update("jax_num_cpu_devices", 4)
