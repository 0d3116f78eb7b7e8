"""The device tier: a GPU that pages experts for itself, with slots, tables and plans on the device."""
