"""The small trained Mixture-of-Experts models that ship, and how they are made."""
