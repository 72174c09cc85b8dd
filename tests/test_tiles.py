"""Losses that never hold the whole similarity matrix equal those that do: values, gradients, memory."""

import pytest
import torch

import bsim
from bsim import info_nce, nt_xent

N, D = 23, 6


def inputs(dtype=torch.float64):
    draws = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, N, D, generator=draws, dtype=torch.float64).to(dtype)
    negatives = 3 * torch.randn(31, D, generator=draws, dtype=torch.float64).to(dtype)  # not of unit length
    a, b = a.requires_grad_(), b.requires_grad_()
    weight, partner = torch.rand(N, generator=draws), torch.randperm(N, generator=draws)
    return a, b, negatives, dict(weight=weight, partner=partner)


def cases():
    for mixed in (False, True):
        for temperature in (0.05, 0.5):
            yield "nt_xent", mixed, temperature, None
            yield "nt_xent", mixed, temperature, "kept"  # negatives that want a gradient
            yield "nt_xent", mixed, temperature, "held"
            yield "info_nce", mixed, temperature, "held"
            yield "info_nce in_batch", mixed, temperature, "held"


def value_and_gradients(kind, mixed, temperature, negatives_are, dtype=torch.float64):
    a, b, negatives, mixture = inputs(dtype)
    negatives.requires_grad_(negatives_are == "kept")
    options = mixture if mixed else {}
    if kind == "nt_xent":
        loss = nt_xent(a, b, temperature, negatives=negatives if negatives_are else None, **options)
    else:
        loss = info_nce(a, b, negatives, temperature, **options, in_batch="in_batch" in kind)
    (3 * loss).backward()
    return [loss.detach(), *(x.grad for x in (a, b, negatives) if x.grad is not None)]


@pytest.mark.parametrize("tile", [1, 5, 64])
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_tiles_give_the_value_and_the_gradients_of_the_whole(monkeypatch, case, tile):
    whole = value_and_gradients(*case)
    monkeypatch.setattr(bsim, "WHOLE", 0)
    monkeypatch.setattr(bsim, "TILE", tile)
    for one, two in zip(whole, value_and_gradients(*case), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-11, atol=1e-12)
    for one, two in zip(whole, value_and_gradients(*case, dtype=torch.float32), strict=True):
        torch.testing.assert_close(two.double(), one, rtol=2e-4, atol=2e-5)


def test_large_losses_take_tiles_and_are_the_small_ones(monkeypatch):
    draws = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 700, 16, generator=draws)
    used = []
    apply = bsim._SelfSpread.apply
    monkeypatch.setattr(bsim._SelfSpread, "apply", lambda *args: used.append(1) or apply(*args))
    tiled = nt_xent(a, b, 0.2)
    monkeypatch.setattr(bsim, "WHOLE", 1 << 30)
    torch.testing.assert_close(tiled, nt_xent(a, b, 0.2), rtol=1e-5, atol=1e-6)
    assert used == [1]


@pytest.mark.parametrize("temperature", [0.01, torch.tensor(0.2, requires_grad=True)])
def test_a_temperature_that_tiles_cannot_take_is_taken_whole(monkeypatch, temperature):
    """e^(-2 / 0.01) is no float32; a learnt temperature wants its gradient."""
    monkeypatch.setattr(bsim, "WHOLE", 0)
    a = torch.eye(4, 8).repeat(5, 1).requires_grad_()
    loss = nt_xent(a, -a.detach(), temperature)
    loss.backward()
    assert loss.isfinite() and a.grad.isfinite().all()
    if isinstance(temperature, torch.Tensor):
        assert temperature.grad.abs() > 0.1


def test_opposite_and_equal_rows_stay_finite(monkeypatch):
    monkeypatch.setattr(bsim, "WHOLE", 0)
    x = torch.tensor([[1.0, 0.0]]).repeat(6, 1)
    for a, b in ((x, x), (x, -x), (x, torch.zeros(6, 2))):
        a = a.clone().requires_grad_()
        loss = nt_xent(a, b, 0.03)
        loss.backward()
        assert loss.isfinite() and a.grad.isfinite().all()


def saved_numbers(function):
    """Of all tensors that autograd keeps for backward, the numbers in storages of their own."""
    seen = {}

    def pack(x):
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return sum(seen.values()) / 4


def test_memory_grows_with_n_and_the_queue_is_not_copied():
    a, b = torch.randn(2, 2048, 32).requires_grad_()
    for options in (dict(), dict(weight=torch.rand(2048), partner=torch.randperm(2048))):
        assert saved_numbers(lambda options=options: nt_xent(a, b, 0.2, **options)) < 16 * a.numel()  # 4096^2 is 256 x
    queue, queries = torch.randn(65536, 32), torch.randn(64, 32, requires_grad=True)
    for in_batch in (False, True):
        kept = saved_numbers(lambda x=in_batch: info_nce(queries, torch.randn(64, 32), queue, 0.2, in_batch=x))
        assert kept < queue.numel() + 16 * 64 * 32  # the queue itself, and no logits (64 x 65536 is twice the queue)


def test_tiles_compile_without_a_graph_break(monkeypatch):
    monkeypatch.setattr(bsim, "WHOLE", 0)
    monkeypatch.setattr(bsim, "TILE", 16)
    a, b, negatives, mixture = inputs(torch.float32)

    def both(a, b, negatives):
        return nt_xent(a, b, 0.3, negatives=negatives, **mixture) + info_nce(a, b, negatives, 0.3, **mixture)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b, negatives), both(a, b, negatives))
    wanted = torch.autograd.grad(both(a, b, negatives), (a, b))
    torch.testing.assert_close(torch.autograd.grad(compiled(a, b, negatives), (a, b)), wanted)


def test_a_backward_pass_under_autocast_is_as_exact(monkeypatch):
    monkeypatch.setattr(bsim, "WHOLE", 0)
    for kind in ("nt_xent", "info_nce"):
        wanted = value_and_gradients(kind, True, 0.5, "held", torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            found = value_and_gradients(kind, True, 0.5, "held", torch.float32)
        for one, other in zip(found, wanted):
            assert torch.equal(one, other)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("mixed", [False, True])
def test_second_derivatives_are_right_on_both_sides_of_the_switch(monkeypatch, mixed, whole):
    monkeypatch.setattr(bsim, "WHOLE", 1 << 18 if whole else 0)
    monkeypatch.setattr(bsim, "TILE", 3)
    a, b, negatives, mixture = inputs()
    rows = dict(weight=mixture["weight"][:5], partner=torch.tensor([2, 0, 1, 4, 3])) if mixed else {}
    a, b, negatives = a[:5].detach().requires_grad_(), b[:5].detach().requires_grad_(), negatives[:7].requires_grad_()
    fixed = negatives.detach()
    for loss, arguments in (
        (lambda a, b: nt_xent(a, b, **rows), (a, b)),
        (lambda a, b, n: nt_xent(a, b, 0.2, negatives=n, **rows), (a, b, negatives)),
        (lambda a, b: nt_xent(a, b, 0.2, negatives=fixed, **rows), (a, b)),
        (lambda a: info_nce(a, b.detach(), fixed, **rows), (a,)),
        (lambda a: info_nce(a, b.detach(), fixed, in_batch=True, **rows), (a,)),
    ):
        assert torch.autograd.gradgradcheck(loss, arguments)


def test_a_gradient_penalty_is_right_where_tiles_are_used():
    """600 pairs, as they are: the derivative of the squared gradient against finite differences in float64."""
    draws = torch.Generator().manual_seed(3)
    a, b, way = torch.randn(3, 600, 8, generator=draws, dtype=torch.float64)

    def penalty(step):
        x = (a + step * way).requires_grad_()
        (gradient,) = torch.autograd.grad(nt_xent(x, b), x, create_graph=True)
        return (600 * gradient).square().sum(), x

    value, x = penalty(0.0)
    (found,) = torch.autograd.grad(value, x)
    difference = (penalty(1e-5)[0] - penalty(-1e-5)[0]) / 2e-5
    torch.testing.assert_close((found * way).sum(), difference.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("whole", [True, False])
def test_torch_func_takes_gradients_and_batches(monkeypatch, whole):
    monkeypatch.setattr(bsim, "WHOLE", 1 << 18 if whole else 0)
    monkeypatch.setattr(bsim, "TILE", 5)
    a, b, negatives, mixture = inputs()
    b = b.detach()
    for loss in (
        lambda a, n: nt_xent(a, b, negatives=n, **mixture),
        lambda a, n: info_nce(a, b, n, **mixture),
    ):
        many = torch.stack([a.detach(), a.detach().flip(0), 2 * a.detach().roll(1, 1)])
        alone = torch.stack([loss(one, negatives) for one in many])
        torch.testing.assert_close(torch.func.vmap(loss, (0, None))(many, negatives), alone)
        gradients = torch.func.vmap(torch.func.grad(loss), (0, None))(many, negatives)
        for one, gradient in zip(many, gradients):
            x = one.requires_grad_()
            torch.testing.assert_close(gradient, torch.autograd.grad(loss(x, negatives), x)[0])
    of_negatives = torch.func.grad(lambda n: nt_xent(a, b, negatives=n))(negatives)
    kept = negatives.clone().requires_grad_()
    torch.testing.assert_close(of_negatives, torch.autograd.grad(nt_xent(a, b, negatives=kept), kept)[0])


@pytest.mark.parametrize("whole", [True, False])
def test_negatives_of_another_precision_are_promoted(monkeypatch, whole):
    monkeypatch.setattr(bsim, "WHOLE", 1 << 18 if whole else 0)
    a, b, negatives, mixture = inputs(torch.float32)
    for loss in (
        lambda a, n: nt_xent(a, b.to(a.dtype), negatives=n, **mixture),
        lambda a, n: info_nce(a, b.to(a.dtype), n, **mixture),
    ):
        wanted = loss(a.double(), negatives.double())
        for x, n in ((a, negatives.double()), (a.double(), negatives)):
            found = loss(x, n)
            assert found.dtype == torch.float64
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
        rounded = negatives.half()
        torch.testing.assert_close(loss(a, rounded), loss(a, rounded.float()))
        loss(a, negatives.double()).backward()
        assert a.grad.dtype == torch.float32
