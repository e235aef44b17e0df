"""What several test files share."""

from __future__ import annotations

import dataclasses

from dino_xcit.config.pretrain import PretrainConfig

PICO_PATHS = (2, 3)  # layers and residual branches of xcit_pico2

TINY = PretrainConfig(
    arch="xcit_pico2_p4",
    dataset="shapes",
    num_images=48,
    global_crops_size=16,
    local_crops_size=8,
    local_crops_number=2,
    drop_path_rate=0.1,
    out_dim=24,
    head_hidden_dim=32,
    head_bottleneck_dim=16,
    epochs=2,
    batch_size_per_gpu=8,
    warmup_epochs=1,
    freeze_last_layer=1,
    accelerator="cpu",
    devices="1",
    precision="32-true",
    num_workers=0,
    log_every_n_steps=1,
    eval_every_n_epochs=0,
    eval_num_images=40,
)


def as_flags(config: PretrainConfig) -> list[str]:
    """The command line that gives this config."""
    flags: list[str] = []
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field.default
        if value != default and value not in ({}, ()):
            flags.append(f"--{field.name}")
            flags += [str(item) for item in value] if isinstance(value, tuple) else [str(value)]
    return flags
