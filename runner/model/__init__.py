"""Models through torch and diffusers: devices, LoRA, quantization, recomputation; one package per model family."""
