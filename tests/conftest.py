"""Eight simulated devices and the persistent compilation cache, for every test."""

import pathlib
import tempfile

import jax


def pytest_configure(config):
    del config
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    cache = pathlib.Path(tempfile.gettempdir()) / "kimi_jax_test_compilation_cache"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
