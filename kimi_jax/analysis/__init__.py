"""Reading a run's records, and drawing them."""
