"""Frozen dataclasses that describe a run; validated when built; no arrays."""
