"""AdamW against fp64 over several steps, dtypes, sizes, levels and layouts; the clip, masters, stochastic rounding."""

import math
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from herdkern.ops import AdamwSettings, adamw_reference, adamw_step, grad_norm
from herdkern.ops.adamw import _philox, round_at_random
from herdkern.ops.backend import active_isa, available_isas, forced_isa

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [pytest.param(d, id=str(d)[6:]) for d in (FP32, BF16, FP16)]
SETTINGS = {
    "default": AdamwSettings(),
    "training": AdamwSettings(lr=3e-3, beta2=0.95, weight_decay=0.1),
    "low-betas": AdamwSettings(lr=0.1, beta1=0.3, beta2=0.0, eps=1e-3, weight_decay=0.0),
    "maximize": AdamwSettings(lr=0.01, maximize=True),
}


class Problem:
    """Tensors of some shapes and their state; every step draws gradients from its own number."""

    def __init__(self, shapes, dtype=FP32, grad_dtype=None, masters=False, scale=1.0):
        draw = torch.Generator().manual_seed(7)
        self.params = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
        self.grad_dtype, self.scale, self.done = grad_dtype or dtype, scale, 0
        self.moments = [[torch.zeros_like(p, dtype=FP32) for p in self.params] for _ in range(2)]
        self.steps = [torch.zeros(()) for _ in self.params]
        self.masters = [p.float() for p in self.params] if masters else [None] * len(self.params)

    def grads(self):
        draw = torch.Generator().manual_seed(self.done)
        return [(self.scale * torch.randn(p.shape, generator=draw)).to(self.grad_dtype) for p in self.params]

    def run(self, num_steps, settings, function=adamw_step, **options):
        settings = settings if isinstance(settings, list) else [settings] * len(self.params)
        norm = None
        for _ in range(num_steps):
            state = (*self.moments, self.steps)
            norm = function(self.params, self.grads(), *state, settings, masters=self.masters, **options)
            self.done += 1
        return norm

    def tensors(self):
        masters = [x for x in self.masters if x is not None]
        return [*self.params, *self.moments[0], *self.moments[1], *self.steps, *masters]

    def widened(self):
        """The same problem in fp64; the gradients are the rounded ones."""
        wide = Problem([])
        wide.params = [(p if m is None else m).double() for p, m in zip(self.params, self.masters)]
        wide.moments = [[m.double() for m in some] for some in self.moments]
        wide.steps, wide.masters = [s.clone() for s in self.steps], [None] * len(self.params)
        wide.grads, wide.done, wide.scale, wide.grad_dtype = Problem.grads.__get__(wide), 0, self.scale, self.grad_dtype
        return wide


def within_bound(got, ref, gold):
    error, plain = ((x.double() - gold).abs().max().item() if gold.numel() else 0.0 for x in (got, ref))
    scale = max(1.0, gold.abs().max().item()) if gold.numel() else 1.0
    return error <= 2 * plain + 4 * torch.finfo(FP32).eps * scale


SHAPES = [(1,), (63,), (123, 5), (0,), (16, 16), (2**15 + 17,)]


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_fp64_over_steps(isa, dtype, masters, settings):
    """Masters and moments, or fp32 parameters; a 16-bit parameter without a master is compared after one step."""
    if dtype == FP32 and masters:
        pytest.skip("fp32 parameters are their own masters")
    num_steps = 5 if masters or dtype == FP32 else 1
    got, ref = (Problem(SHAPES, dtype, masters=masters) for _ in range(2))
    gold = got.widened()
    with forced_isa(isa):
        got.run(num_steps, SETTINGS[settings], max_grad_norm=3.0)
    for problem in (ref, gold):
        problem.run(num_steps, SETTINGS[settings], max_grad_norm=3.0, backend="reference")
    columns = [(problem.masters if masters else problem.params) for problem in (got, ref)]
    for a, b, c in zip(*columns, gold.params):
        assert within_bound(a, b, c)
    for kind in range(2):
        for a, b, c in zip(got.moments[kind], ref.moments[kind], gold.moments[kind]):
            assert within_bound(a, b, c)
    if masters:
        assert all(torch.equal(p, m.to(dtype)) for p, m in zip(got.params, got.masters))
    assert [float(step) for step in got.steps] == [num_steps] * len(SHAPES)


@pytest.mark.parametrize("settings", SETTINGS)
def test_has_the_bits_of_torchs_fused_formula(settings):
    """In whole vectors; torch's own remainder of a tensor has no fused multiply-add."""
    if active_isa() == "baseline" or torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("needs fused multiply-add on both sides")
    s, problem = SETTINGS[settings], Problem([(64, 256), (2**16,)])
    params = [torch.nn.Parameter(p.clone()) for p in problem.params]
    betas = s.beta1, s.beta2
    theirs = torch.optim.AdamW(
        params, lr=s.lr, betas=betas, eps=s.eps, weight_decay=s.weight_decay, maximize=s.maximize, fused=True
    )
    for _ in range(4):
        for p, g in zip(params, problem.grads()):
            p.grad = g
        theirs.step()
        problem.run(1, s)
        for p, mine in zip(params, problem.params):
            assert torch.equal(p.detach(), mine)
    for p, m, v in zip(params, *problem.moments):
        assert torch.equal(theirs.state[p]["exp_avg"], m)
        assert torch.equal(theirs.state[p]["exp_avg_sq"], v)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kind", ["fp32", "masters", "stochastic"])
def test_same_bits_for_any_number_of_threads(with_threads, isa, kind):
    results = []
    for num_threads in (1, 2, 3, 7):
        with_threads(num_threads)
        problem = Problem([(300_001,), (5, 7), (70_000,)], FP32 if kind == "fp32" else BF16, masters=kind == "masters")
        with forced_isa(isa):
            norm = problem.run(3, AdamwSettings(), max_grad_norm=1.0, seed=3 if kind == "stochastic" else None)
        results.append([torch.tensor(norm), *problem.tensors()])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(isa, dtype):
    grads = [torch.randn(shape).to(dtype) for shape in [(100_003,), (), (0,), (3, 5), (40, 30)]]
    grads[-1] = grads[-1].t()
    expected = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    with forced_isa(isa):
        assert grad_norm(grads) == pytest.approx(expected, rel=1e-14)
    assert grad_norm(grads, backend="reference") == pytest.approx(expected, rel=1e-14)
    assert grad_norm([]) == 0.0
    assert grad_norm([torch.full((4,), 1e30)]) == pytest.approx(2e30)  # squares beyond fp32


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_clip_is_that_of_torch(scale, backend):
    got, plain = (Problem([(40, 30), (17,)], scale=scale) for _ in range(2))
    grads = plain.grads()
    leaves = [torch.nn.Parameter(p.clone()) for p in plain.params]
    for leaf, g in zip(leaves, grads):
        leaf.grad = g.clone()
    expected = torch.nn.utils.clip_grad_norm_(leaves, 1.0)
    plain.grads = lambda: [leaf.grad for leaf in leaves]
    norm = got.run(1, AdamwSettings(), max_grad_norm=1.0, backend=backend)
    plain.run(1, AdamwSettings(), backend=backend)
    assert norm == pytest.approx(float(expected), rel=1e-6)
    for a, b in zip(got.tensors(), plain.tensors()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    before = [g.clone() for g in grads]
    assert all(torch.equal(a, b) for a, b in zip(got.grads.__self__.params, got.params))
    assert all(torch.equal(a, b) for a, b in zip(before, grads))  # gradients are read alone


def test_norm_alone():
    got, plain = Problem([(40,)], scale=100.0), Problem([(40,)], scale=100.0)
    assert got.run(1, AdamwSettings(), max_grad_norm=math.inf) == pytest.approx(grad_norm(plain.grads()))
    assert plain.run(1, AdamwSettings()) is None
    assert all(torch.equal(a, b) for a, b in zip(got.tensors(), plain.tensors()))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_changes_when_the_norm_is_not_finite(dtype, bad, backend):
    problem = Problem([(50,), (70_000,)], dtype, masters=dtype != FP32)
    problem.run(2, AdamwSettings(), max_grad_norm=1.0)
    before, grads = [x.clone() for x in problem.tensors()], problem.grads()
    grads[1][69_999] = bad
    problem.grads = lambda: grads
    norm = problem.run(1, AdamwSettings(), max_grad_norm=1.0, backend=backend)
    assert not math.isfinite(norm)
    assert all(torch.equal(a, b) for a, b in zip(problem.tensors(), before))


def test_tensors_have_settings_and_counts_of_their_own():
    shapes, settings = [(33,), (44,), (55,)], [*SETTINGS.values()][:3]
    together, apart = Problem(shapes), Problem(shapes)
    together.steps[1].fill_(10)
    apart.steps[1].fill_(10)
    together.run(2, settings)
    for _ in range(2):
        grads = apart.grads()
        for i in range(3):
            lists = ([x[i]] for x in (apart.params, grads, *apart.moments, apart.steps, settings))
            adamw_step(*lists)
        apart.done += 1
    assert all(torch.equal(a, b) for a, b in zip(together.tensors(), apart.tensors()))


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_another_dtype(dtype, grad_dtype):
    got, wide = Problem([(777,)], dtype, grad_dtype), Problem([(777,)], dtype, grad_dtype)
    plain = wide.grads
    wide.grads = lambda: [g.float() for g in plain()]
    for problem in (got, wide):
        problem.run(2, AdamwSettings())
    assert all(torch.equal(a, b) for a, b in zip(got.tensors(), wide.tensors()))


LAYOUTS = {
    "transposed": lambda x: x.t(),
    "slice": lambda x: x[:, 3:20],
    "step": lambda x: x[::2],
    "row": lambda x: x[3],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["param", "grad", "moments", "all"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_layouts(dtype, which, layout):
    draw, shape = LAYOUTS[layout], (24, 30)
    bases = [torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.rand(shape), torch.rand(shape)]
    strided = {"param": (0,), "grad": (1,), "moments": (2, 3), "all": (0, 1, 2, 3)}[which]
    tensors = [draw(base) if i in strided else draw(base).contiguous() for i, base in enumerate(bases)]
    dense, outside = [x.clone(memory_format=torch.contiguous_format) for x in tensors], [b.clone() for b in bases]
    for some in (tensors, dense):
        adamw_step(*([x] for x in some), [torch.zeros(())], [AdamwSettings()], max_grad_norm=1.0)
    assert all(torch.equal(a, b) for a, b in zip(tensors, dense))
    for i in strided:
        draw(outside[i]).copy_(tensors[i])
        assert torch.equal(outside[i], bases[i])  # nothing beside the view was written


def test_philox_gives_the_published_words():
    """Known answers of Random123."""
    zeros, ones = ([torch.tensor([value])] * 4 for value in (0, 0xFFFFFFFF))
    assert [int(w) for w in _philox(zeros, 0)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(w) for w in _philox(ones, 2**64 - 1)] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("isa", available_isas())
def test_random_bits_are_those_of_the_reference(isa):
    """Without decay and step size the update is the rounding alone: weights that fp32 gradients leave as they are."""
    problem = Problem([(3,), (128,), (70_001,)], BF16)
    frozen = AdamwSettings(lr=1e-2, weight_decay=0.5)
    twin = Problem([(3,), (128,), (70_001,)], BF16)
    with forced_isa(isa):
        problem.run(1, frozen, seed=2**40 + 9, streams=[4, 5, 2**32 - 1])
    for i, (p, g) in enumerate(zip(twin.params, twin.grads())):
        wide = p.float()
        adamw_step([wide], [g.float()], [torch.zeros_like(wide)], [torch.zeros_like(wide)], [torch.zeros(())], [frozen])
        with forced_isa(isa):  # the same fp32 value, then the rounding of the reference
            exact = p.float()
            moments = [torch.zeros_like(exact), torch.zeros_like(exact)]
            adamw_step([exact], [g.float()], *([m] for m in moments), [torch.zeros(())], [frozen])
        assert torch.equal(problem.params[i], round_at_random(exact, 2**40 + 9, 1, [4, 5, 2**32 - 1][i]))


@pytest.mark.parametrize("value", [1.0 + 2**-9, -3.0 - 2**-8, 1e-3, 2.0**-130, 65504.0])
def test_rounding_is_right_in_the_mean(value):
    x, count = torch.tensor(value), 200_000
    low, high = x.clone(), x.clone()
    bits = x.view(torch.int32)
    low, high = (((bits >> 16) + up << 16).view(FP32).double() for up in (0, 1))
    share = (x.double() - low) / (high - low)
    rounded = round_at_random(torch.full((count,), value), 1, 1, 0).double()
    assert set(rounded.tolist()) <= {float(low), float(high)}
    deviation = math.sqrt(float(share * (1 - share)) / count)
    assert abs(float((rounded == high).double().mean() - share)) < 4 * deviation + 1e-12


def test_rounding_keeps_what_is_exact_or_not_finite():
    x = torch.tensor([1.0, -0.0, math.inf, -math.inf, 3.0e38, math.nan])
    for seed in range(5):
        got = round_at_random(x, seed, 1, 0)
        assert got[:4].tolist() == x[:4].tolist()
        assert got[5].isnan()


def test_small_updates_are_not_lost_in_bf16():
    """200 updates of 1e-5 on weights of 1: nearest rounding loses all, random rounding none in the mean."""

    def moved(seed):
        problem = Problem([(20_000,)], BF16)
        problem.params[0].fill_(1.0)
        problem.grads = lambda: [torch.ones(20_000, dtype=BF16)]
        problem.run(200, AdamwSettings(lr=1e-5, weight_decay=0.0), seed=seed)
        return 1 - problem.params[0].double().mean().item()

    assert moved(None) == 0.0
    assert moved(5) == pytest.approx(2e-3, rel=0.05)
    assert moved(5) == moved(5) != moved(6)


def test_versions_are_counted():
    problem = Problem([(5,)])
    before = [x._version for x in problem.tensors()]
    problem.run(1, AdamwSettings())
    assert all(x._version > old for x, old in zip(problem.tensors(), before))


def errors():
    p = torch.zeros(3, 2)
    moment, step, s = torch.zeros(3, 2), torch.zeros(()), AdamwSettings()
    good = {"grads": p, "exp_avgs": moment, "exp_avg_sqs": moment, "steps": step, "settings": s}
    return {
        "shape": (good | {"grads": p[:2]}, "grads must have shape (3, 2) as params, got (2, 2) at index 0"),
        "moment-dtype": (good | {"exp_avgs": moment.to(BF16)}, "exp_avgs must be float32, got bfloat16 at index 0"),
        "device": (good | {"exp_avg_sqs": moment.to("meta")}, "exp_avg_sqs must be on cpu as params, got meta"),
        "sparse": (good | {"grads": p.to_sparse()}, "grads must be dense, got sparse_coo at index 0; use sparse=False"),
        "complex": (good | {"grads": p.cfloat()}, "grads must be real, got complex64 at index 0; give torch.view_as_"),
        "step": (good | {"steps": step.double()}, "steps must be one float32 number on the CPU, got () float64 on cpu"),
    }


@pytest.mark.parametrize("case", errors())
def test_errors(case):
    arguments, message = errors()[case]
    with pytest.raises(ValueError, match=re.escape(f"adamw_step: {message}")):
        adamw_step([torch.zeros(3, 2)], *([x] for x in arguments.values()))


def test_tensors_of_one_memory_are_refused():
    """Threads would update them at the same time."""
    p = torch.zeros(6)
    params, grads, settings = [p, torch.zeros(6), p.view(2, 3)], [torch.ones(6)] * 2, [AdamwSettings()] * 3
    moments = [[torch.zeros_like(x) for x in params] for _ in range(2)]
    steps = [torch.zeros(()) for _ in params]
    with pytest.raises(
        ValueError, match="adamw_step: params must not share memory, got one address at indices 0 and 2"
    ):
        adamw_step(params, [*grads, torch.ones(2, 3)], *moments, steps, settings)
    assert not p.any()
    empty = [[torch.zeros(0), torch.zeros(0)] for _ in range(4)]
    adamw_step(*empty, steps[:2], settings[:2])


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_tensors_without_memory_never_reach_the_kernel(backend):
    p, step = torch.zeros(3, device="meta"), torch.zeros(())
    if backend == "native":
        with pytest.raises(NotImplementedError, match="device must be cpu, got meta"):
            adamw_step([p], [p], [p], [p], [step], [AdamwSettings()], backend=backend)
        return
    with pytest.warns(UserWarning, match="using 'reference' because native: device must be cpu, got meta"):
        adamw_step([p], [p], [p], [p], [step], [AdamwSettings()])
    assert float(step) == 1


def test_subclasses_that_only_look_like_memory_never_reach_the_kernel():
    """As the DTensors of fully_shard, whose address is null."""
    with FakeTensorMode():
        p = torch.zeros(3)
        with pytest.raises(NotImplementedError, match="tensors must be plain, got FakeTensor"):
            grad_norm([p], backend="native")


def test_lists_must_have_one_length():
    p = torch.zeros(2)
    with pytest.raises(ValueError, match="adamw_step: exp_avgs must have 1 entries as params, got 0"):
        adamw_step([p], [p], [], [p], [torch.zeros(())], [AdamwSettings()])


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"beta1": 1.0}, "beta1 must lie in"),
        ({"eps": math.nan}, "eps must be"),
    ],
)
def test_settings_are_checked(setting, text):
    with pytest.raises(ValueError, match=re.escape(f"AdamW: {text}")):
        AdamwSettings(**setting)


def test_fp64_falls_back_and_says_so():
    p = torch.randn(5, dtype=torch.float64)
    tensors = [p, torch.randn_like(p), torch.zeros_like(p), torch.zeros_like(p)]
    copies = [x.clone() for x in tensors]
    with pytest.warns(UserWarning, match="adamw_step: using 'reference' because native: dtype must be"):
        adamw_step(*([x] for x in tensors), [torch.zeros(())], [AdamwSettings()])
    adamw_reference(*copies, torch.zeros(()), AdamwSettings())
    assert torch.equal(p, copies[0])
