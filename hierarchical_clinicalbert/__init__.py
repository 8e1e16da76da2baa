"""The library behind the commands: reading, data, evaluation, publishing, training and prediction.

A command imports it before transformers, which imports bitsandbytes. On CPUs with bfloat16
products, bitsandbytes loads a kernel from the Hub at its import: code at no pinned commit. The
variable names a folder in its place that does not exist.
"""

import logging
import os

os.environ.setdefault("LOCAL_KERNELS", "kernels-community/quantization-bitsandbytes=none")
logging.getLogger("bitsandbytes").setLevel(
    logging.ERROR
)  # it warns of the missing kernel, and of each 8-bit layer's cast
