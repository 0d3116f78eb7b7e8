"""Is this machine ready? What `foreroute doctor` looks at, without torch."""
