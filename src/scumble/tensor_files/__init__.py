"""Tensor files: what a .safetensors file holds, told with suspicion, to those who read adapters and to those who read
base models."""
