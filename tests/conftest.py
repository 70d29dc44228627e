"""Settings of the test session, made before JAX starts."""

import os
import tempfile

import jax

# Compiling is most of what these tests do, and their arrays are tiny: XLA's optimisations would cost more than they save.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
# Four virtual CPU devices, so that data parallelism is tested for real.
jax.config.update("jax_num_cpu_devices", 4)
# Several tests compile the same small models: the second one reads the first one's result.
jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="tenrec_jax_xla_"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
