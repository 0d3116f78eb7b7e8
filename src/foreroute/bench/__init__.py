"""Measure speed and bytes moved, beside the limits of the disk, the memory and the eviction policy."""
