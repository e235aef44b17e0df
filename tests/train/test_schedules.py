"""Schedules against official DINO's: `utils.cosine_scheduler`, `DINOLoss.teacher_temp_schedule`."""

import numpy as np
import pytest

from dino_xcit.config.pretrain import RunConfig
from dino_xcit.train.schedules import Schedules

EPOCHS, STEPS_PER_EPOCH = 6, 5


def official_cosine(base, final, warmup_steps=0, start=0.0, steps=EPOCHS * STEPS_PER_EPOCH):
    """A value per step: the last warmup step reaches the peak, where the cosine starts."""
    warmup = np.linspace(start, base, warmup_steps)
    rest = steps - warmup_steps
    return np.concatenate(
        [
            warmup,
            [final + 0.5 * (base - final) * (1 + np.cos(np.pi * i / rest)) for i in range(rest)],
        ]
    )


def schedules(total_batch=256, **options):
    config = RunConfig(**{"epochs": EPOCHS, "warmup_epochs": 0, **options})
    return Schedules(config=config, steps_per_epoch=STEPS_PER_EPOCH, total_batch=total_batch)


def every_step(schedule):
    return [schedule(step) for step in range(EPOCHS * STEPS_PER_EPOCH)]


@pytest.mark.parametrize("warmup_epochs", [0, 0.2, 0.5, 1, 2, EPOCHS])
@pytest.mark.parametrize("warmup_lr", [0.0, 1e-5])
def test_learning_rate_is_official(warmup_epochs, warmup_lr):
    s = schedules(
        total_batch=512, lr=3e-4, min_lr=1e-6, warmup_lr=warmup_lr, warmup_epochs=warmup_epochs
    )
    expected = official_cosine(6e-4, 1e-6, int(warmup_epochs * STEPS_PER_EPOCH), warmup_lr)
    np.testing.assert_allclose(every_step(s.lr), expected, rtol=1e-12)


def test_warmup_reaches_the_scaled_peak():
    s = schedules(total_batch=1024, lr=0.0005, warmup_epochs=2)
    assert s.lr(0) == 0
    assert s.lr(9) == s.lr(10) == pytest.approx(0.002)
    assert s.lr(11) < s.lr(10)


def test_weight_decay_is_official():
    s = schedules(weight_decay=0.04, weight_decay_end=0.4, warmup_epochs=2)
    np.testing.assert_allclose(every_step(s.weight_decay), official_cosine(0.04, 0.4), rtol=1e-12)


def test_momentum_is_official():
    s = schedules(momentum_teacher=0.99, warmup_epochs=2)
    np.testing.assert_allclose(every_step(s.momentum), official_cosine(0.99, 1.0), rtol=1e-12)


@pytest.mark.parametrize("warmup_epochs", [0, 1, 2, 4, EPOCHS])
def test_teacher_temperature_is_official_and_constant_within_an_epoch(warmup_epochs):
    s = schedules(
        warmup_teacher_temp=0.04,
        teacher_temp=0.07,
        warmup_teacher_temp_epochs=warmup_epochs,
        warmup_epochs=2,
    )
    per_epoch = np.concatenate(
        [np.linspace(0.04, 0.07, warmup_epochs), np.full(EPOCHS - warmup_epochs, 0.07)]
    )
    np.testing.assert_allclose(
        every_step(s.teacher_temp), per_epoch.repeat(STEPS_PER_EPOCH), rtol=1e-12
    )


@pytest.mark.parametrize("frozen_epochs", [0, 1, 3])
def test_last_layer_is_frozen_for_whole_epochs(frozen_epochs):
    s = schedules(freeze_last_layer=frozen_epochs)
    frozen_steps = frozen_epochs * STEPS_PER_EPOCH
    assert every_step(s.last_layer_is_frozen) == [True] * frozen_steps + [False] * (
        s.steps - frozen_steps
    )


def test_epochs_and_steps_are_counted_from_zero():
    s = schedules()
    assert s.steps == EPOCHS * STEPS_PER_EPOCH
    assert every_step(s.epoch) == list(np.arange(EPOCHS).repeat(STEPS_PER_EPOCH))
