"""The Kimi K2 decoder as pure functions over parameter dataclasses."""
