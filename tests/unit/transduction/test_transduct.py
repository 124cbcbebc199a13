"""Networks for images that become networks for videos."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfact
import fxfact.nn as fnn
from fxfact.errors import ArgumentError, ArgumentTypeError, CaptureError, FxfactError, VerificationError
from tests.support import EqualLayers, apart, copied_state, has_state

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Functional(nn.Module):
    """Shortcuts by indices and padding, functional pools, concatenations and sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.norm, self.head = nn.BatchNorm2d(12), nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        x = F.relu(self.norm(self.second(x))) + short
        x = torch.cat([x, F.avg_pool2d(x, 3, 1, 1), F.max_pool2d(x, (3, 1), stride=1, padding=(1, 0))], dim=-3)
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        first, second = x.chunk(2, dim=1)
        x = torch.cat([first, second], 1)
        x = F.adaptive_avg_pool2d(x, 1)
        return self.head(x.view(x.size(0), -1))


def block(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


NETWORKS: dict[str, nn.Module] = {
    "functional": Functional(),
    "modules": block(
        nn.ReflectionPad2d(1),
        nn.Conv2d(3, 8, 3, bias=False),
        nn.InstanceNorm2d(8, affine=True),
        nn.LeakyReLU(),
        nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
        nn.AvgPool2d(2),
        nn.ZeroPad2d((1, 0, 0, 1)),
        nn.GroupNorm(2, 8),
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Dropout2d(0.5),
    ),
    "transposed, maps": nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.GELU(), nn.ConvTranspose2d(8, 3, 3, stride=2)),
    "layers": block(
        fnn.CPConv(3, 8, (3, 3), padding=1, rank=0.9),
        nn.ReLU(),
        fnn.TuckerConv(8, 8, (3, 3), stride=2, rank=(4, 4)),
        nn.ReLU(),
        fnn.TTConv(8, 8, (3, 3), padding="same", rank=0.5, implementation="reconstructed"),
    ),
    "padding modes": block(
        nn.Conv2d(3, 8, (2, 4), padding="same"), nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network_maps_the_frames_of_a_clip_as_before(name: str) -> None:
    model = NETWORKS[name].eval()
    before = copied_state(model)
    video = fxfact.transduct(model, X)
    still = X.unsqueeze(2).expand(-1, -1, 5, -1, -1)
    expected, found = model(X), video(still)
    if found.ndim == 5:
        expected = expected.unsqueeze(2).expand_as(found)
        frames = torch.stack([model(frame) for frame in (X, 2 * X)], dim=2)
        assert apart(frames, video(torch.stack([X, 2 * X], dim=2))) < 1e-5
    assert apart(expected, found) < 1e-5
    assert has_state(model, before)
    found.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in video.parameters())
    torch.compiler.reset()
    assert apart(found, torch.compile(video, fullgraph=True, backend="aot_eager")(still)) < 1e-5


def test_network_that_was_factorized_sees_frames_in_one_stage_of_each_chain() -> None:
    model = block(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1)).eval()
    small = fxfact.factorize(model, ["cp_factorized", "tucker"], rank=0.5, example_inputs=X)
    video = fxfact.transduct(small, X)
    kernels = [m.kernel_size for m in video.modules() if isinstance(m, nn.Conv3d)]
    assert sorted(kernels).count((3, 3, 1)) + sorted(kernels).count((3, 3, 3)) == 2
    assert (3, 1, 3) not in kernels


def test_mode_and_choice_of_parameters_are_kept() -> None:
    model = NETWORKS["layers"].train()
    video = fxfact.transduct(model, X, kernel_size=5, train_all=False)
    assert video.training
    assert model.training
    trained = [name for name, p in video.named_parameters() if p.requires_grad]
    assert len(trained) == 5  # a stage of each of three layers, and the head
    assert all(video.get_parameter(name).shape[2:3] in ((5,), ()) for name in trained)


def test_norms_keep_their_statistics_apart() -> None:
    model = NETWORKS["functional"].train()
    video = fxfact.transduct(model, X)
    before = copied_state(model)
    video(X.unsqueeze(2).expand(-1, -1, 4, -1, -1))
    assert has_state(model, before)
    assert not video.norm.running_mean.equal(model.norm.running_mean)


class Calling(nn.Module):
    """A forward of one function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.conv, self.scale, self.function = nn.Conv2d(3, 4, 3), nn.Parameter(torch.randn(4, 1, 1)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.conv(x))


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.PixelShuffle(2)), CaptureError, r"1 \(PixelShuffle\)"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax2d()), CaptureError, r"1 \(Softmax2d\)"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(size=9)), CaptureError, r"1 \(Upsample\)"),
        (Calling(lambda self, x: F.pixel_shuffle(x, 2)), CaptureError, "a call of pixel_shuffle"),
        (Calling(lambda self, x: x * self.scale), CaptureError, "a call of mul"),
        (Calling(lambda self, x: x.sum((2, 3))), CaptureError, "a call of sum"),
        (Calling(lambda self, x: x.flatten(1) if x.sum() > 0 else x), CaptureError, "cannot trace Calling"),
        (Calling(lambda self, x: x.reshape(2, -1)), VerificationError, "still clip"),
    ],
)
def test_what_has_no_counterpart_is_named(model: nn.Module, error: type[FxfactError], words: str) -> None:
    with pytest.raises(error, match=words):
        fxfact.transduct(model, X)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"example_inputs": X[0]}, ArgumentTypeError, r"got \(3, 16, 16\)"),
        ({"example_inputs": "x"}, ArgumentTypeError, "got str"),
        ({"example_inputs": X, "kernel_size": 0}, ArgumentError, "kernel_size"),
    ],
)
def test_invalid_arguments_of_transduct_are_refused(options: Any, error: type[FxfactError], words: str) -> None:
    with pytest.raises(error, match=words):
        fxfact.transduct(NETWORKS["functional"], **options)


def test_layers_that_share_stages_share_them_with_frames(image: Tensor) -> None:
    model = EqualLayers().eval()
    model.heads = nn.ModuleList(nn.Identity() for _ in model.heads)
    for method, rank in (("tucker", (5, 4)), ("channel_svd", 5)):
        small = fxfact.factorize(model, method, rank=rank, example_inputs=image, joint="convs.*", include="convs.*")
        video = fxfact.transduct(small, image)
        first, *others = (video.get_submodule(f"convs.{k}.0").weight for k in range(3))
        assert all(other is first for other in others)
        own = [video.get_submodule(f"convs.{k}.1").weight for k in range(3)]
        assert own[0] is not own[1]


def test_convolutions_of_joint_layers_are_named_and_may_be_made_dense(image: Tensor) -> None:
    model = EqualLayers().eval()
    model.heads = nn.ModuleList(nn.Identity() for _ in model.heads)
    joint = fnn.JointConv.from_conv_list(list(model.convs), 0.5, factorization="tucker")
    model.convs = nn.ModuleList(joint)
    with pytest.raises(CaptureError, match=r"convs\.0 \(SharedConv\).*Replace them \(a SharedConv by"):
        fxfact.transduct(model, image)
    model.convs = nn.ModuleList(conv.to_conv() for conv in joint)
    fxfact.transduct(model, image)
