"""From flags to a trained model: arguments and recipes, data, encoder, adapter, losses, sampler, trainer, resuming."""
