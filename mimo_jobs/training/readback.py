"""Numbers on their way from the device, while the host goes on."""

import torch
from torch import Tensor


class Readback:
    """A few numbers copied to the host behind the work that makes them; who takes them waits for no more than that work."""

    def __init__(self, numbers: Tensor) -> None:
        """``numbers``: any shape and dtype; taken as they are when the device has come this far."""
        numbers = numbers.detach()
        self._event: torch.cuda.Event | None = None
        if not numbers.is_cuda:
            self._host = numbers.clone()
            return
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        self._host.copy_(numbers, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def numbers(self) -> Tensor:
        """On the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
