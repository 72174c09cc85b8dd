"""The losses against recorded figures, against their definitions written as loops, and against their invariances."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsim import info_nce, negative_cosine, nt_xent

SHARES = [0.37, 0.74, 0.11, 0.48, 0.85, 0.22, 0.59, 0.96]
# SIM values of nt_xent and negative_cosine: lightly 1.6.0; the others a float64 evaluation of the definitions.
GOLDEN = [
    dict(
        n=4,
        d=8,
        temperature=0.5,
        partner=[1, 0, 3, 2],
        nt_xent_sim=0.93270696,
        nt_xent_bsim=1.72298421,
        nt_xent_bsim_negatives=2.18316928,
        info_nce_sim=0.85816412,
        info_nce_bsim=1.44723437,
        info_nce_sim_in_batch=1.1554597,
        info_nce_bsim_in_batch=1.98494331,
        negative_cosine_sim=-0.64722123,
        negative_cosine_bsim=-0.23247943,
    ),
    dict(
        n=6,
        d=16,
        temperature=0.1,
        partner=[5, 4, 3, 2, 1, 0],
        nt_xent_sim=0.26318492,
        nt_xent_bsim=3.14759536,
        nt_xent_bsim_negatives=4.46539981,
        info_nce_sim=0.54011668,
        info_nce_bsim=2.15541339,
        info_nce_sim_in_batch=0.58129225,
        info_nce_bsim_in_batch=3.45875782,
        negative_cosine_sim=-0.50770059,
        negative_cosine_bsim=-0.21995403,
    ),
    dict(
        n=8,
        d=32,
        temperature=0.2,
        partner=[1, 4, 7, 2, 5, 0, 3, 6],
        nt_xent_sim=1.10570305,
        nt_xent_bsim=2.2348685,
        nt_xent_bsim_negatives=2.92537208,
        info_nce_sim=0.89768478,
        info_nce_bsim=1.73392184,
        info_nce_sim_in_batch=1.15901307,
        info_nce_bsim_in_batch=2.30927278,
        negative_cosine_sim=-0.46217158,
        negative_cosine_bsim=-0.23211963,
    ),
]


def embeddings(n, d, phase):
    """Row i, column j from 0: sin(0.7 (i+1)(j+1) + phase) + 0.3 cos(1.3 (i+1) - 0.9 (j+1) + 2 phase)."""
    i, j = torch.arange(1, n + 1, dtype=torch.float64)[:, None], torch.arange(1, d + 1, dtype=torch.float64)
    return torch.sin(0.7 * i * j + phase) + 0.3 * torch.cos(1.3 * i - 0.9 * j + 2 * phase)


def all_losses(a, b, negatives, temperature, weight, partner):
    pairing = dict(weight=weight, partner=partner)
    return dict(
        nt_xent_sim=nt_xent(a, b, temperature),
        nt_xent_bsim=nt_xent(a, b, temperature, **pairing),
        nt_xent_bsim_negatives=nt_xent(a, b, temperature, **pairing, negatives=negatives),
        info_nce_sim=info_nce(a, b, negatives, temperature),
        info_nce_bsim=info_nce(a, b, negatives, temperature, **pairing),
        info_nce_sim_in_batch=info_nce(a, b, negatives, temperature, in_batch=True),
        info_nce_bsim_in_batch=info_nce(a, b, negatives, temperature, **pairing, in_batch=True),
        negative_cosine_sim=negative_cosine(a, b),
        negative_cosine_bsim=negative_cosine(a, b, **pairing),
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"n{case['n']}")
def test_recorded_values(case, dtype, tolerance):
    n, d = case["n"], case["d"]
    inputs = [embeddings(n, d, 0), embeddings(n, d, 1), embeddings(5, d, 2)]
    weight, partner = torch.tensor(SHARES[:n], dtype=dtype), torch.tensor(case["partner"])
    found = all_losses(*(x.to(dtype) for x in inputs), case["temperature"], weight, partner)
    for name, value in found.items():
        assert value.dtype == dtype and value.shape == ()
        assert float(value) == pytest.approx(case[name], abs=tolerance), name


# The definitions of DESIGN.md's table, term by term, on lists of floats.


def cosine(x, y):
    dot = sum(p * q for p, q in zip(x, y))
    return dot / math.sqrt(sum(p * p for p in x)) / math.sqrt(sum(q * q for q in y))


def loop_nt_xent(a, b, t, w, p, negatives):
    n, rows = len(a), a + b
    total = 0.0
    for i in range(2 * n):
        targets = {}
        if i < n:
            targets[n + i] = targets.get(n + i, 0) + w[i]
            targets[n + p[i]] = targets.get(n + p[i], 0) + 1 - w[i]
        else:
            j = i - n
            q = p.index(j)
            targets[j] = targets.get(j, 0) + w[j]
            targets[q] = targets.get(q, 0) + 1 - w[q]
        norm = sum(targets.values())
        candidates = {k: cosine(rows[i], rows[k]) / t for k in range(2 * n) if k != i}
        everything = list(candidates.values()) + [cosine(rows[i], z) / t for z in negatives]
        log_sum = math.log(sum(math.exp(s) for s in everything))
        if norm > 0:
            total += sum(share / norm * (log_sum - candidates[k]) for k, share in targets.items())
    return total / (2 * n)


def loop_info_nce(a, b, t, w, p, negatives):
    def term(q, k):
        positive = math.exp(cosine(q, k) / t)
        return -math.log(positive / (positive + sum(math.exp(cosine(q, z) / t) for z in negatives)))

    n = len(a)
    return sum(w[i] * term(a[i], b[i]) + (1 - w[i]) * term(a[i], b[p[i]]) for i in range(n)) / n


def loop_info_nce_in_batch(a, b, t, w, p, negatives):
    total = 0.0
    for i, query in enumerate(a):
        log_sum = math.log(sum(math.exp(cosine(query, k) / t) for k in b + negatives))
        total += w[i] * (log_sum - cosine(query, b[i]) / t) + (1 - w[i]) * (log_sum - cosine(query, b[p[i]]) / t)
    return total / len(a)


def loop_negative_cosine(a, b, w, p):
    n = len(a)
    return -sum(w[i] * cosine(a[i], b[i]) + (1 - w[i]) * cosine(a[i], b[p[i]]) for i in range(n)) / n


@st.composite
def batches(draw):
    n, d, k = draw(st.integers(1, 7)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    a, b, negatives = (torch.randn(m, d, generator=generator, dtype=torch.float64) for m in (n, n, k))
    edge = st.floats(0, 1) | st.sampled_from([0.0, 1.0])
    weight = torch.tensor(draw(st.lists(edge, min_size=n, max_size=n)), dtype=torch.float64)
    return a, b, negatives, draw(st.floats(0.05, 3)), weight, torch.tensor(draw(st.permutations(range(n))))


@settings(max_examples=150, deadline=None)
@given(batches())
def test_definitions_term_by_term(batch):
    a, b, negatives, t, weight, partner = batch
    lists = [x.tolist() for x in batch if isinstance(x, torch.Tensor)]
    la, lb, lz, w, p = lists
    found = all_losses(*batch)
    close = dict(rel=1e-9, abs=1e-9)
    assert float(found["nt_xent_bsim"]) == pytest.approx(loop_nt_xent(la, lb, t, w, p, []), **close)
    assert float(found["nt_xent_bsim_negatives"]) == pytest.approx(loop_nt_xent(la, lb, t, w, p, lz), **close)
    assert float(found["info_nce_bsim"]) == pytest.approx(loop_info_nce(la, lb, t, w, p, lz), **close)
    in_batch = loop_info_nce_in_batch(la, lb, t, w, p, lz)
    assert float(found["info_nce_bsim_in_batch"]) == pytest.approx(in_batch, **close)
    assert float(found["negative_cosine_bsim"]) == pytest.approx(loop_negative_cosine(la, lb, w, p), **close)


@settings(max_examples=50, deadline=None)
@given(batches(), st.sampled_from([torch.float32, torch.float64]))
def test_weight_one_is_the_plain_loss_bit_for_bit(batch, dtype):
    a, b, negatives, t, weight, partner = batch
    a, b, negatives = a.to(dtype), b.to(dtype), negatives.to(dtype)
    found = all_losses(a, b, negatives, t, torch.ones_like(weight), partner)
    for name in ("nt_xent", "info_nce", "negative_cosine"):
        assert torch.equal(found[f"{name}_sim"], found[f"{name}_bsim"]), name
    assert torch.equal(nt_xent(a, b, t, negatives=negatives), found["nt_xent_bsim_negatives"])
    assert torch.equal(found["info_nce_sim_in_batch"], found["info_nce_bsim_in_batch"])


@settings(max_examples=50, deadline=None)
@given(batches())
def test_naming_the_sources_the_other_way_round_changes_nothing(batch):
    a, b, negatives, t, weight, partner = batch
    other = dict(weight=1 - weight, partner=partner.argsort())
    pairing = dict(weight=weight, partner=partner)
    for loss in (lambda b, **p: info_nce(a, b, negatives, t, **p), lambda b, **p: negative_cosine(a, b, **p)):
        torch.testing.assert_close(loss(b[partner], **other), loss(b, **pairing), rtol=1e-12, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(batches(), st.randoms(use_true_random=False))
def test_the_order_of_the_batch_changes_nothing(batch, random):
    a, b, negatives, t, weight, partner = batch
    order = torch.tensor(random.sample(range(len(a)), len(a)))
    moved = order.argsort()[partner[order]]  # the partner of each image where it stands now
    here = all_losses(a, b, negatives, t, weight, partner)
    there = all_losses(a[order], b[order], negatives.flip(0), t, weight[order], moved)
    for name in here:
        torch.testing.assert_close(there[name], here[name], rtol=1e-12, atol=1e-12)


def small_batch(dtype=torch.float64):
    a, b, negatives = (embeddings(n, 5, phase).to(dtype) for n, phase in ((4, 0), (4, 1), (3, 2)))
    return a, b, negatives, torch.tensor([0.3, 1.0, 0.0, 0.6], dtype=dtype), torch.tensor([2, 0, 3, 1])


def test_gradients_are_those_of_finite_differences():
    a, b, negatives, weight, partner = small_batch()
    for x in (a, b, negatives):
        x.requires_grad_()
    for extra in ({}, dict(weight=weight, partner=partner)):
        losses = [
            (partial(nt_xent, temperature=0.3, **extra), (a, b)),
            (lambda a, b, z, extra=extra: nt_xent(a, b, 0.3, negatives=z, **extra), (a, b, negatives)),
            (lambda a, extra=extra: info_nce(a, b, negatives, 0.3, **extra), (a,)),
            (lambda a, extra=extra: info_nce(a, b, negatives, 0.3, **extra, in_batch=True), (a,)),
            (lambda a, extra=extra: negative_cosine(a, b, **extra), (a,)),
        ]
        for loss, inputs in losses:
            assert torch.autograd.gradcheck(loss, inputs)


def test_no_gradient_reaches_keys_targets_or_queue():
    a, b, negatives, weight, partner = small_batch()
    for x in (a, b, negatives):
        x.requires_grad_()
    pairing = dict(weight=weight, partner=partner)
    loss = info_nce(a, b, negatives, **pairing) + info_nce(a, b, negatives, **pairing, in_batch=True)
    (loss + negative_cosine(a, b)).backward()
    assert a.grad.abs().sum() > 0 and b.grad is None and negatives.grad is None


def test_a_key_that_no_mixture_holds_adds_nothing():
    a, b, _, _, _ = small_batch()
    # Mixture 0 is all image 1, and mixture 1, in which image 0 is the partner, is all its own: nobody holds image 0.
    weight, partner = torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([1, 0, 2, 3])
    value = nt_xent(a.requires_grad_(), b, 0.5, weight=weight, partner=partner)
    wanted = loop_nt_xent(a.tolist(), b.tolist(), 0.5, weight.tolist(), partner.tolist(), [])
    assert float(value.detach()) == pytest.approx(wanted)
    value.backward()
    assert a.grad.isfinite().all()


def test_in_batch_alone_has_the_whole_batch_as_candidates():
    a, b, negatives, _, _ = small_batch()
    # What repels a query is the other keys and the queue: the same as a queue that holds those keys.
    each = [info_nce(a[n : n + 1], b[n : n + 1], torch.cat([b[:n], b[n + 1 :], negatives])) for n in range(4)]
    torch.testing.assert_close(info_nce(a, b, negatives, in_batch=True), sum(each) / 4)


def test_extreme_inputs_stay_finite():
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-20, 1.0, 1e4):
        a, b, z = (scale * torch.randn(64, 32, generator=generator).bfloat16() for _ in range(3))
        weight, partner = torch.rand(64, generator=generator), torch.randperm(64, generator=generator)
        a.requires_grad_()
        losses = all_losses(a, b, z, 0.01, weight, partner)
        sum(losses.values()).backward()
        assert all(value.isfinite() and value.dtype == torch.float32 for value in losses.values())
        assert a.grad.isfinite().all()
    same = torch.ones(8, 4)
    assert all(v.isfinite() for v in all_losses(same, -same, same, 0.01, torch.rand(8), torch.arange(8)).values())


def test_autocast_does_not_lower_the_precision():
    a, b, negatives, weight, partner = small_batch(torch.float32)
    plain = all_losses(a, b, negatives, 0.1, weight, partner)
    with torch.autocast("cpu", torch.bfloat16):
        cast = all_losses(a, b, negatives, 0.1, weight, partner)
    for name in plain:
        assert torch.equal(plain[name], cast[name]), name


def test_compiles_without_a_graph_break_and_to_the_same_value():
    a, b, negatives, weight, partner = small_batch(torch.float32)

    def everything(a, b, negatives, weight, partner):
        return sum(all_losses(a, b, negatives, 0.3, weight, partner).values())

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    inputs = (a, b, negatives, weight, partner)
    torch.testing.assert_close(compiled(*inputs), everything(*inputs))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, z, w, p: nt_xent(x, x[:3]), r"b: got shape \[3, 5\], want \[4, 5\] as a has"),
        (lambda x, z, w, p: nt_xent(x[0], x), r"a: got torch.float64 of shape \[5\], want a float tensor .* \[N, D\]"),
        (lambda x, z, w, p: nt_xent(x.long(), x), r"a: got torch.int64"),
        (lambda x, z, w, p: nt_xent(x, x, 0.0), r"temperature: got 0.0, want a number above 0"),
        (lambda x, z, w, p: nt_xent(x, x, negatives=z[:, :4]), r"negatives: got shape \[3, 4\], want \[K, 5\]"),
        (lambda x, z, w, p: info_nce(x, x, z[0]), r"negatives: got shape \[5\], want \[K, 5\]"),
        (lambda x, z, w, p: info_nce(x, x, z, -1), r"temperature: got -1"),
        (lambda x, z, w, p: negative_cosine(x, x, weight=w), r"partner: got None beside a weight"),
        (lambda x, z, w, p: negative_cosine(x, x, partner=p), r"weight: got None beside a partner"),
        (lambda x, z, w, p: nt_xent(x, x, weight=w[:3], partner=p), r"weight: got .* \[3\], want .* \[4\]"),
        (lambda x, z, w, p: nt_xent(x, x, weight=w + 0.5, partner=p), r"weight: got values from 0.5 to 1.5"),
        (lambda x, z, w, p: info_nce(x, x, z, weight=w, partner=p.int()), r"partner: got torch.int32"),
        (lambda x, z, w, p: info_nce(x, x, z, weight=w, partner=p * 0), r"partner: got .* a permutation of range\(4\)"),
    ],
)
def test_refusals_name_the_argument_and_what_it_wants(call, message):
    a, _, negatives, weight, partner = small_batch()
    with pytest.raises(ValueError, match=message):
        call(a, negatives, weight, partner)


@pytest.mark.parametrize("value", [0.0, -0.5, math.inf, math.nan])
def test_a_tensor_is_a_temperature_above_0(value):
    z, negatives = torch.eye(3), torch.eye(3)
    for loss in (
        lambda t: nt_xent(z, z, t),
        lambda t: info_nce(z, z, negatives, t),
    ):
        with pytest.raises(ValueError, match="temperature: got .* want numbers above 0"):
            loss(torch.tensor(value))
        loss(torch.tensor(0.3, requires_grad=True)).backward()
