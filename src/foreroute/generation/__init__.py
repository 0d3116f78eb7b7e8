"""How is one answer made? The decode loop, and reuse of a shared prefix."""
