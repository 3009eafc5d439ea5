"""The order of samples: a pure function of seed and epoch, so that any resume and any data parallel size agree."""

import numpy as np


class Order:
    """Samples of every epoch, each exactly once.

    Args:
        count: samples of an epoch, at least 1
        seed: of the run, not negative
        shuffle: a new permutation every epoch; otherwise the order of the source
    """

    def __init__(self, count: int, seed: int, shuffle: bool) -> None:
        if count < 1:
            raise ValueError(f"count={count}: an epoch has at least one sample")
        self.count, self.seed, self.shuffle = count, seed, shuffle
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def epoch(self, epoch: int) -> np.ndarray:
        """int64[count]: the samples of one epoch in their order; the latest is kept. Do not write into it."""
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, self._make(epoch)
        return self._permutation

    def _make(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.count)
        # numpy promises the same raw stream in every version, which it does not of Generator.permutation
        raw = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(self.count)
        return np.argsort(raw, kind="stable")
