"""MuonClip and its parts, as optax gradient transformations."""
