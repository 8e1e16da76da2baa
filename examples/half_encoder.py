"""Write every second layer of a checkpoint's encoder as a new encoder, for a student that is almost
twice as fast:

    python examples/half_encoder.py results/mine results/half
    python predict.py --model results/mine --input train.csv --output teacher.parquet
    --probabilities python train.py … --model_name_or_path results/half --teacher teacher.parquet
    --output_dir results/fast python push_to_hub.py --model results/fast --merge --repo_id user/name

The adapter is merged first, and the last layer is kept. The hashes of the texts that the checkpoint
was trained on are copied: train.py does not score the student on them. The new encoder is not on
the Hub, so ``--merge`` publishes it with the student.
"""

import argparse
import sys
from pathlib import Path

from torch import nn
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hierarchical_clinicalbert.data.trained_texts import read_trained_texts, write_trained_texts
from hierarchical_clinicalbert.reading.foreign_code import refuse_foreign_code


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", help="folder of a checkpoint that train.py wrote, or its id on the Hub"
    )
    parser.add_argument("output", help="folder for the new encoder")
    arguments = parser.parse_args()
    try:
        refuse_foreign_code(arguments.checkpoint)
        encoder = AutoModel.from_pretrained(arguments.checkpoint, trust_remote_code=True).encoder
    except (OSError, ValueError) as error:
        parser.error(f"cannot load the checkpoint {arguments.checkpoint}: {error}")
    num_layers = encoder.config.num_hidden_layers
    lists = {
        name: part for name, part in encoder.named_modules() if isinstance(part, nn.ModuleList)
    }
    name, layers = next(pair for pair in lists.items() if len(pair[1]) == num_layers)
    encoder.set_submodule(name, layers[(num_layers - 1) % 2 :: 2])
    encoder.config.num_hidden_layers = (num_layers + 1) // 2
    encoder.save_pretrained(arguments.output)
    AutoTokenizer.from_pretrained(arguments.checkpoint, trust_remote_code=True).save_pretrained(
        arguments.output
    )
    write_trained_texts(Path(arguments.output), read_trained_texts(arguments.checkpoint), [], [])


if __name__ == "__main__":
    main()
