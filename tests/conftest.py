"""Settings of the test session, made before JAX starts."""

import tempfile

import jax

# Four virtual CPU devices, so that data parallelism is tested for real.
jax.config.update("jax_num_cpu_devices", 4)
# Several tests compile the same small models: the second one reads the first one's result.
jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="tenrec_jax_xla_"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
