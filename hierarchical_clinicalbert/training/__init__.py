"""Train a model from flags: arguments and recipes, data, encoder, adapter, losses, sampler,
trainer, resuming.
"""
