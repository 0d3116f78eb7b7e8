"""The torch backend: experts computed by torch on the CPU, as stored, quantised or dequantised on use."""
