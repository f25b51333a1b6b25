"""Ops that move elements, look them up, or work along dims."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.passes.rules.cases import Operand, case, i, mask, w, x

aten = torch.ops.aten


def along_cases() -> Iterator[Any]:
    yield case("cumsum", "o0", aten.cumsum.default, lambda t: t.cumsum(1), x(4, 4))
    yield case("cumprod", "o1", aten.cumprod.default, lambda t: t.cumprod(0), x(4, 4))
    yield case("logcumsumexp", "o0", aten.logcumsumexp.default, lambda t: t.logcumsumexp(-1), x(4, 4))
    yield case("cummax", "o0", aten.cummax.default, lambda t: t.cummax(1)[0], x(4, 4))
    yield case("cummin", "o0", aten.cummin.default, lambda t: t.cummin(1)[0], x(4, 4))
    yield case("sort", "o0 o2", aten.sort.default, lambda t: t.sort(1)[0], x(4, 4, 4))
    yield case("sort with its places", "o0 o2", aten.sort.default, lambda t: t.sort(1, descending=True), x(4, 4, 4))
    yield case("sort stable", "o0", aten.sort.stable, lambda t: t.sort(stable=True)[0], x(4, 4))
    yield case("argsort", "o0", aten.argsort.default, lambda t: t * t.argsort(), x(4, 4))
    yield case("argsort stable", "o0", aten.argsort.stable, lambda t: t * t.argsort(stable=True), x(4, 4))
    yield case("topk", "o0", aten.topk.default, lambda t: t.topk(2)[0], x(4, 8))
    yield case("topk with its places", "o1", aten.topk.default, lambda t: t.topk(2, 0), x(8, 4))
    yield case("glu", "o0", aten.glu.default, F.glu, x(4, 8))
    yield case("diff", "o0 o1", aten.diff.default, lambda t: t.diff(), x(4, 4, 5))
    yield case("repeat_interleave", "o0 o2", aten.repeat_interleave.self_int, lambda t: t.repeat_interleave(2, 1),
               x(4, 3, 4))
    yield case("flip", "o0", aten.flip.default, lambda t: t.flip(1, 2), x(4, 4, 4))
    yield case("repeat", "o1 o3", aten.repeat.default, lambda t: t.repeat(2, 1, 3, 1), x(4, 2, 4))
    yield case("pad by reflection", "o0 o1", aten.pad.default, lambda t: F.pad(t, (1, 2), "reflect"), x(4, 4, 6))
    yield case("stack", "o0 o2", aten.stack.default, lambda *o: torch.stack(o, 1), x(4, 4), w(4, 4))
    yield case("tril", "e0", aten.tril.default, torch.tril, x(4, 4, 4))
    yield case("triu", "e0", aten.triu.default, lambda t: t.triu(1), x(4, 4, 4))
    yield case("unbind", "o0 o2", aten.select.int, lambda t: t.unbind(1)[1], x(4, 3, 4))
    yield case("a split in unequal parts", "o0", aten.slice.Tensor, lambda t: t.split([3, 5], 1)[1], x(4, 8))


def lookup_cases() -> Iterator[Any]:
    index = aten.index.Tensor
    yield case("index_select", "o0 o1", aten.index_select.default, lambda t, j: t.index_select(1, j), x(4, 5), i(5, 8))
    yield case("index by one", "o0 o1 o2", index, lambda t, j: t[j], w(5, 4), i(5, 4, 4))
    yield case("index by one behind", "o0 o1", index, lambda t, j: t[:, j], x(4, 5), i(5, 8))
    yield case("index by two", "o0 o1", index, lambda t, j, k: t[j, k], x(3, 5, 4), i(3, 4), i(5, 4))
    yield case("index by two that broadcast", "o0 o1 o2", index, lambda t, j, k: t[:, j, k], x(4, 3, 5), i(3, 4, 1),
               i(5, 8))
    yield case("index by two apart", "o0 o1 o2", index, lambda t, j, k: t[:, j, :, k], x(4, 3, 8, 5), i(3, 4), i(5, 4))
    yield case("gather", "o0 o1", aten.gather.default, lambda t, j: t.gather(1, j), x(4, 5), i(5, 4, 8))
    yield case("gather of some", "o1", aten.gather.default, lambda t, j: t.gather(1, j), x(4, 5, 4), i(5, 2, 4, 3))
    yield case("take_along_dim", "o0 o1", aten.gather.default, lambda t, j: t.take_along_dim(j, 1), x(4, 5), i(5, 1, 8))
    yield case("scatter", "o0", aten.scatter.src, lambda t, j, s: t.scatter(1, places(j), s), x(4, 8), i(8, 4, 3),
               x(4, 3))
    yield case("scatter of a number", "o0", aten.scatter.value, lambda t, j: t.scatter(1, j, 2.0), x(4, 8), i(8, 4, 3))
    yield case("scatter_add", "o0", aten.scatter_add.default, lambda t, j, s: t.scatter_add(1, j, s), x(4, 8),
               i(8, 4, 3), x(4, 3))
    yield case("scatter_add of some", "", aten.scatter_add.default, lambda t, j, s: t.scatter_add(1, j, s), x(4, 8),
               i(8, 2, 3), x(2, 3))
    yield case("scatter_reduce", "o0", aten.scatter_reduce.two, lambda t, j, s: t.scatter_reduce(1, j, s, "sum"),
               x(4, 8), i(8, 4, 3), x(4, 3))
    yield case("index_add", "o0", aten.index_add.default, lambda t, j, s: t.index_add(1, j, s), x(4, 8), i(8, 3),
               x(4, 3))
    yield case("index_copy", "o1", aten.index_copy.default,
               lambda t, j, s: t.index_copy(0, places(j), s), x(8, 4), i(8, 3), x(3, 4))
    yield case("bucketize", "o0 o1", aten.bucketize.Tensor,
               lambda t, e: t * torch.bucketize(t, e.sort()[0]).to(t.dtype), x(4, 4), x(8))
    yield case("one_hot", "o0 o1", aten.one_hot.default, lambda j, t: F.one_hot(j, 5) * t, i(5, 4, 4), x(4, 4, 5))
    yield case("masked_fill by a value", "o0 o1", aten.masked_fill.Tensor, lambda t, m, v: t.masked_fill(m, v.sum()),
               x(4, 4), mask(4, 1), x(4))
    yield case("log_sigmoid", "o0 o1", aten.log_sigmoid.default, F.logsigmoid, x(4, 4))


def places(j: Tensor) -> Tensor:
    """Places that differ along the last dim, so that what is written does not depend on the order."""
    return (j[..., :1] + torch.arange(j.shape[-1], device=j.device)) % 8


def reduced_cases() -> Iterator[Any]:
    calls: dict[str, tuple[Any, Callable[..., Any]]] = {
        "amin": (aten.amin.default, torch.amin), "logsumexp": (aten.logsumexp.default, torch.logsumexp),
        "var": (aten.var.dim, torch.var), "std": (aten.std.dim, torch.std),
        "vector_norm": (aten.linalg_vector_norm.default, lambda t, d: torch.linalg.vector_norm(t, 3, d)),
        "norm": (aten.norm.ScalarOpt_dim, lambda t, d: aten.norm.ScalarOpt_dim(t, 2, [d])),
        "prod": (aten.prod.dim_int, torch.prod), "max": (aten.max.dim, lambda t, d: t.max(d)[0]),
        "min": (aten.min.dim, lambda t, d: t.min(d)[0]), "median": (aten.median.dim, lambda t, d: t.median(d)[0]),
        "kthvalue": (aten.kthvalue.default, lambda t, d: t.kthvalue(2, d)[0]),
        "max with its place": (aten.max.dim, lambda t, d: t.max(d)),
        "var_mean": (aten.var_mean.dim, lambda t, d: torch.var_mean(t, d, False)),
        "std_mean": (aten.std_mean.dim, lambda t, d: torch.std_mean(t, d, False)),
        "var corrected": (aten.var.correction, lambda t, d: torch.var(t, d, correction=2)),
        "std corrected": (aten.std.correction, lambda t, d: torch.std(t, d, correction=0)),
        "var_mean corrected": (aten.var_mean.correction, lambda t, d: torch.var_mean(t, d, correction=0)),
        "std_mean corrected": (aten.std_mean.correction, lambda t, d: torch.std_mean(t, d, correction=0)),
    }
    for name, (op, call) in calls.items():
        yield case(name, "o0 o2", op, lambda t, call=call: call(t, 1), x(4, 3, 4))
    kept: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
        "any": (aten.any.dim, lambda t: (t > 1).any(1, True)), "all": (aten.all.dim, lambda t: (t > -1).all(1, True)),
        "argmax": (aten.argmax.default, lambda t: t.argmax(1, True)),
        "argmin": (aten.argmin.default, lambda t: t.argmin(1, True)),
    }
    for name, (op, find) in kept.items():
        yield case(name, "o0 o2", op, lambda t, find=find: t * find(t), x(4, 3, 4))
    yield case("var of all", "", aten.var.correction, lambda t: torch.var(t, None, correction=1), x(4, 4))
    similar: tuple[Operand, Operand] = (x(4, 3, 4), w(4, 3, 4))
    yield case("cosine_similarity", "o0 o2", aten.cosine_similarity.default, F.cosine_similarity, *similar)


CASES = [*along_cases(), *lookup_cases(), *reduced_cases()]
