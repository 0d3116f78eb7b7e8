"""What if the GPU pages for itself? The device tier: slots, tables and plans that live on the device."""
