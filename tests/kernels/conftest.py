"""Without a GPU the kernels run in Triton's interpreter, one configuration each: `uv run --with flash-linear-attention pytest -m kernels`."""

import importlib.util
import os

import torch

if importlib.util.find_spec("fla") and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from triton.runtime import autotuner

    def first_configuration(self, *args, **kwargs):
        """Tuning times kernels on a device."""
        options = kwargs | self.configs[0].all_kwargs()
        options.pop("num_ctas", None)
        return self.fn.run(*args, **options)

    autotuner.Autotuner.run = first_configuration
