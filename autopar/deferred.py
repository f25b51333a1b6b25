"""A model that is compiled when it is first called."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DistributedSampler

from autopar import launch
from autopar.codegen.batches import check_device
from autopar.codegen.control import all_there
from autopar.codegen.offers import Offer, digest, gathered, grown_to
from autopar.codegen.parameters import whole_everywhere
from autopar.codegen.ranks import by_rank
from autopar.codegen.runtime import ParallelModule, not_pickled
from autopar.codegen.surroundings import Compiled, apart
from autopar.core.errors import AutoparError
from autopar.passes.containers import make_known
from autopar.programs import Order, compiled
from autopar.stepping import follow


class DeferredModule(Compiled):
    """A model compiled at its first call.

    Its parameters are DTensors from the start and the same objects afterwards, so that an optimizer may be made before.
    """

    def __init__(self, plain: nn.Module, order: Order) -> None:
        super().__init__()
        self._plain: list[nn.Module] = [plain]
        self._order = order
        self._made: list[ParallelModule] = []
        self._kin = [self]
        kind = launch.device().type
        self._waiting = {name: whole_everywhere(p, kind) for name, p in plain.named_parameters()}
        self.training = plain.training
        follow(self, plain)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compile for these arguments if none have come before, then run."""
        if not self._made:
            with apart(launch.device(), self._order.precision), all_there():
                self._compile(args, kwargs)
        return self._made[0](*args, **kwargs)

    def _compile(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors: list[Tensor] = []

        def offer() -> Offer:
            make_known((args, kwargs))
            leaves = pytree.tree_leaves((args, kwargs))
            for place, leaf in enumerate(leaves):
                check_device(str(place), leaf, launch.device())
            tensors[:] = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
            rest = [(x.shape[0] == rows_of(tensors), *x.shape[1:]) for x in tensors]
            return Offer(1, int(self.training), rows_of(tensors), digest([rest, len(leaves)]), digest(leaves))

        offers, rows = gathered(offer), rows_of(tensors)
        if len({offer.rest for offer in offers}) > 1:
            shapes = by_rank(str([tuple(x.shape) for x in tensors]))
            raise AutoparError(f"the ranks' inputs have different shapes: {shapes}; pass batches of one shape")
        whole = self._order.batch == "global" or (self._order.batch is None and len(set(offers)) == 1)
        grown = rows if whole else max(offer.rows for offer in offers) * len(offers)
        call = pytree.tree_map_only(Tensor, lambda x: grown_to(x, rows, grown), (args, kwargs))
        made = compiled(self.plain.train(self.training), call, self._order)
        for each in self._kin:
            each.take(made if each is self else made.beside(each.plain, self._order.material.values(
                each.plain, launch.device())))
        self._kin.clear()

    def take(self, made: ParallelModule) -> None:
        """Be `made` from now on."""
        made.adopt(self._waiting)
        made.train(self.training)
        follow(made, self.plain)
        self._made.append(made)
        self._plain.clear()  # its memory is that of a whole model

    @property
    def plain(self) -> nn.Module:
        """The model as it was given; none once it is compiled."""
        return self._plain[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Another model, compiled together with this one where it is not yet."""
        if self._made:
            return copy.deepcopy(self._made[0], memo)
        made = memo[id(self)] = DeferredModule(copy.deepcopy(self.plain), self._order)
        made._kin = self._kin
        self._kin.append(made)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise not_pickled(self)

    def sampler(self, dataset: Any, shuffle: bool = True, seed: int = 0,
                drop_last: bool = False) -> DistributedSampler[Any]:
        """torch's distributed sampler: as the plan wants once there is one, until then different samples on each rank.

        A loader's batch size is the global one over the sampler's `num_replicas`.
        """
        if self._made:
            return self._made[0].sampler(dataset, shuffle, seed, drop_last)
        return DistributedSampler(dataset, shuffle=shuffle, seed=seed, drop_last=drop_last)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            made = self.__dict__.get("_made")
            if made:
                return getattr(made[0], name)
            raise AttributeError(f"{name} is there after the first call, which compiles the model; give inputs= to "
                                 "compile ahead") from None

    def _current(self) -> nn.Module:
        return self._made[0] if self._made else self._plain[0]

    def train(self, mode: bool = True) -> DeferredModule:
        """As nn.Module's."""
        self.training = mode
        self._current().train(mode)
        return self

    def named_parameters(self, prefix: str = "", recurse: bool = True,
                         remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """As nn.Module's, under the plain model's names."""
        for name, parameter in self._waiting.items():
            yield f"{prefix}.{name}" if prefix else name, parameter

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's."""
        return self._current().named_buffers(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's."""
        return self._current().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's."""
        return self._current().load_state_dict(*args, **kwargs)


def rows_of(tensors: list[Tensor]) -> int:
    """The number of samples, 0 where there is no tensor: the first dim of the first."""
    return tensors[0].shape[0] if tensors else 0
