"""Programs that turn flags into one library call."""
