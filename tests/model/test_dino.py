"""Head and loss against naive formulas, and tiny cases by hand."""

from math import log

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from dino_xcit.model import chunked_loss
from dino_xcit.model.chunked_loss import Embeddings
from dino_xcit.model.dino import DINOHead, DINOLoss

B, K, TEACHER_TEMP, STUDENT_TEMP = 3, 11, 0.05, 0.1


def logits(views, seed=0):
    return torch.randn(B, views, K, generator=torch.Generator().manual_seed(seed))


def loss_with_center():
    loss = DINOLoss(K, student_temp=STUDENT_TEMP, center_momentum=0.7)
    loss.center.copy_(torch.linspace(-0.5, 0.7, K))
    return loss


def naive_pairs(student, teacher, center):
    """q_g and log p_v of each pair of a global view g and another view v, in float64."""
    student, teacher = student.double(), teacher.double()
    for g in range(teacher.shape[1]):
        q = ((teacher[:, g] - center.double()) / TEACHER_TEMP).softmax(-1)
        for v in range(student.shape[1]):
            if v != g:
                yield q, (student[:, v] / STUDENT_TEMP).log_softmax(-1)


def naive_loss(student, teacher, center):
    """The mean over pairs and images of -q . log p."""
    return torch.stack(
        [-(q * log_p).sum(-1).mean() for q, log_p in naive_pairs(student, teacher, center)]
    ).mean()


@pytest.mark.parametrize("local_crops", [0, 1, 6])
def test_loss_and_gradient_are_those_of_every_pair(local_crops):
    student, teacher = logits(2 + local_crops).requires_grad_(), logits(2, seed=1).requires_grad_()
    loss = loss_with_center()
    value, scalars = loss(student, teacher, TEACHER_TEMP)
    assert not any(scalar.requires_grad for scalar in scalars.values())
    (gradient,) = torch.autograd.grad(value, student, retain_graph=True)
    expected = naive_loss(student, teacher, loss.center)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    assert torch.autograd.grad(value, teacher, allow_unused=True) == (None,)


def test_loss_of_two_views_by_hand():
    teacher = torch.tensor([[[log(3), 0.0], [0.0, 0.0]]])  # q is 3/4, 1/4 and 1/2, 1/2
    student = torch.tensor([[[0.0, 0.0], [0.0, log(3)]]])  # p is 1/2, 1/2 and 1/4, 3/4
    loss = DINOLoss(2, student_temp=1.0)
    value, scalars = loss(student, teacher, 1.0)
    # First global view, second view: 3/4 ln 4 + 1/4 ln 4/3. Second global view, first view: ln 2.
    assert value.item() == pytest.approx((0.75 * log(4) + 0.25 * log(4 / 3) + log(2)) / 2)
    entropy = (0.75 * log(4 / 3) + 0.25 * log(4) + log(2)) / 2
    assert scalars["teacher_entropy"].item() == pytest.approx(entropy)
    assert scalars["kl"].item() == pytest.approx(0.5 * log(3) / 2)  # 3/4 ln 3 + 1/4 ln 1/3, and 0


def test_temperatures_and_center_by_hand():
    loss = DINOLoss(2, student_temp=0.5)
    loss.center.copy_(torch.tensor([1.0, 1.0 - 0.1 * log(3)]))
    teacher = torch.ones(1, 2, 2)  # minus the center, over 0.1: 0 and ln 3, so q is 1/4, 3/4
    student = torch.tensor([0.5 * log(4), 0.0]).expand(1, 2, 2)  # p is 4/5, 1/5
    value, _ = loss(student, teacher, 0.1)
    assert value.item() == pytest.approx(0.25 * log(5 / 4) + 0.75 * log(5))


@pytest.mark.parametrize("local_crops", [0, 4])
def test_kl_is_the_mean_divergence_over_pairs(local_crops):
    student, teacher = logits(2 + local_crops), logits(2, seed=1)
    loss = loss_with_center()
    value, scalars = loss(student, teacher, TEACHER_TEMP)
    pairs = list(naive_pairs(student, teacher, loss.center))
    expected = torch.stack([F.kl_div(log_p, q, reduction="batchmean") for q, log_p in pairs]).mean()
    assert scalars["kl"].item() == pytest.approx(expected.item(), rel=1e-4)
    entropy = value.item() - expected.item()
    assert scalars["teacher_entropy"].item() == pytest.approx(entropy, rel=1e-4)


def test_uniform_teacher_has_entropy_ln_k_and_certain_teacher_zero():
    loss = DINOLoss(K)
    uniform = torch.zeros(B, 2, K)
    certain = F.one_hot(torch.arange(2 * B).reshape(B, 2), K).float()
    for teacher, entropy in ((uniform, log(K)), (certain, 0.0)):
        _, scalars = loss(logits(2), teacher, 0.01)
        assert scalars["teacher_entropy"].item() == pytest.approx(entropy, abs=1e-6)


def test_center_moves_by_the_mean_output_once_per_update():
    loss = loss_with_center()
    center = loss.center.clone()
    for seed in (1, 2):
        teacher = logits(2, seed)
        before = loss.center.clone()
        loss(logits(3), teacher, TEACHER_TEMP)
        torch.testing.assert_close(loss.center, before, rtol=0, atol=0)  # forward alone leaves it
        loss.update_center()
        center = 0.7 * center + 0.3 * teacher.mean((0, 1))
        torch.testing.assert_close(loss.center, center)


def test_several_passes_before_an_update_are_one_pass_of_the_whole_batch():
    parts, whole = loss_with_center(), loss_with_center()
    student, teacher = logits(4), logits(2, seed=1)
    for images in (slice(0, 1), slice(1, 3)):  # of unequal sizes
        parts(student[images], teacher[images], TEACHER_TEMP)
    whole(student, teacher, TEACHER_TEMP)
    parts.update_center()
    whole.update_center()
    torch.testing.assert_close(parts.center, whole.center)
    assert not torch.allclose(whole.center, loss_with_center().center)


def test_center_alone_is_saved():
    assert list(DINOLoss(K).state_dict()) == ["center"]


# -- chunked --------------------------------------------------------------------------------------


IMAGES, VIEWS, DIM = 7, 4, 5


def embeddings(views, seed, learn=True):
    generator = torch.Generator().manual_seed(seed)
    of_views = F.normalize(torch.randn(IMAGES, views, DIM, generator=generator), dim=-1)
    weight_v = torch.randn(K, DIM, generator=generator)
    weight_g = torch.arange(K)[:, None] / 4  # the first prototype has norm 0
    return Embeddings(*[tensor.requires_grad_(learn) for tensor in (of_views, weight_v, weight_g)])


@pytest.mark.parametrize("global_views", [1, 2])
@pytest.mark.parametrize("prototypes", [1, 3, K, 1000])
def test_chunked_loss_gradients_center_and_scalars_are_those_of_all_logits(
    prototypes, global_views, monkeypatch
):
    monkeypatch.setattr(chunked_loss, "CHUNK_ON_CPU", IMAGES * VIEWS * prototypes)
    student, teacher = embeddings(VIEWS, 0), embeddings(global_views, 1, learn=False)
    chunked, whole = loss_with_center(), loss_with_center()
    of_teacher = teacher.logits()
    values, scalars = zip(
        chunked.of_embeddings(student, teacher, TEACHER_TEMP),
        whole(student.logits(), of_teacher, TEACHER_TEMP),
        strict=True,
    )
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*scalars)
    gradients = [torch.autograd.grad(3 * value, student) for value in values]
    torch.testing.assert_close(*gradients)
    for loss in (chunked, whole):
        loss.update_center()
    torch.testing.assert_close(chunked.center, whole.center)


def test_chunked_gradients_under_autocast_are_near_those_in_float32():
    student, teacher = embeddings(VIEWS, 0), embeddings(2, 1, learn=False)
    expected = torch.autograd.grad(
        loss_with_center().of_embeddings(student, teacher, TEACHER_TEMP)[0], student
    )
    with torch.autocast("cpu", torch.bfloat16):
        value = loss_with_center().of_embeddings(student, teacher, TEACHER_TEMP)[0]
    for gradient, exact in zip(torch.autograd.grad(value, student), expected, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - exact).norm() < 0.05 * exact.norm()


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest result of any operation."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("views", [3, 9])
def test_chunked_loss_makes_no_tensor_that_grows_with_views_times_prototypes(views, monkeypatch):
    limit = 2 * IMAGES * 9
    monkeypatch.setattr(chunked_loss, "CHUNK_ON_CPU", limit)
    student, teacher = embeddings(views, 0), embeddings(2, 1, learn=False)
    with LargestTensor() as largest:
        value, _ = loss_with_center().of_embeddings(student, teacher, TEACHER_TEMP)
        value.backward()
    assert largest.elements <= max(limit, K * DIM, IMAGES * views * DIM) < IMAGES * views * K


# -- head -----------------------------------------------------------------------------------------


class ReferenceHead(nn.Module):
    """Official DINO's head, with torch's weight norm."""

    def __init__(self, in_dim, out_dim, hidden, bottleneck, use_bn):
        super().__init__()
        bn = [nn.BatchNorm1d(hidden)] if use_bn else []
        more_bn = [nn.BatchNorm1d(hidden)] if use_bn else []
        first, second = nn.Linear(in_dim, hidden), nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(
            first, *bn, nn.GELU(), second, *more_bn, nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.last_layer = weight_norm(nn.Linear(bottleneck, out_dim, bias=False))

    def forward(self, x):
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, p=2))


@pytest.mark.parametrize("use_bn", [False, True])
@pytest.mark.parametrize("norm_last_layer", [False, True])
def test_head_is_official_dinos(norm_last_layer, use_bn):
    torch.manual_seed(0)
    head = DINOHead(
        5, 9, hidden_dim=8, bottleneck_dim=4, use_bn=use_bn, norm_last_layer=norm_last_layer
    )
    reference = ReferenceHead(5, 9, 8, 4, use_bn)
    for parameter in head.parameters():
        if parameter.requires_grad:
            nn.init.uniform_(parameter, -1.0, 1.5)
    reference.mlp.load_state_dict(head.mlp.state_dict(), strict=True)
    weight = reference.last_layer.parametrizations.weight
    weight.load_state_dict(
        {"original0": head.last_layer.weight_g, "original1": head.last_layer.weight_v}, strict=True
    )

    x = torch.randn(6, 5)
    outputs = [head(x), reference(x)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    direction = torch.randn(6, 9)
    for output in outputs:
        (output * direction).sum().backward()
    for ours, theirs in zip(head.mlp.parameters(), reference.mlp.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        head.last_layer.weight_v.grad, weight.original1.grad, rtol=1e-4, atol=1e-5
    )
    if norm_last_layer:
        assert head.last_layer.weight_g.grad is None
        assert (head.last_layer.weight_g == 1).all()
    else:
        torch.testing.assert_close(
            head.last_layer.weight_g.grad, weight.original0.grad, rtol=1e-4, atol=1e-5
        )


def test_norm_last_layer_keeps_logits_between_minus_one_and_one():
    head = DINOHead(5, 50, hidden_dim=8, bottleneck_dim=4)
    with torch.no_grad():
        head.last_layer.weight_v.mul_(100)
        assert head(100 * torch.randn(40, 5)).abs().max() <= 1 + 1e-6


def test_head_takes_any_leading_axes():
    head = DINOHead(5, 9, hidden_dim=8, bottleneck_dim=4)
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(head(x), head(x.flatten(0, 1)).unflatten(0, (2, 3)))


def test_biases_of_the_head_start_at_zero_and_weights_are_truncated_normal():
    layers = [
        layer
        for layer in DINOHead(64, 9, hidden_dim=128, bottleneck_dim=32).mlp
        if isinstance(layer, nn.Linear)
    ]
    assert len(layers) == 3
    for layer in layers:
        assert not layer.bias.any()
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
