"""A recorded run on another memory tier: what a step would take there, by an event simulation."""
