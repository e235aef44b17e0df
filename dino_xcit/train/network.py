"""Backbone and projection head, as student and teacher each have them.

Axes: B images, V views of an image, C channels, S pixels on a side, K prototypes, D features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dino_xcit.model.architectures import ABLATIONS
from dino_xcit.model.build import build_backbone
from dino_xcit.model.chunked_loss import Embeddings
from dino_xcit.model.dino import DINOHead

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dino_xcit.config.pretrain import RunConfig


class Network(nn.Module):
    """Backbone and projection head; the student is one, the teacher another."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(
            config.arch,
            in_chans=config.in_chans,
            image_size=config.global_crops_size,
            grad_checkpointing=config.grad_checkpointing,
            sampled_paths=config.drop_path_rate > 0,
            ablations={switch: getattr(config, switch) for switch in ABLATIONS},
        )
        self.head = DINOHead(
            self.backbone.embed_dim,
            config.out_dim,
            hidden_dim=config.head_hidden_dim,
            bottleneck_dim=config.head_bottleneck_dim,
            use_bn=config.use_bn_in_head,
            norm_last_layer=config.norm_last_layer,
        )

    def forward(
        self, groups: list[Tensor], paths: Sequence[Tensor | None] = (None, None)
    ) -> Tensor:
        """Compute the logits of all views.

        Args:
            groups: views of one size each, (B, views, C, S, S).
            paths: stochastic depth of each group, (B, views, layers, branches), or None.

        Returns:
            (B, V, K)
        """
        return self.embed(groups, paths).logits()

    def embed(
        self, groups: list[Tensor], paths: Sequence[Tensor | None] = (None, None)
    ) -> Embeddings:
        """Head outputs before the last layer, and that layer's weights; see `features`."""
        return self.project(self.features(groups, paths))

    def features(
        self, groups: list[Tensor], paths: Sequence[Tensor | None] = (None, None)
    ) -> list[Tensor]:
        """Features of each group of views, (B, views, C).

        Args:
            groups: views of one size each, (B, views, C, S, S).
            paths: stochastic depth of each group, (B, views, layers, branches), or None.
        """
        return [
            self.backbone(
                views.flatten(0, 1), None if of_group is None else of_group.flatten(0, 1)
            ).unflatten(0, views.shape[:2])
            for views, of_group in zip(groups, paths, strict=False)
        ]

    def project(self, features: list[Tensor]) -> Embeddings:
        """Head outputs before the last layer, and that layer's weights.

        The loss makes the logits from them, a few prototypes at a time.
        """
        views = torch.cat(features, dim=1)  # (B, V, C)
        return Embeddings(
            of_views=self.head.embed(views.flatten(0, 1)).unflatten(0, views.shape[:2]),
            weight_v=self.head.last_layer.weight_v,
            weight_g=self.head.last_layer.weight_g,
        )
