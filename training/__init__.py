"""Everything between the arguments and a trained model: data, encoder and adapter, losses, trainer, resuming."""
