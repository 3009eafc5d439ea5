"""The way it is usually done, as a baseline: gather every tensor on rank 0, which writes alone with safetensors.

Run by benchmarks/conversion.py under torchrun's environment variables: ``python gather_baseline.py SOURCE TARGET``.
Every rank holds its tensor-parallel part of each tensor in memory before the clock starts.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from mimo_jobs.families import family_of
from mimo_jobs.families.spec import Cut
from mimo_jobs.weights.safetensors_io import open_hf


def main(source: str, target: str) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    hf = open_hf(Path(source))
    rules = family_of(config := json.loads((Path(source) / "config.json").read_text())).weight_map(config).rules
    columns = {t.name for r in rules for t in r.hf if any(s.cut is Cut.COLUMNS for s in r.stored)}
    whole = {t.name for r in rules for t in r.hf if any(s.cut is Cut.REPLICATED for s in r.stored)}
    parts = {}
    for file in hf.shards:
        with safe_open(str(Path(source) / file), "pt") as opened:
            for name in hf.shards[file].tensors:
                tensor = opened.get_tensor(name)
                if name in whole or name.startswith("mtp.") or tensor.shape[0] % size:
                    parts[name] = (None, tensor.clone())
                else:
                    axis = 1 if name in columns else 0
                    parts[name] = (axis, tensor.chunk(size, axis)[rank].contiguous().clone())
    dist.barrier()
    start = time.perf_counter()
    for file, shard in hf.shards.items():
        full = {}
        for name in shard.tensors:
            axis, part = parts[name]
            if axis is None:
                full[name] = part
                continue
            pieces = [torch.empty_like(part) for _ in range(size)] if rank == 0 else None
            dist.gather(part, pieces, 0)
            if rank == 0:
                full[name] = torch.cat(pieces, axis)
        if rank == 0:
            save_file(full, str(Path(target) / file), metadata=shard.metadata)
    dist.barrier()
    if rank == 0:
        print(json.dumps({"seconds": time.perf_counter() - start}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
