"""Which models are on this machine, and what are they: commands that load none."""
