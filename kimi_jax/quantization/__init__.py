"""Numbers stored in fewer bits than they are computed in."""
