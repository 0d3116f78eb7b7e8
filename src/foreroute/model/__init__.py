"""Where does foreroute meet transformers? Builds a model without experts, with its routers and expert modules."""
