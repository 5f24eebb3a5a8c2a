"""Qwen2-Audio in native PyTorch: configuration, both towers, the paged attention protocol, the loader.

Knows nothing of requests, scheduling or HTTP: it takes packed tensors and returns packed tensors.
Reading order: config, layers, qwen2, log_mel, audio_encoder, qwen2_audio, attention/, loader.
"""
