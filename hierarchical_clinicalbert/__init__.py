"""The library behind the commands: reading, data, evaluation, publishing, training and prediction."""
