"""The engine: continuous batching over a paged KV cache. No text, no HTTP.

Reading order: messages (what crosses its border), sequence, block_manager, encoder_cache, scheduler (these are
torch-free), input_batch, sampler, model_runner (these own the device), core (the step), process, client.
"""
