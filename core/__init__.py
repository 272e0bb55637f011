"""The method, with no user interface: torch and safetensors in, deltas and reports out."""
