"""Compressed models on disk: safetensors and JSON, validated before use."""
