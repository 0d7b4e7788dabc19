"""Distil the dense model into the compressed one."""
