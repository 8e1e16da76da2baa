"""From flags to a trained model: arguments and recipes, data, encoder and adapter, losses, sampler, trainer, resuming."""
