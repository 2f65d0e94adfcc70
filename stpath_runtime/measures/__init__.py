"""How exact and how fast an engine is on this machine, and what the machine can run."""
