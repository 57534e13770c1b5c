"""Where the weights of a model stand: every module and attribute that holds one, and what it holds now."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import nn

from lamina.tensors.disk import DiskTensor, WeightHome
from lamina.tensors.row_blocks import Blocks

Site = tuple[nn.Module, str, bool]
"""module, attribute, whether it is a buffer"""
Sites = dict[str, list[Site]]


class WeightSites:
    """The places of one model's weights: a placeholder stands there, or what a pass has bound, or what stays.

    Args:
        model: built on DiskTensors.
        device: where it computes; the placeholders are on it.
        home: gives, by the name of a weight, what its placeholder reads its data from.
    """

    def __init__(self, model: nn.Module, device: torch.device, home: Callable[[str], WeightHome]) -> None:
        self._sites = _sites(model)
        self._disk = {name: self._placed(name, device) for name in self._sites}
        for name, tensor in self._disk.items():
            tensor.home = home(name)
        self._stand_ins: dict[str, Blocks] = {}
        self._given: dict[str, torch.Tensor | None] = {}  # bound last: an interrupt may have left it there

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def of(self, name: str) -> tuple[Site, ...]:
        """The places of a weight; those that the user has put another tensor in are left out."""
        return tuple(self._sites[name])

    def placeholder(self, name: str) -> DiskTensor:
        """What stands in the modules of a weight that is not there."""
        return self._disk[name]

    def asked(self, name: str) -> bool:
        """Whether a weight takes gradients: torch picks kernels by that even where there are none."""
        return self._disk[name].requires_grad

    def bound(self, name: str) -> torch.Tensor:
        """What the modules of a weight hold now."""
        tensor = standing(self._sites[name][0])
        assert tensor is not None
        return tensor

    def bind(self, name: str, tensor: torch.Tensor | None) -> None:
        """Give the modules of a weight this tensor."""
        if tensor is not self._disk[name]:
            self._given[name] = tensor
        for module, attribute, _ in self._sites[name]:
            module._parameters[attribute] = tensor  # type: ignore[assignment]

    def unbind(self, name: str) -> bool:
        """Put the placeholder back; False where what was bound has been written to."""
        bound = self.bound(name)
        unwritten = bound.is_inference() or bound._version == 0
        self.bind(name, self._disk[name])
        return unwritten

    def settle(self, name: str, parameter: torch.Tensor, buffer: torch.Tensor) -> None:
        """Let a resident weight stand there for good: as a parameter, or as a buffer where it is one."""
        for site in self._sites[name]:
            _put(site, buffer if site[2] else parameter)

    def stand_in(self, name: str, stand_in: Blocks) -> None:
        """Put what gives a weight part by part in the place of its placeholder; not where rows are looked up."""
        self._stand_ins[name] = stand_in.requires_grad_(self.asked(name))  # type: ignore[assignment]
        for owner, attribute, _ in self._sites[name]:
            held: object = owner._parameters[attribute]
            if held is self._disk[name] and not isinstance(owner, nn.Embedding):
                owner._parameters[attribute] = stand_in  # type: ignore[assignment]

    def clear(self, names: Iterable[str]) -> None:
        """Put the placeholders of these weights back, and keep hold of nothing that was bound."""
        self._stand_ins.clear()
        for name in names:
            self.bind(name, self._disk[name])
        self._given.clear()

    def foreign(
        self, resident: Collection[str], held: Collection[str]
    ) -> Iterator[tuple[str, Site, torch.Tensor | None]]:
        """Places of streamed weights where the user put another tensor, or took the parameter away.

        What was left there by an interrupt, or put back by a caller, is made good on the way.

        Args:
            resident: names of the weights that stay; buffers are always among them.
            held: names of those that are held in place of what is on disk.
        """
        for name, sites in self._sites.items():
            if name in resident or name in held:
                continue
            disk, stand_in = self._disk[name], self._stand_ins.get(name)
            for site in tuple(sites):
                found = standing(site)
                if found is disk or (found is not None and found is stand_in):
                    continue
                ours = getattr(found, "home", None) is disk.home
                if found is not None and (ours or found is self._given.get(name)):
                    site[0]._parameters[site[1]] = disk if stand_in is None else stand_in  # type: ignore[assignment]
                    continue
                yield name, site, found

    def leave(self, name: str, site: Site) -> None:
        """Bind a weight there no more."""
        self._sites[name].remove(site)

    def occupy(self, name: str, site: Site) -> None:
        """Bind a weight there again."""
        self._sites[name].append(site)

    def is_back(self, name: str, site: Site) -> bool:
        """Whether a weight's placeholder stands there again."""
        return getattr(standing(site), "home", None) is self._disk[name].home

    def stands(self, name: str) -> bool:
        """Whether a weight has a place in the model."""
        return bool(self._sites[name])

    def _placed(self, name: str, device: torch.device) -> DiskTensor:
        """The placeholder of a weight, on the device where the model computes."""
        tensor = standing(self._sites[name][0])
        assert isinstance(tensor, DiskTensor)
        if device.type != "cpu":
            tensor = tensor.on(device)
            for site in self._sites[name]:
                _put(site, tensor)
        return tensor


def standing(site: Site) -> torch.Tensor | None:
    """What a module holds there now; None where it has no such parameter any more."""
    module, attribute, is_buffer = site
    return (module._buffers if is_buffer else module._parameters).get(attribute)


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers that transformers computed (rotary frequencies, masks) go where the model computes."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if isinstance(buffer, torch.Tensor) and not isinstance(buffer, DiskTensor):
                module._buffers[name] = buffer.to(device)


def _put(site: Site, tensor: torch.Tensor) -> None:
    module, attribute, is_buffer = site
    (module._buffers if is_buffer else module._parameters)[attribute] = tensor  # type: ignore[assignment]


def _sites(model: nn.Module) -> Sites:
    """Where each weight sits: every module and attribute that holds it, tied ones included."""
    first: dict[int, str] = {}
    sites: Sites = defaultdict(list)
    for prefix, module in model.named_modules():
        for is_buffer, tensors in ((False, module._parameters), (True, module._buffers)):
            for attribute, tensor in tensors.items():
                if isinstance(tensor, DiskTensor):
                    name = first.setdefault(id(tensor), f"{prefix}.{attribute}".lstrip("."))
                    sites[name].append((module, attribute, is_buffer))
    return dict(sites)
