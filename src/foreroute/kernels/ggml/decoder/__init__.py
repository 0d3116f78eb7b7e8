"""What a decoder layer computes beside its experts, as graphs."""
