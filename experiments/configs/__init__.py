"""One file per run."""
