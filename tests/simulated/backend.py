"""Builds and loads the simulated accelerator, `accelerator.cpp`: torch's device "simulated".

A process that has loaded it has an accelerator for good: what asks torch for one, as `device="auto"` does, finds
it. So the tests beside this file run in processes of their own, which `conftest.py` sees to.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

NAME = "simulated"
SOURCE = Path(__file__).parent / "accelerator.cpp"
CAPACITY = 4 << 30  # bytes of device memory
FLAGS = ("-O1", "-w")


def why_not() -> str | None:
    """Why it cannot be built here; None where it can."""
    beside = str(Path(sys.executable).parent)  # where ninja is if it came as a package
    if beside not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] += os.pathsep + beside
    if shutil.which(cpp_extension.get_cxx_compiler()) is None:
        return f"no C++ compiler ({cpp_extension.get_cxx_compiler()}) to build the simulated accelerator with"
    if not cpp_extension.is_ninja_available():
        return "no ninja to build the simulated accelerator with"
    return None


def _built() -> Any:
    """The extension, built the first time; torch's lock file lets one process build while the others wait."""
    made_of = SOURCE.read_bytes() + " ".join(FLAGS).encode() + torch.__version__.encode()
    name = f"lamina_simulated_{hashlib.sha256(made_of).hexdigest()[:12]}"
    return cpp_extension.load(name, [str(SOURCE)], extra_cflags=list(FLAGS))


class Accelerator:
    """The device, seen from outside of torch.

    Attributes:
        device: for torch.
        driver: the extension.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.device = torch.device(NAME, 0)

    def schedule(self, copies: float = 0.0, computes: float = 0.0, seed: int = 0) -> None:
        """How late work is done that may be done: 0 when somebody must know, 1 at once, between them by chance."""
        self.driver.set_schedule(copies, computes, seed)

    def finish(self) -> None:
        """Do all that is queued."""
        self.driver.finish()

    @property
    def pending(self) -> int:
        """Pieces of work that are queued: computations, copies, events and waits."""
        return int(self.driver.pending())

    @property
    def pending_copies(self) -> int:
        """Copies, and whatever else has work to do, that are queued on streams other than the default one."""
        return int(self.driver.pending_copies())

    @property
    def bytes_in_use(self) -> int:
        """Of all tensors on the device."""
        return int(self.driver.memory()["in_use"])

    @property
    def most_bytes_in_use(self) -> int:
        """The same at its highest, since the counts were reset."""
        return int(self.driver.memory()["most_in_use"])

    @property
    def pins(self) -> dict[int, int]:
        """Bytes of what is registered, by address."""
        return dict(self.driver.pins())

    @property
    def counts(self) -> dict[str, int]:
        """Since they were reset.

        `strays`: copies that were done into memory which had been given back. `torn`: ranges that were unregistered
        while a copy from them was queued. `pinned_copies`, `pageable_copies` and bytes: to the device, without
        waiting. `late_kernels`, and `early_kernels`, whose results torch knows only by computing them.
        """
        return dict(self.driver.counts())

    def reset(self) -> None:
        """As after a start, but for tensors that somebody holds."""
        self.schedule()
        self.finish()
        self.driver.drop_pins()
        self.driver.empty_cache()
        self.driver.reset_counts()


class Register:
    """The register of pinned memory, as `lamina.stream.device.Registrar` has it.

    Attributes:
        codes: what each call to `register` gave.
        refuse: every call gives this code, unless it is 0.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._driver = accelerator.driver
        self.codes: list[int] = []
        self.refuse = 0

    def register(self, address: int, nbytes: int) -> int:
        self.codes.append(self.refuse or int(self._driver.register_host(address, nbytes)))
        return self.codes[-1]

    def unregister(self, address: int) -> int:
        return int(self._driver.unregister_host(address))


@functools.cache
def accelerator() -> Accelerator:
    """The device, known to torch from the first call on."""
    driver = _built()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _device_module(driver))
    torch.utils.generate_methods_for_privateuse1_backend()
    return Accelerator(driver)


def _device_module(driver: Any) -> types.ModuleType:
    """What torch asks of the Python module of a device, `torch.simulated`."""

    def mem_get_info(device: object = None) -> tuple[int, int]:
        memory = driver.memory()
        return memory["capacity"] - memory["reserved"], memory["capacity"]

    module: Any = types.ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    module.synchronize = lambda device=None: driver.finish()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.mem_get_info = mem_get_info
    module.memory_reserved = lambda device=None: driver.memory()["reserved"]
    return module  # type: ignore[no-any-return]
