"""Order training rows into batches of similar length, to reduce padding."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

BATCHES_SORTED = 50


class LengthGroupedSampler(Sampler[int]):
    """Order rows so that each batch holds texts of similar length. The order depends on the seed
    and the epoch only.

    Rows are shuffled, sorted by length within each 50 batches, and split into batches, which are
    shuffled. The batch with the longest row comes first, so that a lack of memory shows at once. In
    a data set of at most 50 batches, lengths are first perturbed by 5 %, else each epoch would have
    the same batches.

    The sampler of this name in transformers draws from the global generator, so a resumed run gets
    another order.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        self.batch_size = batch_size
        self.lengths = torch.tensor(lengths)
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        rows = torch.randperm(len(self.lengths), generator=generator)
        blur = 0.05 if len(rows) <= BATCHES_SORTED * self.batch_size else 0.0
        keys = self.lengths[rows] * (
            1 + blur * (2 * torch.rand(len(rows), generator=generator) - 1)
        )
        batches = []
        for start in range(0, len(rows), BATCHES_SORTED * self.batch_size):
            chunk = slice(start, start + BATCHES_SORTED * self.batch_size)
            batches += rows[chunk][keys[chunk].argsort(descending=True, stable=True)].split(
                self.batch_size
            )
        # the incomplete batch stays last
        rest = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        order = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        if order:
            longest = max(range(len(order)), key=lambda i: int(self.lengths[order[i]].max()))
            order.insert(0, order.pop(longest))
        return iter(torch.cat([*order, *rest]).tolist())
