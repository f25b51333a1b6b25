"""Peak memory of steps on CPU ranks, predicted and measured: what the allocator was asked for, moment by moment.

    torchrun --standalone --nproc-per-node 2 benchmarks/peaks.py gpt2:ddp bert:zero3 llama:1d --compiler eager

Claim: a rank's peak is known before its step runs, hardly ever under what is measured. A job is a small model and a
mode, `gpt2:zero3`, or `gpt2:zero3:0.5` within a budget half way from the least one to what is held without. Measured
is all that is alive when a step begins, and from then on what torch's profiler tells of the CPU's allocator. The
segments run as they are or compiled by Inductor. `by ops` is what ops make, without what kernels allocate inside of
themselves. A row is of the rank that holds most.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import autopar
from autopar.budget import lowered
from autopar.codegen.live import Live
from autopar.codegen.private import allocations, is_fake, storage_key
from autopar.codegen.ways import memory_of, ways_of
from autopar.core.errors import Infeasible
from autopar.plan import KINDS
from autopar.planner import setting_of

MIB = 2.0**20
HEAD = ("| job | batch | ranks | measured MiB | by ops | predicted | error | fullest moment |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |")
WARMUP = 3
VOCAB, WIDTH, LAYERS, LENGTH, HEADS = 1024, 128, 4, 128, 4
_TEXT = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": VOCAB,
         "max_position_embeddings": LENGTH}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": VOCAB,
                                               "n_positions": LENGTH, "use_cache": False}),
    "bert": ("BertForMaskedLM", "BertConfig", {**_TEXT, "intermediate_size": 4 * WIDTH}),
    "opt": ("OPTForCausalLM", "OPTConfig", {**_TEXT, "ffn_dim": 4 * WIDTH, "word_embed_proj_dim": WIDTH,
                                            "use_cache": False}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_TEXT, "intermediate_size": 3 * WIDTH, "use_cache": False}),
    "vit": ("ViTForImageClassification", "ViTConfig",
            {"image_size": 64, "patch_size": 8, "num_labels": 8, "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
             "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH}),
    "resnet": ("ResNetForImageClassification", "ResNetConfig",
               {"num_labels": 8, "embedding_size": 32, "hidden_sizes": [64, 128], "depths": [2, 2]}),
}
"""By name: class, configuration and settings, as Hugging Face has them."""


def model_and_batch(name: str, batch: int) -> tuple[Any, dict[str, Tensor]]:
    """A model in training with `batch` samples for it."""
    import transformers
    transformers.logging.set_verbosity_error()
    made_of, config, settings = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, made_of)(getattr(transformers, config)(**settings)).train()
    if name in ("vit", "resnet"):
        return model, {"pixel_values": torch.randn(batch, 3, 64, 64), "labels": torch.randint(0, 8, (batch,))}
    ids = torch.randint(2, VOCAB, (batch, LENGTH))
    return model, {"input_ids": ids, "labels": ids.clone()}


def alive() -> int:
    """Bytes of the storages of all tensors there are."""
    gc.collect()
    found = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and x.device.type == "cpu"]
    local = [x.to_local() if isinstance(x, DTensor) else x for x in found if not is_fake(x)]
    return sum({storage_key(x): x.untyped_storage().nbytes() for x in local}.values())


def measured(model: Any, batch: dict[str, Tensor], compiler: str) -> tuple[int, int, int]:
    """Bytes at the fullest moment of a step, the same without what kernels allocate inside (0 where they are not told
    apart), and before it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARMUP):
        step()
    before, now, most = alive(), 0, 0
    for nbytes in allocations(step):
        now += nbytes
        most = max(most, now)
    if compiler != "eager":
        return before + most, 0, before
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    with Live("cpu") as live:
        live.hold([*model.parameters(), *states, *batch.values()])
        others = before - live.bytes
        step()
    return before + most, others + live.peak, before


def run(job: str, arguments: argparse.Namespace) -> None:
    """One job, its row printed."""
    name, mode, *part = job.split(":")
    cluster = autopar.Cluster.preset(f"cpu:{dist.get_world_size()}")
    model, batch = model_and_batch(name, arguments.batch)
    asked = {"inputs": batch, "mode": mode, "precision": arguments.precision}
    budget = budget_of(model, cluster, asked, float(part[0])) if part else None
    started = alive() - sum(x.untyped_storage().nbytes() for x in (*model.parameters(), *batch.values()))
    made: Any = autopar.compile(model, cluster, batch="global", compiler=arguments.compiler, costs="roofline",
                                memory_budget=budget, **asked)
    del model
    seen = measured(made, batch, arguments.compiler)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, tuple(nbytes - started for nbytes in seen))
    if dist.get_rank() == 0:
        print(row(job, made, cluster, arguments, max(every)), flush=True)


def row(job: str, made: Any, cluster: Any, arguments: argparse.Namespace, seen: tuple[int, int, int]) -> str:
    """What was seen beside what is predicted."""
    worst, by_op, _ = seen
    setting, decision = setting_of(made.plan, cluster), made._decision
    ways = ways_of(lowered(decision, setting), setting, arguments.compiler != "eager")
    told = memory_of(ways, decision.kept, 0.0)
    parts = ", ".join(f"{kind} {getattr(told, kind) / MIB:.2f}" for kind in KINDS)
    figures = (job, arguments.batch, dist.get_world_size(), f"{worst / MIB:.2f}", f"{by_op / MIB:.2f}",
               f"{told.total / MIB:.2f}", f"{told.total / worst - 1:+.1%}", f"{told.moment}: {parts}")
    return f"| {' | '.join(map(str, figures))} |"


def budget_of(model: Any, cluster: Any, asked: dict[str, Any], part: float) -> float:
    """Bytes `part` of the way from the least budget to what is held without one."""
    free = autopar.plan(model, cluster, memory_budget=2.0**59, **asked).memory_bytes["device"]
    try:
        autopar.plan(model, cluster, memory_budget=1.0, **asked)
    except Infeasible as refused:
        assert refused.least_budget_bytes is not None
        return refused.least_budget_bytes + part * (free - refused.least_budget_bytes)
    return free


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+")
    parser.add_argument("--batch", type=int, default=16, help="samples of the global batch")
    parser.add_argument("--compiler", default="eager")
    parser.add_argument("--precision", default="bf16-mixed")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parsed()
    autopar.init()
    if dist.get_rank() == 0:
        print(HEAD)
    for each in arguments.jobs:
        run(each, arguments)
        gc.collect()
    dist.destroy_process_group()
