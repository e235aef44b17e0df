"""Time and memory of one training step, compared with the alternatives and the arithmetic floor.

    python eval/speed/step.py --official_dino CLONE --official_xcit CLONE [--arch ... --output FILE]

Every contender is a process of its own that holds the same views (crops already cut and
normalised). The contenders take turns, one step at a time.

- `ours` uses the trainer of `dino-xcit pretrain`; `compiled` adds `--compile`.
- `official` uses the head, loss, gradient clipping and teacher update of facebookresearch/dino on
  the network of facebookresearch/xcit, in the order of main_dino.py. Where torch refuses that
  network, timm's is used.
- `lightly` uses lightly's DINO modules on timm's XCiT, one view at a time, as its example does.
- `stable-pretraining` uses its DINO on timm's XCiT. Neither of the last two clips gradients.

A contender whose package is missing is left out.

Memory is the largest resident size (on a GPU: the peak that torch allocated) minus that before
the networks were built. The floor is the number of operations in the step's matrix products and
convolutions, divided by the rate of a large matrix product on this machine. Other products may
be some percent faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from common import circumstances, peak
from flops import flops_of
from torch import Tensor
from torch.profiler import profile

from dino_xcit.config.pretrain import RunConfig
from dino_xcit.data.loader import Batch
from dino_xcit.model.architectures import BRANCHES, resolve_architecture, timm_name
from dino_xcit.model.dino import DINOLoss
from dino_xcit.runtime import keep_freed_memory
from dino_xcit.train.checkpoints import DurableIO
from dino_xcit.train.module import DINOModule
from dino_xcit.train.network import Network
from dino_xcit.train.schedules import Schedules
from dino_xcit.train.trainer import make_trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DROP_PATH = 0.1
STEPS_PER_EPOCH, EPOCHS = 1000, 100
ANSWER = "answer: "  # prefix of a contender's answers; packages print other lines
GO, END = "go", "end"  # requests to a contender; any other word is the file to write a profile to
PROFILED = 30  # operations listed in a profile


@dataclasses.dataclass(frozen=True)
class StepTask:
    """The training step that every contender runs."""

    arch: str
    precision: str
    batch: int
    global_size: int
    local_size: int
    local_crops: int
    out_dim: int
    official_dino: str
    """a clone of facebookresearch/dino, or empty"""
    official_xcit: str
    """a clone of facebookresearch/xcit, or empty"""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def config(self) -> RunConfig:
        return RunConfig(
            arch=self.arch,
            drop_path_rate=DROP_PATH,
            global_crops_size=self.global_size,
            local_crops_size=self.local_size,
            local_crops_number=self.local_crops,
            out_dim=self.out_dim,
            batch_size_per_gpu=self.batch,
            devices="1",
            precision=self.precision,
            trainer={"enable_progress_bar": False},
            output_dir=tempfile.gettempdir(),  # nothing is written
        )

    @property
    def schedules(self) -> Schedules:
        return Schedules(
            config=self.config, steps_per_epoch=STEPS_PER_EPOCH, total_batch=self.batch
        )

    def views(self) -> list[Tensor]:
        """(B, 2, 3, S, S) and (B, L, 3, s, s)."""
        generator = torch.Generator().manual_seed(0)
        shapes = [
            (self.batch, 2, 3, *[self.global_size] * 2),
            (self.batch, self.local_crops, 3, *[self.local_size] * 2),
        ]
        return [torch.randn(shape, generator=generator).to(self.device) for shape in shapes]

    def autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.precision == "16-mixed" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "32-true")


# -- contenders ---


def ours(task: StepTask, turns: Iterator[None], compiled: bool = False) -> None:
    config = dataclasses.replace(task.config, compile=compiled)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = make_trainer(config, DurableIO())
    if task.device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    module = DINOModule(config, task.schedules)
    if compiled:
        module.compile_regions(task.device)
    groups = task.views()
    module.views = lambda _: groups  # type: ignore[method-assign]
    layers = resolve_architecture(task.arch)[1].depth
    paths = [
        torch.rand(*views.shape[:2], layers, BRANCHES).ge(DROP_PATH).float() / (1 - DROP_PATH)
        for views in groups
    ]
    batch = Batch(views={"global_paths": paths[0], "local_paths": paths[1]}, bad_images=[])
    trainer.fit(module, TakingTurns(batch, turns))


def compiled(task: StepTask, turns: Iterator[None]) -> None:
    ours(task, turns, compiled=True)


class TakingTurns:
    """A loader that yields the same batch at each of our turns."""

    def __init__(self, batch: Batch, turns: Iterator[None]) -> None:
        self.batch, self.turns = batch, turns

    def __len__(self) -> int:  # without a length Lightning would prefetch
        return STEPS_PER_EPOCH * EPOCHS

    def __iter__(self) -> Iterator[Batch]:
        for _ in self.turns:
            yield self.batch


def official(task: StepTask, turns: Iterator[None]) -> None:
    """The loop of main_dino.py's train_one_epoch, without its printing."""
    if task.device.type == "cpu":  # SyncBatchNorm refuses CPU tensors once a process group exists
        torch.nn.SyncBatchNorm = torch.nn.BatchNorm2d  # type: ignore[misc,assignment]
    build = _official_backbone(task)
    sys.path[0] = task.official_dino
    import main_dino  # type: ignore[import-not-found]
    import utils  # type: ignore[import-not-found]
    import vision_transformer  # type: ignore[import-not-found]

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )

    def network(**options: Any) -> Any:
        backbone = build(**options)
        return utils.MultiCropWrapper(
            backbone, vision_transformer.DINOHead(backbone.embed_dim, task.out_dim)
        )

    student = network(drop_path_rate=DROP_PATH).to(task.device)
    teacher = network().to(task.device).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    loss_of = main_dino.DINOLoss(task.out_dim, 2 + task.local_crops, 0.04, 0.04, 0, EPOCHS).to(
        task.device
    )
    optimizer = torch.optim.AdamW(utils.get_params_groups(student))
    scaler = torch.amp.GradScaler(enabled=task.precision == "16-mixed")
    crops = [crop.contiguous() for views in task.views() for crop in views.unbind(1)]
    schedules = task.schedules
    for step, _ in enumerate(turns):
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = schedules.lr(step)
            if i == 0:
                group["weight_decay"] = schedules.weight_decay(step)
        with task.autocast():
            loss = loss_of(student(crops), teacher(crops[:2]), 0)
        assert torch.isfinite(loss).item()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        utils.clip_gradients(student, 3.0)
        utils.cancel_gradients_last_layer(0, student, 1)
        scaler.step(optimizer)
        scaler.update()
        momentum = schedules.momentum(step)
        with torch.no_grad():
            for learned, averaged in zip(student.parameters(), teacher.parameters(), strict=True):
                averaged.data.mul_(momentum).add_((1 - momentum) * learned.detach().data)


def _official_backbone(task: StepTask) -> Callable[..., Any]:
    sys.path.insert(0, task.official_xcit)
    if not resolve_architecture(task.arch)[1].tokens_norm:
        # The class attention of these networks overwrites tensors that the backward pass needs;
        # torch now refuses that.
        import timm

        return functools.partial(timm.create_model, timm_name(task.arch), num_classes=0)
    import xcit  # type: ignore[import-not-found]

    del sys.modules["xcit"]
    name = f"{resolve_architecture(task.arch)[1].official}_p{task.arch.split('_p')[1]}"
    return functools.partial(getattr(xcit, name), pretrained=False)


def lightly(task: StepTask, turns: Iterator[None]) -> None:
    """The loop of lightly's DINO example, with AdamW, on timm's XCiT."""
    import timm
    from lightly.loss import DINOLoss  # type: ignore[import-not-found]
    from lightly.models.modules import DINOProjectionHead  # type: ignore[import-not-found]
    from lightly.models.utils import deactivate_requires_grad, update_momentum  # type: ignore[import-not-found]

    def network(**options: Any) -> Any:
        backbone = timm.create_model(timm_name(task.arch), num_classes=0, **options)
        head = DINOProjectionHead(
            backbone.num_features, 2048, 256, task.out_dim, freeze_last_layer=1
        )
        return torch.nn.Sequential(backbone, head)

    student = network(drop_path_rate=DROP_PATH).to(task.device)
    teacher = network().to(task.device)
    deactivate_requires_grad(teacher)
    loss_of = DINOLoss(task.out_dim).to(task.device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    scaler = torch.amp.GradScaler(enabled=task.precision == "16-mixed")
    crops = [crop.contiguous() for views in task.views() for crop in views.unbind(1)]
    schedules = task.schedules
    for step, _ in enumerate(turns):
        update_momentum(student, teacher, schedules.momentum(step))
        with task.autocast():
            loss = loss_of(
                [teacher(crop) for crop in crops[:2]], [student(crop) for crop in crops], epoch=0
            )
        scaler.scale(loss).backward()
        student[1].cancel_last_layer_gradients(0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def stable_pretraining(task: StepTask, turns: Iterator[None]) -> None:
    """stable-pretraining's DINO module, with AdamW, on timm's XCiT; updates as in its callback."""
    import timm
    from stable_pretraining.methods.dino import DINO  # type: ignore[import-not-found]

    backbone = timm.create_model(timm_name(task.arch), num_classes=0, drop_path_rate=DROP_PATH)
    module = DINO(backbone, n_prototypes=task.out_dim).to(task.device).train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-5)
    scaler = torch.amp.GradScaler(enabled=task.precision == "16-mixed")
    global_views, local_views = (list(views.contiguous().unbind(1)) for views in task.views())
    for _ in turns:
        with task.autocast():
            loss = module(global_views, local_views).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        for pair in (module.backbone, module.projector):
            pair.update_teacher()


CONTENDERS = {
    "official": official,
    "lightly": lightly,
    "stable-pretraining": stable_pretraining,
    "ours": ours,
    "compiled": compiled,
}


# -- a contender's process ---


def turns_of(task: StepTask) -> Iterator[None]:
    """Yield once for each request of the parent; answer with the seconds of the step."""
    answer("ready")
    while (word := sys.stdin.readline().strip()) not in (END, ""):
        start = time.perf_counter()
        if word == GO:
            yield
        else:
            with profile(acc_events=True) as trace:
                yield
            write_profile(trace, task, Path(word))
        if task.device.type == "cuda":
            torch.cuda.synchronize()
        answer(time.perf_counter() - start)


def write_profile(trace: profile, task: StepTask, path: Path) -> None:
    """Write the time of one step by operation."""

    def milliseconds(event: Any) -> float:
        return (
            event.self_device_time_total
            if task.device.type == "cuda"
            else event.self_cpu_time_total
        ) / 1000

    events = sorted(trace.key_averages(), key=milliseconds, reverse=True)
    total = sum(map(milliseconds, events))
    lines = [
        f"{task.arch}, {task.precision}, batch {task.batch}",
        f"one step, under the profiler: {total:.0f} ms in operations",
        "",
        "      ms  share  calls",
    ]
    lines += [
        f"{milliseconds(e):8.1f}  {milliseconds(e) / total:5.1%}  {e.count:5}  {e.key}"
        for e in events[:PROFILED]
    ]
    path.write_text("\n".join(lines) + "\n")


def answer(value: object) -> None:
    print(f"{ANSWER}{value}", flush=True)


def contend(name: str, task: StepTask) -> None:
    """Run a contender in this process until the parent ends it."""
    before = peak(task.device)

    def turns() -> Iterator[None]:
        yield from turns_of(task)
        answer(peak(task.device) - before)
        os._exit(0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CONTENDERS[name](task, turns())


class Contender:
    """Handle of the parent on a contender's process."""

    def __init__(self, name: str, task: StepTask) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [
                sys.executable,
                __file__,
                "--contend",
                json.dumps([name, dataclasses.astuple(task)]),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
        )
        self.ready = self._answer() == "ready"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return line[len(ANSWER) :].strip()
        return ""

    def _request(self, word: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self._answer() or sys.exit(f"{self.name}: {self.error()}")

    def step(self) -> None:
        self.seconds.append(float(self._request(GO)))

    def profile(self, path: Path) -> None:
        self._request(str(path.absolute()))

    def end(self) -> int:
        return int(self._request(END))

    def error(self) -> str:
        self.stderr.seek(0)
        return (self.stderr.read().strip().splitlines() or ["ended"])[-1]


# -- the floor ---


def step_flops(task: StepTask) -> int:
    """FLOPs of the step's matrix products and convolutions, when nothing is computed twice."""
    student, teacher = Network(task.config), Network(task.config)
    groups = [views.cpu() for views in task.views()]

    def step() -> None:
        with torch.no_grad():
            of_teacher = teacher.embed(groups[:1])
        logits = (embeddings.logits() for embeddings in (student.embed(groups), of_teacher))
        DINOLoss(task.out_dim)(*logits, 0.04)[0].backward()

    return flops_of(step)


def measured_peak(task: StepTask) -> float:
    """FLOP/s of a large matrix product, the best of several."""
    dtypes = {"32-true": torch.float32, "16-mixed": torch.float16}
    side = 2048 if task.device.type == "cpu" else 8192
    a, b = torch.randn(
        2, side, side, device=task.device, dtype=dtypes.get(task.precision, torch.bfloat16)
    )
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


# -- the table ---


def measure(task: StepTask, options: argparse.Namespace) -> dict[str, Any]:
    contenders = []
    for name in options.contenders:
        contender = Contender(name, task)
        if contender.ready:
            contenders.append(contender)
        else:
            print(f"{name}: left out: {contender.error()}")
    for contender in contenders:
        for _ in range(options.warmup):
            contender.step()
    first = {contender.name: contender.seconds[0] for contender in contenders}
    for contender in contenders:
        contender.seconds.clear()
    for _ in range(options.steps):
        for contender in contenders:
            contender.step()
    if options.profile:
        contenders[-1].profile(options.profile)
    rows = {
        contender.name: {
            "seconds": statistics.median(contender.seconds),
            "fastest": min(contender.seconds),
            "slowest": max(contender.seconds),
            "first_step": first[contender.name],
            "bytes": contender.end(),
        }
        for contender in contenders
    }
    flops, rate = step_flops(task), measured_peak(task)
    floor = flops / rate
    base = rows[contenders[0].name]
    print(f"{task.arch}, {task.precision}, batch {task.batch}; floor {floor:.3f} s")
    for name, row in rows.items():
        print(
            f"  {name:18} {row['seconds']:7.3f} s ({row['fastest']:.3f} to {row['slowest']:.3f}), "
            f"{row['seconds'] / base['seconds']:.2f} of {contenders[0].name}, "
            f"{row['seconds'] / floor:.2f} floors, {row['bytes'] / 2**30:.2f} GiB, "
            f"{row['bytes'] / base['bytes']:.2f}; first step {row['first_step']:.1f} s"
        )
    measured = {
        "flops": flops,
        "flops_a_second": rate,
        "floor_seconds": floor,
        "steps": options.steps,
    }
    described = dataclasses.asdict(task)
    del described["official_dino"], described["official_xcit"]  # paths of this machine
    return {**described, **measured, "contenders": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=["xcit_s12_p16", "xcit_n12_p16"])
    parser.add_argument("--precision", nargs="+", default=["bf16-mixed", "32-true"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--sizes",
        type=int,
        nargs=2,
        default=[224, 96],
        help="sides of the global and the local crops",
    )
    parser.add_argument("--local_crops", type=int, default=8)
    parser.add_argument("--out_dim", type=int, default=65536)
    parser.add_argument("--steps", type=int, default=10, help="of each contender, taking turns")
    parser.add_argument("--warmup", type=int, default=3, help="steps before, not counted")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--official_dino", default="", help="a clone of facebookresearch/dino")
    parser.add_argument("--official_xcit", default="", help="a clone of facebookresearch/xcit")
    parser.add_argument(
        "--profile", type=Path, help="text file: one more step of the last contender, by operation"
    )
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--contend", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend:
        name, fields = json.loads(options.contend)
        contend(name, StepTask(*fields))
        return
    rows = []
    for arch in options.arch:
        for precision in options.precision:
            task = StepTask(
                arch,
                precision,
                options.batch,
                *options.sizes,
                options.local_crops,
                options.out_dim,
                options.official_dino,
                options.official_xcit,
            )
            rows.append(measure(task, options))
    if options.output:
        options.output.write_text(json.dumps({**circumstances(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
