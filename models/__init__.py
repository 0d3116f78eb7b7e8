"""The small trained models that ship, and how they are made."""
