"""KoLeo against the formula, one pair at a time, and what it does to features."""

import math

import pytest
import torch
import torch.nn.functional as F

from dino_xcit.model.koleo import koleo


def naive(features):
    """-1/n sum of log min_j |x_i - x_j|, the mean over views, in float64."""
    losses = []
    for view in F.normalize(features.double(), dim=-1):
        for i, x in enumerate(view):
            others = torch.stack([(x - y).norm() for j, y in enumerate(view) if j != i])
            losses.append(-others.min().log())
    return torch.stack(losses).mean()


def test_value_and_gradient_are_those_of_the_formula():
    features = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss, scalars = koleo(features)
    expected = naive(features)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss, features)
    (expected_gradient,) = torch.autograd.grad(expected, features)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    assert not scalars["nearest_distance"].requires_grad


def test_two_opposite_features_by_hand():
    loss, scalars = koleo(torch.tensor([[[3.0, 0.0], [-0.5, 0.0]]]))
    assert loss.item() == pytest.approx(-math.log(2))
    assert scalars["nearest_distance"].item() == pytest.approx(2)


def test_equal_features_and_a_single_one_give_finite_gradients():
    for features in (torch.ones(2, 3, 4), torch.ones(2, 1, 4)):
        features.requires_grad_()
        loss, _ = koleo(features)
        (gradient,) = torch.autograd.grad(loss, features)
        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_it_is_computed_in_float32_under_autocast():
    features = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = koleo(features.bfloat16())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, koleo(features.bfloat16().float())[0])
