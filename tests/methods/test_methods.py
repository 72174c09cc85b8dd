"""The four methods: which images meet which, who gets a gradient, and what follows a step."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bsim import Mixture, info_nce, negative_cosine, nt_xent, sample_mixture
from methods import METHODS
from methods.networks import backbone, cosine, mlp, moving_average
from training.resolve import LOOP, method_defaults

N, D = 8, 12
SCALE = dict(image_size=8, width=D, steps=100, images=64)


class Counting(nn.Module):
    """A stand-in backbone without batch norm that counts the images it sees, with and without gradient."""

    num_features = D

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 8 * 8, D)
        self.seen = {True: 0, False: 0}

    def forward(self, x):
        self.seen[torch.is_grad_enabled()] += len(x)
        return self.layer(x.flatten(1)).tanh()


def build(name, **change):
    torch.manual_seed(0)
    defaults = METHODS[name].defaults(**SCALE) | change
    heads = {k: v for k, v in defaults.items() if k not in LOOP}
    return METHODS[name].Method(Counting(), **heads)


def batch(method, seed=1):
    draws = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, N, 3, 8, 8, generator=draws)
    views = torch.cat([a, b], 1) if method.both_views else a
    return a, b, sample_mixture(views, generator=draws)


@pytest.mark.parametrize("name", METHODS)
def test_only_what_is_asked_for_is_computed(name):
    method = build(name)
    a, b, mixture = batch(method)
    plain, pure, both = method(a, b), method(a, b, mixture, sim=False), method(a, b, mixture)
    assert plain.bsim is None and pure.sim is None
    assert float(plain.sim.detach()) != pytest.approx(float(pure.bsim.detach()), abs=1e-3)
    if name != "simclr":  # whose batch norm sees all the views of a pass together
        torch.testing.assert_close(both.sim, plain.sim)
        torch.testing.assert_close(both.bsim, pure.bsim)


@pytest.mark.parametrize("name", METHODS)
def test_mixtures_of_share_one_give_the_plain_loss(name):
    method = build(name)
    method.train(name != "simclr")  # whose mixtures have batch statistics of their own
    a, b, mixture = batch(method)
    views = torch.cat([a, b], 1) if method.both_views else a
    whole = Mixture(views, torch.ones(N), mixture.partner)
    torch.testing.assert_close(method(a, b, whole, sim=False).bsim, method(a, b).sim)


@pytest.mark.parametrize(
    "name, plain, pure, both",  # images through the network in units of the batch: (with gradient, without)
    [
        ("simclr", (2, 0), (2, 0), (3, 0)),
        ("moco", (1, 1), (1, 1), (2, 1)),
        ("byol", (2, 2), (2, 2), (4, 2)),
        ("simsiam", (2, 0), (2, 2), (4, 0)),
        ("mocov3", (2, 2), (2, 2), (4, 2)),
    ],
)
def test_encoder_passes(name, plain, pure, both):
    for sim, mixed, wanted in ((True, False, plain), (False, True, pure), (True, True, both)):
        method = build(name)
        a, b, mixture = batch(method)
        method(a, b, mixture if mixed else None, sim)
        seen = {True: 0, False: 0}
        for module in method.modules():
            if isinstance(module, Counting):
                seen = {k: seen[k] + module.seen[k] for k in seen}
        assert (seen[True], seen[False]) == (wanted[0] * N, wanted[1] * N), (sim, mixed)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("sim_weight", [1.0, 0.5, 0.0])
def test_gradients_reach_all_that_is_trained_and_nothing_else(name, sim_weight):
    method = build(name)
    a, b, mixture = batch(method)
    losses = method(a, b, mixture if sim_weight < 1 else None, sim_weight > 0)
    sum(part for part in losses[:2] if part is not None).backward()
    for path, parameter in method.named_parameters():
        slow = path.startswith(("target", "key_encoder"))
        assert parameter.requires_grad != slow
        # SimCLR's and SimSiam's last batch norm takes the bias before it away.
        assert slow == (parameter.grad is None), path


def test_simclr_is_nt_xent_of_the_projections():
    method = build("simclr")
    a, b, mixture = batch(method)
    with torch.no_grad():
        z_a, z_b = method.projector(method.backbone(torch.cat([a, b]))).chunk(2)
        torch.testing.assert_close(method(a, b).sim, nt_xent(z_a, z_b, method.temperature))
        z_m, z_b = (method.projector(method.backbone(x)) for x in (mixture.images, b))  # apart: batch statistics
        wanted = nt_xent(z_m, z_b, method.temperature, weight=mixture.weight, partner=mixture.partner)
        torch.testing.assert_close(method(a, b, mixture, sim=False).bsim, wanted)
        z_m, z_b = method.projector(method.backbone(torch.cat([a, mixture.images, b]))).chunk(3)[1:]
        wanted = nt_xent(z_m, z_b, method.temperature, weight=mixture.weight, partner=mixture.partner)
        torch.testing.assert_close(method(a, b, mixture).bsim, wanted)


def test_moco_compares_queries_with_keys_of_the_slow_encoder():
    method = build("moco")
    a, b, mixture = batch(method)
    with torch.no_grad():
        method.key_encoder[0].layer.weight.mul_(1.5)
        q, k = method.projector(method.backbone(mixture.images)), method.key_encoder(b)
        wanted = info_nce(q, k, method.queue, method.temperature, weight=mixture.weight, partner=mixture.partner)
    torch.testing.assert_close(method(a, b, mixture, sim=False).bsim.detach(), wanted)


def test_moco_queue_is_first_in_first_out_and_holds_unit_keys():
    method = build("moco", queue=20, momentum=1.0)
    seen = []
    for step in range(7):  # 7 x 8 keys into 20 places: wraps round, and not at a multiple
        a, b, _ = batch(method, seed=step)
        held = method.queue.clone()
        method(a, b).sim.backward()
        assert torch.equal(method.queue, held)  # not before the step is over
        method.after_step(0)
        seen += list(F.normalize(method.key_encoder(b), dim=1))
        held = method.queue.roll(-int(method.oldest), 0)
        wanted = torch.stack(seen[-20:])
        torch.testing.assert_close(held[20 - len(wanted) :], wanted)
    method.eval()
    method(a, b)
    method.after_step(0)
    torch.testing.assert_close(method.queue.roll(-int(method.oldest), 0), wanted)  # evaluation queues nothing


def test_a_batch_longer_than_the_queue_leaves_its_last_keys():
    method = build("moco", queue=5)
    a, b, _ = batch(method)
    keys = F.normalize(method.key_encoder(b), dim=1)
    method(a, b)
    method.after_step(0)
    torch.testing.assert_close(method.queue.roll(-int(method.oldest), 0), keys[-5:])


@pytest.mark.parametrize("name", ["byol", "simsiam"])
def test_symmetric_methods_meet_each_mixture_with_the_other_view(name):
    method = build(name).eval()
    a, b, mixture = batch(method)
    m_a, m_b = mixture.images.chunk(2, 1)
    pairing = dict(weight=mixture.weight, partner=mixture.partner)
    with torch.no_grad():

        def online(x):
            return method.predictor(method.projector(method.backbone(x)))

        def target(x):
            return method.target(x) if name == "byol" else method.projector(method.backbone(x))

        one = negative_cosine(online(m_a), target(b), **pairing)
        two = negative_cosine(online(m_b), target(a), **pairing)
        wanted = (2 + 2 * one) + (2 + 2 * two) if name == "byol" else (one + two) / 2
        torch.testing.assert_close(method(a, b, mixture, sim=False).bsim, wanted)


def test_byol_target_follows_by_the_schedule():
    method = build("byol", momentum=0.9)
    before = {k: v.clone() for k, v in method.target.state_dict().items()}
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    method.after_step(0.25)
    tau = 1 - (1 - 0.9) * (math.cos(math.pi * 0.25) + 1) / 2
    online = nn.Sequential(method.backbone, method.projector).state_dict()
    for name, now in method.target.named_parameters():
        torch.testing.assert_close(now, tau * before[name] + (1 - tau) * online[name])
    moved = method.target[0].layer.weight.clone()
    method.after_step(1.0)  # tau is 1 at the end
    assert torch.equal(method.target[0].layer.weight, moved)


def test_moving_average_copies_batch_statistics():
    slow, fast = mlp(4, 4, 4), mlp(4, 4, 4)
    fast(torch.randn(16, 4))
    moving_average(slow, fast, 0.99)
    for name, value in fast.named_buffers():
        assert torch.equal(dict(slow.named_buffers())[name], value)


def test_cosine_schedule():
    assert cosine(0.996, 1, 0) == pytest.approx(0.996) and cosine(0.996, 1, 1) == 1
    assert cosine(0.9, 1, 0.5) == pytest.approx(0.95)


@pytest.mark.parametrize("name", METHODS)
def test_imagenet_defaults_are_the_published_ones(name):
    found = METHODS[name].defaults(image_size=224, width=2048, steps=500_000, images=1_281_167)
    published = {
        "simclr": dict(optimizer="lars", lr=0.3, weight_decay=1e-6, warmup_epochs=10, temperature=0.1, hidden_dim=2048,
                       embedding_dim=128),
        "moco": dict(optimizer="sgd", lr=0.03, weight_decay=1e-4, warmup_epochs=0, temperature=0.2, momentum=0.999,
                     queue=65536, hidden_dim=2048, embedding_dim=128),
        "byol": dict(optimizer="lars", lr=0.2, weight_decay=1.5e-6, warmup_epochs=10, momentum=0.996, hidden_dim=4096,
                     embedding_dim=256),
        "mocov3": dict(optimizer="lars", lr=0.3, weight_decay=1e-6, warmup_epochs=10, temperature=1.0, momentum=0.99,
                       hidden_dim=4096, embedding_dim=256),
        "simsiam": dict(optimizer="sgd", lr=0.05, weight_decay=1e-4, warmup_epochs=0, hidden_dim=2048,
                        embedding_dim=2048, predictor_dim=512),
    }  # fmt: skip
    assert found == published[name]


def test_byol_views_differ_as_published():
    one, two = METHODS["byol"].views(224)
    assert (one.blur, one.solarize, two.blur, two.solarize) == (1.0, 0.0, 0.1, 0.2)
    for recipe in METHODS["byol"].views(32):
        assert recipe.blur == 0


@pytest.mark.parametrize("size, first, kept", [(32, (3, 3), 32), (64, (3, 3), 64), (96, (7, 7), 24)])
def test_small_images_keep_their_resolution(size, first, kept):
    network = backbone("resnet18", size)
    assert network.conv1.kernel_size == first and network.num_features == 512
    seen = {}
    network.layer1.register_forward_hook(lambda module, args, out: seen.update(side=out.shape[-1]))
    assert network.eval()(torch.zeros(1, 3, size, size)).shape == (1, 512)
    assert seen["side"] == kept


def test_tiny_network_and_transformers():
    tiny = backbone("resnet_tiny", 32)
    assert 0.6e6 < sum(p.numel() for p in tiny.parameters()) < 0.8e6
    assert backbone("vit_tiny_patch16_224", 32)(torch.zeros(2, 3, 32, 32)).shape == (2, 192)


def test_files_are_as_short_as_the_design_asks():
    from pathlib import Path

    for name, module in METHODS.items():
        assert 40 <= len(Path(module.__file__).read_text().splitlines()) <= 90, name


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_compiles_without_a_graph_break(name, monkeypatch):
    monkeypatch.setattr("bsim.WHOLE", 0)  # the losses by tiles, which are the harder ones
    torch._dynamo.reset()
    heads = {k: v for k, v in METHODS[name].defaults(**SCALE).items() if k not in LOOP}
    method = METHODS[name].Method(backbone("resnet_tiny", 16), **heads)
    compiled = torch.compile(method, fullgraph=True, backend="aot_eager")
    found = []
    for model in (method, compiled):
        torch.manual_seed(0)
        a, b = torch.randn(2, 8, 3, 16, 16)
        views = torch.cat([a, b], 1) if method.both_views else a
        losses = model(a, b, sample_mixture(views, generator=torch.Generator().manual_seed(1)), True)
        method.zero_grad()
        (losses.sim + losses.bsim).backward()
        found.append([losses.sim, losses.bsim, *(p.grad for p in method.parameters() if p.grad is not None)])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_mocov3_is_the_papers_loss_of_each_mixture():
    """By loops over the candidates: the keys of the other view; a mixture is similar to two of them by its share."""
    method = build("mocov3").eval()
    a, b, mixture = batch(method)
    t = method.temperature

    def query(x):
        return F.normalize(method.predictor(method.projector(method.backbone(x))), dim=1)

    def wanted(queries, keys, weight, partner):
        total = 0.0
        for n in range(N):
            scores = [float(queries[n] @ key) / t for key in keys]
            log_sum = math.log(sum(math.exp(score) for score in scores))
            for share, key in ((float(weight[n]), n), (1 - float(weight[n]), int(partner[n]))):
                total += share * (log_sum - scores[key]) / N
        return 2 * t * total

    with torch.no_grad():
        method.key_encoder[0].layer.weight.mul_(1.5)
        k_a, k_b = (F.normalize(method.key_encoder(x), dim=1) for x in (a, b))
        m_a, m_b = mixture.images.chunk(2, 1)
        pairing = mixture.weight, mixture.partner
        bsim = wanted(query(m_a), k_b, *pairing) + wanted(query(m_b), k_a, *pairing)
        whole = torch.ones(N), mixture.partner
        sim = wanted(query(a), k_b, *whole) + wanted(query(b), k_a, *whole)
        found = method(a, b, mixture)
    assert float(found.bsim) == pytest.approx(bsim, rel=1e-5) and float(found.sim) == pytest.approx(sim, rel=1e-5)


def test_mocov3_fixes_the_patches_of_a_vit_and_takes_the_papers_values():
    torch.manual_seed(0)
    network = backbone("test_vit", 160)
    published = method_defaults(METHODS["mocov3"], network, image_size=224, width=384, steps=100_000, images=1_281_167)
    wanted = dict(optimizer="adamw", lr=1.5e-4, weight_decay=0.1, warmup_epochs=40.0, temperature=0.2, momentum=0.99)
    assert {k: published[k] for k in wanted} == wanted
    of_resnet = method_defaults(METHODS["mocov3"], None, image_size=224, width=2048, steps=100_000, images=1_281_167)
    assert (of_resnet["optimizer"], of_resnet["temperature"]) == ("lars", 1.0)
    heads = {k: v for k, v in published.items() if k not in LOOP} | {"hidden_dim": 32}
    method = METHODS["mocov3"].Method(network, **heads)
    assert not network.patch_embed.proj.weight.requires_grad and network.pos_embed.requires_grad
    images = torch.randn(2, 4, 3, 160, 160)
    method(*images).sim.backward()
    assert network.patch_embed.proj.weight.grad is None and network.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0
    linear = (
        [m for m in method.projector if isinstance(m, nn.Linear)],
        [m for m in method.predictor if isinstance(m, nn.Linear)],
    )
    assert [len(x) for x in linear] == [3, 2]  # section 3
    assert not method.projector[-1].affine and not method.predictor[-1].affine


@pytest.mark.parametrize(
    "name, size, patch",
    [("test_vit", 32, 4), ("test_vit", 64, 8), ("test_vit", 28, 4), ("test_vit", 160, 16), ("resnet18", 32, None)],
)
def test_a_vit_of_small_images_has_small_patches(name, size, patch):
    network = backbone(name, size)
    found = network.patch_embed.proj.kernel_size[0] if patch else None
    assert found == patch
    if size % 16:
        return
    again = backbone(name, size, {k: v.shape for k, v in backbone(name, 160).state_dict().items()})
    assert again.state_dict().keys() == network.state_dict().keys()
    if patch:  # weights keep their own
        assert again.patch_embed.proj.kernel_size == (16, 16)


def test_patches_that_leave_pixels_out_are_refused():
    with pytest.raises(ValueError, match="its patches have 16 pixels, so want 96 or 112"):
        backbone("test_vit", 100)
