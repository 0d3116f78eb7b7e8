"""Where does foreroute meet transformers? The seam: a model without experts, its routers and expert modules."""
