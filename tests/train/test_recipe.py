"""Resolved settings: official at the size of ImageNet, possible everywhere, never overruling."""

import dataclasses

import pytest
from helpers import TINY

from dino_xcit.config.pretrain import RESOLVED, PretrainConfig, RunConfig
from dino_xcit.train.recipe import RULES, Facts, resolve

FACTS = Facts(
    images=1_281_167,
    side=375,
    on_cpu=False,
    processes=1,
    fits=lambda config: True,
    images_per_second=lambda config: 300.0,
)


def facts(**changes):
    return dataclasses.replace(FACTS, **changes)


def test_on_imagenet_every_setting_is_official():
    config, settings = resolve(PretrainConfig(), FACTS)
    assert config == RunConfig()
    assert {setting.option for setting in settings} == set(RULES)


def test_every_option_that_may_be_auto_has_a_rule():
    assert set(RULES) == set(RESOLVED)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_recipe_official_is_official_on_any_images(on_cpu):
    asked = PretrainConfig(recipe="official", lr=0.25)
    config, settings = resolve(asked, facts(images=200, side=28, on_cpu=on_cpu))
    assert config == RunConfig(recipe="official", lr=0.25)
    assert settings == []


def test_a_run_of_official_dino_continues_with_its_values():
    asked = PretrainConfig(continue_from="checkpoint.pth")
    config, _ = resolve(asked, facts(images=200, side=28, on_cpu=True))
    assert config == RunConfig(continue_from="checkpoint.pth")


@pytest.mark.parametrize("images", [1, 10, 300, 5000, 60_000, 3_000_000])
@pytest.mark.parametrize("side", [8, 16, 28, 100, 2000])
@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize(
    "asked", [{}, {"epochs": 1}, {"arch": "xcit_s12_p16"}, {"teacher_temp": 1}]
)
def test_what_is_resolved_is_always_possible(images, side, on_cpu, asked):
    """`RunConfig` refuses what is not; a step needs as many images as it takes."""
    given = facts(images=images, side=side, on_cpu=on_cpu)
    config, _ = resolve(PretrainConfig(**asked), given)
    assert config.batch_size_per_gpu <= images
    assert config.warmup_teacher_temp <= config.teacher_temp
    for name, value in asked.items():
        assert getattr(config, name) == value


def test_what_is_given_is_kept_and_not_listed():
    given = facts(images=500, side=64, on_cpu=True)
    config, settings = resolve(dataclasses.replace(TINY, lr=0.125), given)
    assert config == dataclasses.replace(TINY, lr=0.125)
    assert settings == []


def test_the_epochs_are_those_that_the_hours_allow():
    given = facts(images=5000, images_per_second=lambda config: 100.0)
    config, _ = resolve(PretrainConfig(max_hours=0.5), given)
    assert config.epochs == 0.5 * 3600 * 100 // 5000
    assert config.max_hours is None


def test_the_batch_is_one_that_fits_in_the_memory():
    given = facts(fits=lambda config: config.batch_size_per_gpu <= 20)
    config, settings = resolve(PretrainConfig(), given)
    assert config.batch_size_per_gpu == 16
    (why,) = [setting.why for setting in settings if setting.option == "batch_size_per_gpu"]
    assert "memory" in why


def test_the_images_of_a_step_are_counted_over_processes_and_passes():
    asked = PretrainConfig(accumulate_grad_batches=2)
    config, _ = resolve(asked, facts(images=100, processes=4))
    assert config.batch_size_per_gpu == 8
