"""The model on CUDA and NCCL: filled from HF files, loaded from a checkpoint, logits against transformers on the same card.

One command: ``python -m pytest tests/gpu``. Start-up costs most of the time on such a machine, so the tests are few and fat.
"""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from mimo_jobs.layout import ComponentLayout as Layout
from mimo_jobs.layout import ParallelLayout
from tests.conversion_ranks import convert

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 1, reason="no CUDA device"), pytest.mark.timeout(540)]

COLOCATED = {
    1: {"one rank": ParallelLayout(world_size=1)},
    2: {
        "colocated tp2": ParallelLayout(Layout(tp=2), Layout(tp=2), 2),
        "colocated tp2 / dp2": ParallelLayout(Layout(tp=2, rank_offset=0), Layout(dp=2, rank_offset=0)),
        "language | images": ParallelLayout(Layout(), Layout(rank_offset=1)),
        "images | language": ParallelLayout(Layout(rank_offset=1), Layout()),
    },
    4: {
        "pp2 tp1 | tp2, images first": ParallelLayout(Layout(pp=2, rank_offset=2), Layout(tp=2, rank_offset=0)),
        "tp2 | tp2": ParallelLayout(Layout(tp=2), Layout(tp=2)),
    },
}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_logits_on_nccl_are_those_of_transformers(tmp_path: Path, world: int) -> None:
    if world > GPUS:
        pytest.skip(f"needs {world} CUDA devices, found {GPUS}")
    from tests.gloo.batches import VARIED, hf_logits, image_batch, text_batch, tiny
    from tests.gloo.test_import_into_model import as_hf

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    config, model = tiny(layers=5, vocab_size=321)
    source = as_hf(tmp_path / "hf", config, {n: t.detach() for n, t in model.state_dict().items()})
    one = {"language": {}, "images": {}, "world_size": 1}
    convert(tmp_path / "r", "import", one, model=str(source), target=str(tmp_path / "mimo"))
    model = model.cuda().eval()
    batches = {}
    for name, batch in (("text", text_batch(config)), ("image", image_batch(config, VARIED[:2]))):
        moved = type(batch)(**{k: v.cuda() if torch.is_tensor(v) else v for k, v in vars(batch).items()})
        with torch.no_grad():
            batches[name] = (
                {k: v.cpu() if torch.is_tensor(v) else v for k, v in vars(moved).items()},
                hf_logits(model, moved).cpu(),
            )
    torch.save(batches, tmp_path / "batches.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_rank, (world, port, config, source, tmp_path), nprocs=world)


def _rank(rank: int, world: int, port: int, config: dict[str, Any], source: Path, work: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.cuda.set_device(rank)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))

    from mimo_jobs.checkpoint.model_io import load_model
    from mimo_jobs.conversion.fill import fill_model
    from mimo_jobs.modeling.build import build
    from mimo_jobs.modeling.forward import forward_logits, mrope_position_ids
    from tests.gloo.reference_weights import live_parameters

    batches = torch.load(work / "batches.pt", weights_only=True)
    for name, layout in COLOCATED[world].items():
        resolved = layout.resolve()
        built = build(config, resolved)
        fill_model(built, source)
        filled = {n: p.detach().clone() for n, p in live_parameters(built).items()}
        with torch.no_grad():
            for parameter in live_parameters(built).values():
                parameter.fill_(float("nan"))
        load_model(built, work / "mimo")
        for n, parameter in live_parameters(built).items():
            assert parameter.is_cuda and torch.equal(parameter, filled[n]), (name, n)
        for kind, (batch, expected) in batches.items():
            if kind == "image" and "tp2 / dp2" in name:
                continue  # megatron-core's colocated gather wants images of one size
            ids, grid, pixels = batch["input_ids"], batch.get("grid_thw"), batch.get("pixel_values")
            positions = mrope_position_ids(built.hf, ids, grid)
            found = forward_logits(
                built, ids.cuda(), positions.cuda(), None if pixels is None else pixels.cuda(), None if grid is None else grid.cuda()
            )  # fmt: skip
            if found is not None:
                error = (found.cpu().float() - expected).abs().max().item()
                print(f"rank {rank} {name} {kind}: max abs {error:.2e}", flush=True)
                assert error < 5e-5, (name, kind, error)
        dist.barrier()
    dist.destroy_process_group()
