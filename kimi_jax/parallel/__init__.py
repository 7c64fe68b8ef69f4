"""The mesh, the rules that place arrays on it, and the communication between its devices."""
