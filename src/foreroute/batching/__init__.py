"""Who shares a step: several requests answered by one model at once."""
