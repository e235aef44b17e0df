"""A CUDA device without a GPU: tensors that have a device, a shape and a dtype, but no content.

torch's fake tensors say what an operation would return without computing it. So all of the code
runs, Lightning's trainer included, and `Watch` sees what a GPU would be asked to do.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_impls import op_implementations_dict
from torch._subclasses.fake_tensor import FakeTensor, init_gpu_context
from torch.utils._python_dispatch import TorchDispatchMode

from dino_xcit.data import photometric
from dino_xcit.data.loader import Batch
from dino_xcit.data.photometric import PhotometricParam
from dino_xcit.private_names import storage_key
from dino_xcit.runtime import quiet_logger
from dino_xcit.train.checkpoints import DurableIO
from dino_xcit.train.module import DINOModule
from dino_xcit.train.schedules import Schedules
from dino_xcit.train.trainer import make_trainer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import lightning as L

    from dino_xcit.config.pretrain import RunConfig

CUDA = torch.device("cuda", 0)
BEFORE, AFTER = -1, -2  # passes of events before the first one and after the last one
NO_KERNELS = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"),
    *("alias", "as_strided", "detach", "diagonal", "expand", "permute", "select", "slice", "split"),
    *("split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view"),
    *("_reshape_alias", "_unsafe_view", "lift_fresh", "_local_scalar_dense", "device"),
}
"""operations that launch nothing: views, allocations, and the copy of one number to the host"""
DEPENDS_ON_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave"}
"""operations whose result has a size that only the device knows"""


# -- what is seen ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that a GPU would do differently from what the code wants."""

    kind: str
    """`wait`, `mixed` (tensors on two devices), or `upload` (a copy to the device that waits)"""
    what: str
    at: str
    """file, line and code of the package or of Lightning"""
    step: int
    """forward pass, counted from 0; BEFORE or AFTER"""


class Watch:
    """What the operations between `with` and its end ask of the device.

    Attributes:
        events: waits, uploads that wait, and operations on several devices.
        names: operations that launch work on the device, of each pass by name.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.names: collections.defaultdict[int, collections.Counter[str]]
        self.names = collections.defaultdict(collections.Counter)
        self.step = BEFORE
        self._pinned: dict[int, torch.Tensor] = {}
        self._modes = contextlib.ExitStack()

    def __enter__(self) -> Watch:
        self._modes.enter_context(_Operations(self))
        # Fake tensors answer these two by themselves, and only with what they know.
        for method in ("tolist", "numpy"):

            def answer(tensor: torch.Tensor, as_list: bool = method == "tolist") -> Any:
                return self.zeros(tensor, as_list)

            self._modes.enter_context(mock.patch.object(FakeTensor, method, answer, create=True))
        return self

    def __exit__(self, *error: object) -> None:
        self._modes.close()

    def launches(self, step: int) -> int:
        """Number of operations that launch work on the device in a pass."""
        return self.names[step].total()

    def during(self, step: int, *kinds: str) -> list[str]:
        """What happened in a pass, of some kinds or of all."""
        return [
            f"{event.kind}: {event.what}, {event.at}"
            for event in self.events
            if event.step == step and (not kinds or event.kind in kinds)
        ]

    def note(self, kind: str, what: str) -> None:
        self.events.append(Event(kind, what, _caller(), self.step))

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Let this count as a tensor in pinned memory."""
        self._pinned[storage_key(tensor)] = tensor
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return storage_key(tensor) in self._pinned

    def zeros(self, tensor: torch.Tensor, as_list: bool) -> Any:
        """Answer `tolist` and `numpy`."""
        if tensor.device.type == "cuda":
            self.note("wait", f"tolist of {tuple(tensor.shape)}")
        values = np.zeros(tuple(tensor.shape), np.float32)
        return values.tolist() if as_list else values

    def launched(self, name: str) -> None:
        self.names[self.step][name] += 1

    def copied(self, source: torch.Tensor, target: torch.Tensor, non_blocking: bool) -> None:
        """Note a copy between devices."""
        devices = source.device.type, target.device.type
        shape = tuple(source.shape)
        if devices == ("cuda", "cpu"):
            self.note("wait", f"copy of {shape} to the host")
        elif devices == ("cpu", "cuda") and not (non_blocking and self.is_pinned(source)):
            missing = "non_blocking" if self.is_pinned(source) else "pinned"
            self.note("upload", f"copy of {shape} to the device, not {missing}")


def _caller() -> str:
    """Where the package is, or else Lightning or torch."""
    frames = traceback.extract_stack()
    ours = [f for f in frames if "/dino_xcit/" in f.filename]
    lightning = [f for f in frames if "/lightning/" in f.filename]
    frame = (ours or lightning or frames[:1])[-1]
    return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} {frame.line}"


def _tensors(*nested: object) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(nested) if isinstance(leaf, torch.Tensor)]


class _Operations(TorchDispatchMode):
    """Sees every operation below autograd."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(
        self, operation: Any, kinds: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        options = options or {}
        watch, name = self.watch, getattr(operation, "overloadpacket", operation).__name__
        given = _tensors(arguments, options)
        on_device = any(tensor.device.type == "cuda" for tensor in given)
        if name == "_local_scalar_dense":
            return self._number(given[0])
        if name in ("_pin_memory", "pin_memory"):
            return watch.pin(given[0].clone())
        if name == "is_pinned":
            return watch.is_pinned(given[0])
        if on_device and (name in DEPENDS_ON_VALUES or _has_mask(name, arguments)):
            watch.note("wait", f"{name}, whose size the device knows")
        result = operation(*arguments, **options)
        made = _tensors(result)
        if name in ("_to_copy", "copy_"):
            source = given[-1]
            non_blocking = options.get("non_blocking") or (
                name == "copy_" and True in arguments[2:]
            )
            watch.copied(source, made[0], bool(non_blocking))
        elif on_device and any(t.device.type == "cpu" and t.ndim for t in given):
            watch.note("mixed", name)
        if name not in NO_KERNELS and any(t.device.type == "cuda" for t in (*given, *made)):
            watch.launched(name)
        return result

    def _number(self, tensor: torch.Tensor) -> float | int | bool:
        """0 of the device; 1 of the CPU, whose numbers are counts of steps."""
        if tensor.device.type == "cuda":
            self.watch.note("wait", "one number to the host")
        number = int(tensor.device.type == "cpu")
        return float(number) if tensor.is_floating_point() else number


def _has_mask(name: str, arguments: Any) -> bool:
    if name not in ("index", "index_put", "index_put_", "_unsafe_index"):
        return False
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in arguments[1])


# -- the device --------------------------------------------------------------------------------


def imagines_cuda() -> bool:
    """Whether this torch has fake CUDA tensors here: not every older one without a driver."""
    try:
        with FakeTensorMode():
            torch.empty(1, device=CUDA).uniform_()
    except RuntimeError:
        return False
    return True


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Let torch and Lightning believe in a GPU; every tensor made inside is without content."""
    for name in ("cuda", "cuda:0"):
        init_gpu_context(torch.device(name))  # cached; it would ask the GPU for memory later
    answers: dict[str, Any] = {
        "torch.cuda.is_available": True,
        "torch.cuda.device_count": 1,
        "torch.cuda.current_device": 0,
        "torch.cuda.get_device_capability": (9, 0),
        "torch.cuda.get_device_name": "a fake GPU",
        "torch.cuda.is_bf16_supported": True,
        "torch.cuda.set_device": None,
        "torch.cuda.empty_cache": None,
        "torch.cuda.synchronize": None,
        "torch.cuda.memory_stats": {},
        "lightning.fabric.accelerators.cuda.num_cuda_devices": 1,
        "lightning.fabric.accelerators.cuda.is_cuda_available": True,
    }
    graph_tasks = itertools.count(1)

    def backward(
        outputs: Sequence[torch.Tensor], gradients: Sequence[Any], *_: Any, **__: Any
    ) -> None:
        task = next(graph_tasks)
        with mock.patch("torch._C._current_graph_task_id", return_value=task):
            _Backward(outputs).run(gradients)

    with contextlib.ExitStack() as stack:
        # It would look for the GPU that the answers below promise.
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, lambda *_, answer=answer, **__: answer))
        # So that what comes after a mask is seen too, let it choose everything.
        chosen = {torch.ops.aten.nonzero.default: _every_index}
        stack.enter_context(mock.patch.dict(op_implementations_dict, chosen))
        stack.enter_context(mock.patch("torch.autograd._engine_run_backward", backward))
        # else foreach optimizers take fake tensors for a subclass and do one after another
        for module in map(sys.modules.get, ("torch.utils._foreach_utils", "torch.optim.optimizer")):
            types = getattr(module, "_foreach_supported_types", None)
            if types is not None:
                more = [*types, FakeTensor]
                stack.enter_context(mock.patch.object(module, "_foreach_supported_types", more))
        yield


def _every_index(mode: Any, operation: Any, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty((tensor.numel(), tensor.ndim), dtype=torch.int64)


class _Backward:
    """Calls the formulas of autograd in order.

    Its engine looks for the streams of the GPU; the formulas are the same.
    """

    def __init__(self, outputs: Sequence[torch.Tensor]) -> None:
        self.outputs = outputs
        self.gradients: dict[Any, list[Any]] = {}  # of the outputs of each node, so far
        self.awaited: collections.Counter[Any] = collections.Counter()  # gradients of each node
        stack = list({output.grad_fn for output in outputs})
        nodes = set(stack)
        while stack:
            for node, _ in stack.pop().next_functions:
                self.awaited[node] += 1
                if node is not None and node not in nodes:
                    nodes.add(node)
                    stack.append(node)

    def run(self, gradients: Sequence[torch.Tensor]) -> None:
        for output, gradient in zip(self.outputs, gradients, strict=True):
            self._add(output.grad_fn, output.output_nr, gradient)
        ready = [node for node in self.gradients if not self.awaited[node]]
        with torch.no_grad():
            while ready:
                node = ready.pop()
                results = _formula(node, self.gradients.pop(node))
                for (after, position), gradient in zip(node.next_functions, results, strict=False):
                    self._add(after, position, gradient)
                    self.awaited[after] -= 1
                    if after is not None and not self.awaited[after]:
                        ready.append(after)

    def _add(self, node: Any, position: int, gradient: torch.Tensor | None) -> None:
        """Add to the gradient of an output of a node, in the output's dtype and shape."""
        if node is None:
            return
        slots = self.gradients.setdefault(node, [None] * len(node._input_metadata))
        if gradient is None:
            return
        expected, before = node._input_metadata[position], slots[position]
        if gradient.dtype != expected.dtype:
            gradient = gradient.to(expected.dtype)
        if gradient.shape != torch.Size(expected.shape):
            gradient = gradient.sum_to_size(*expected.shape)
        slots[position] = gradient if before is None else before + gradient


def _formula(node: Any, gradients: list[Any]) -> tuple[Any, ...]:
    """The gradients of a node's inputs."""
    if all(gradient is None for gradient in gradients):
        return (None,) * len(node.next_functions)
    if hasattr(node, "variable"):  # of a leaf
        variable = node.variable
        variable.grad = gradients[0] if variable.grad is None else variable.grad + gradients[0]
        return ()
    if hasattr(node, "_forward_cls"):  # a Function of ours
        gradients = [
            torch.zeros(m.shape, dtype=m.dtype, device=m.device) if g is None else g
            for g, m in zip(gradients, node._input_metadata, strict=True)
        ]
        results = node.apply(*gradients)
    else:
        results = node(*gradients)
    return results if isinstance(results, tuple) else (results,)


# -- a run -------------------------------------------------------------------------------------


class _Loader:
    """Batches without content, in pinned memory as `CropLoader` delivers them."""

    def __init__(self, module: DINOModule, passes: int, watch: Watch) -> None:
        self.module, self.passes, self.watch = module, passes, watch

    def __len__(self) -> int:  # more than are taken: the last batch of an epoch is special
        return 1000

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.passes):
            self.watch.step = step
            yield fake_batch(self.module, self.watch)
        self.watch.step = AFTER


def fake_batch(module: DINOModule, watch: Watch) -> Batch:
    """A batch for this module's options."""
    config, views = module.config, {}
    sides = {
        "global": (2, config.global_crops_size),
        "local": (config.local_crops_number, config.local_crops_size),
    }
    for group, (count, side) in sides.items():
        shape = config.batch_size_per_gpu, count
        views |= {
            f"{group}_crops": torch.empty(*shape, config.in_chans, side, side, dtype=torch.uint8),
            f"{group}_params": torch.empty(*shape, len(PhotometricParam)),
            f"{group}_paths": torch.empty(*shape, *module.student.backbone.path_shape),
        }
    return Batch({name: watch.pin(tensor) for name, tensor in views.items()}, bad_images=[])


def _let_move(module: DINOModule) -> None:
    """Move parameters and buffers as `to` does, which cannot swap fake ones."""

    def to_device(*_: Any, **__: Any) -> DINOModule:
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                moved = torch.nn.Parameter(parameter.detach().to(CUDA), parameter.requires_grad)
                setattr(part, name, moved)
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, buffer.to(CUDA))
        module._device = CUDA
        return module

    module.to, module.cpu = to_device, lambda: module  # type: ignore[method-assign,assignment]


def fake_run(config: RunConfig, passes: int, callbacks: Sequence[L.Callback] = ()) -> Watch:
    """Train for some forward passes with Lightning's trainer; what they ask of the device."""
    config = dataclasses.replace(
        config, accelerator="gpu", devices="1", trainer={"enable_progress_bar": False}
    )
    schedules = Schedules(
        config=config, steps_per_epoch=1000, total_batch=config.batch_size_per_gpu
    )
    watch = Watch()
    photometric._constant.cache_clear()
    with fake_cuda(), quiet_logger("lightning.pytorch"):
        trainer = make_trainer(config, DurableIO(), callbacks)
        module = DINOModule(config, schedules)
        _let_move(module)
        with watch:
            trainer.fit(module, _Loader(module, passes, watch))
    photometric._constant.cache_clear()  # it holds tensors without content
    return watch
