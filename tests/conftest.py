"""Eight simulated devices and the persistent compilation cache, for every test."""

import pathlib
import tempfile

import jax

from kimi_jax.core.host_memory import keep_freed_memory


def pytest_configure(config):
    del config
    keep_freed_memory()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    cache = pathlib.Path(tempfile.gettempdir()) / "kimi_jax_test_compilation_cache"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
