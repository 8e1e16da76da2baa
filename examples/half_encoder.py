"""Write an encoder that has every second layer of another one, for a student that is almost twice as fast:

    python examples/half_encoder.py ENCODER results/half
    python train.py … --model_name_or_path results/half --teacher results/mine --output_dir results/fast
    python push_to_hub.py --model results/fast --merge --repo_id user/name

ENCODER is a folder, or an id on the Hub, at its newest commit. The student learns from a checkpoint over the whole encoder. Its own
encoder is not on the Hub, so ``--merge`` publishes it with the checkpoint.
"""

import argparse

from torch import nn
from transformers import AutoModel, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", help="encoder with the layers")
    parser.add_argument("output", help="folder for the new encoder")
    arguments = parser.parse_args()
    encoder = AutoModel.from_pretrained(arguments.encoder)
    lists = {name: part for name, part in encoder.named_modules() if isinstance(part, nn.ModuleList)}
    name, layers = next(pair for pair in lists.items() if len(pair[1]) == encoder.config.num_hidden_layers)
    layers = layers[::2]
    encoder.set_submodule(name, layers)
    encoder.config.num_hidden_layers = len(layers)
    encoder.save_pretrained(arguments.output)
    AutoTokenizer.from_pretrained(arguments.encoder).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
