"""File formats: safe checkpoints (safetensors), GPTQ tensors and configs, GGUF sources."""
