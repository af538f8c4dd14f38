"""PagedAdamW follows, or refuses, every change between two steps that torch's optimizers allow."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from qlora_kernels.optim import PagedAdamW
from tests.support.tolerances import Expected, assert_within, gamma, unit_roundoff

STATE_ERRORS = {
    # exp_avg + (1 - beta1) (grad - exp_avg): roundings of the second term are averaged as gradients are, and those of
    # the sum accumulate over 1 / (1 - beta1) = 10 steps. Gradients are standard normal: |grad - exp_avg| < 5, |exp_avg|
    # < 1.5.
    "exp_avg": lambda value, steps: (2 * 5 + 10 * 1.5) * unit_roundoff(torch.float32) * torch.ones_like(value),
    # A sum of squares, of which each term is rounded in four operations per step.
    "exp_avg_sq": lambda value, steps: gamma(4 * steps, torch.float32) * value,
}
"""A bound on the rounding error of a state after that many steps, for any order of operations."""

FLAGS_OF_IMPLEMENTATIONS = {"foreach", "fused", "capturable"}


@pytest.fixture(scope="module")
def torch_inputs(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs") / "inputs.pt"
    done = subprocess.run(
        [sys.executable, "-m", "tests.optim.torch_inputs", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"this torch has no inputs to offer: {done.stderr[-300:]}")
    return torch.load(path, weights_only=False)


@pytest.fixture(params=["resident", "mapped"])
def where(request, tmp_path):
    """Keyword arguments that determine where the states are stored."""
    return {"page_dir": tmp_path} if request.param == "mapped" else {}


class Pair:
    """PagedAdamW and torch's AdamW, to which the same operations are applied."""

    def __init__(self, *shapes, **arguments):
        where = {name: arguments.pop(name) for name in ("page_dir", "state_bits") if name in arguments}
        torch.manual_seed(0)
        self.params = [[nn.Parameter(value) for value in map(torch.randn, shapes)]]
        self.params.append([nn.Parameter(p.detach().clone()) for p in self.params[0]])
        self.both = [
            PagedAdamW(self.params[0], **arguments, **where),
            torch.optim.AdamW(self.params[1], **arguments),
        ]
        self.seed = 0

    def change(self, function):
        """Call function(optimizer, params) for each optimizer."""
        for optimizer, params in zip(self.both, self.params, strict=True):
            function(optimizer, params)

    def steps(self, count=3):
        for _ in range(count):
            self.seed += 1
            for optimizer, params in zip(self.both, self.params, strict=True):
                generator = torch.Generator().manual_seed(self.seed)
                for p in params:
                    p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
                optimizer.step()

    def check(self):
        """Assert that parameters and states agree within the rounding errors of both."""
        self.check_params()
        ours, theirs = (optimizer.state_dict()["state"] for optimizer in self.both)
        assert set(ours) == set(theirs)
        for key, state in theirs.items():
            for name, value in state.items():
                if name in STATE_ERRORS:
                    bound = STATE_ERRORS[name](value.double(), self.seed)
                    assert_within(ours[key][name], Expected(value.double(), 2 * bound), name)
                else:
                    assert torch.equal(ours[key][name], value), name

    def check_params(self):
        """A step rounds p twice. Its update is at most sqrt(t) rates at step t, because exp_avg**2 <= t exp_avg_sq, and
        is computed by ten operations from states whose own errors it inherits."""
        steps = self.seed
        travel = steps**1.5 * max(float(group["lr"]) for group in self.both[1].param_groups)
        update = gamma(10 + 4 * steps, torch.float32) + 25 * unit_roundoff(torch.float32)
        for a, b in zip(*self.params, strict=True):
            value = b.detach().double()
            error = gamma(2 * steps, torch.float32) * (value.abs() + travel) + update * travel
            assert_within(a, Expected(value, 2 * error), "parameter")


def test_inputs_of_torchs_adamw_tests(torch_inputs):
    for arguments in torch_inputs[0]:
        if arguments.get("amsgrad"):
            with pytest.raises(TypeError, match="amsgrad"):
                PagedAdamW([nn.Parameter(torch.ones(3))], **arguments)
            continue
        pair = Pair((5, 16), (7,), **arguments)
        pair.steps(5)
        pair.check()


@pytest.mark.filterwarnings("ignore:.*duplicate parameters")
def test_bad_inputs_of_torchs_adamw_tests(torch_inputs):
    """A parameter twice in one group is an error here, while torch warns and steps twice; `foreach` is accepted."""
    for arguments, params, error, _ in torch_inputs[1]:
        make = lambda: PagedAdamW(params or [nn.Parameter(torch.ones(1))], **arguments)  # noqa: B023, E731
        if any(isinstance(beta, torch.Tensor) for beta in arguments.get("betas", ())) and "foreach" not in arguments:
            make()
            continue
        with pytest.raises((TypeError, ValueError) if error is UserWarning or "foreach" in arguments else error):
            make()


class TestGroups:
    @pytest.mark.parametrize(
        "flags",
        [{"amsgrad": True}, {"differentiable": True}, {"capturable": True}, {"decoupled_weight_decay": False}],
        ids=str,
    )
    def test_unsupported_flags_are_refused_at_any_time(self, flags):
        (name,) = flags
        with pytest.raises(ValueError, match=f"PagedAdamW: {name} must be"):
            PagedAdamW([{"params": [nn.Parameter(torch.ones(3))], **flags}])
        pair = Pair((3,))
        pair.steps(1)
        optimizer, before = pair.both[0], pair.params[0][0].clone()
        with pytest.raises(ValueError, match=f"PagedAdamW: {name} must be"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], **flags})
        assert len(optimizer.param_groups) == 1
        optimizer.param_groups[0].update(flags)
        with pytest.raises(ValueError, match=f"PagedAdamW: {name} must be"):
            pair.steps(1)
        assert torch.equal(pair.params[0][0], before)

    def test_maximize_as_an_argument_in_a_group_and_set_later(self, where):
        pair = Pair((5, 4), maximize=True, **where)
        pair.steps()
        pair.change(lambda o, p: o.param_groups[0].update(maximize=False))
        pair.steps()
        pair.change(lambda o, p: o.param_groups[0].update(maximize=True, foreach=False))
        pair.steps()
        pair.check()

    def test_maximize_with_a_clip(self):
        a, b = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
        optimizer, reference = PagedAdamW([a], maximize=True, max_grad_norm=0.1), torch.optim.AdamW([b], maximize=True)
        a.grad, b.grad = torch.arange(8.0), torch.arange(8.0)
        optimizer.step()
        nn.utils.clip_grad_norm_([b], 0.1)
        reference.step()
        value = b.detach().double()  # the norm of 8 elements, then ten operations of a step from 1 by 0.001
        assert_within(a, Expected(value, 2 * gamma(2, torch.float32) * value.abs() + 0.002 * gamma(18, torch.float32)))

    def test_params_removed_returned_and_moved(self, where):
        pair = Pair((4096,), (7,), (3, 5), **where)
        pair.steps()
        pair.change(lambda o, p: o.param_groups[0].update(params=[p[0], p[2]]))
        pair.steps()
        pair.change(lambda o, p: o.add_param_group({"params": [p[1]], "lr": 0.1}))
        pair.steps()

        def move(optimizer, params):
            first, second = optimizer.param_groups
            second["params"].append(first["params"].pop(0))

        pair.change(move)
        pair.steps()
        pair.check()

    def test_replaced_params_are_followed(self, where):
        pair = Pair((8,), (4, 3), **where)
        pair.steps()

        def swap(optimizer, params):
            params[1] = nn.Parameter(torch.ones(2, 2))
            optimizer.state.pop(optimizer.param_groups[0]["params"][1])
            optimizer.param_groups[0]["params"][1] = params[1]

        pair.change(swap)
        pair.steps()
        pair.check()

    def test_repeated_param_is_refused(self):
        pair = Pair((3,))
        pair.both[0].param_groups[0]["params"] *= 2
        with pytest.raises(ValueError, match="occur once"):
            pair.both[0].step()

    def test_refused_group_is_not_added(self):
        optimizer = PagedAdamW([nn.Parameter(torch.ones(3))])
        for group in ({"lr": -1.0}, {"params": [nn.Parameter(torch.ones(3).double())]}):
            with pytest.raises((ValueError, TypeError)):
                optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], **group})
        assert len(optimizer.param_groups) == 1

    def test_hyperparameters_set_between_steps(self):
        pair = Pair((5, 5))
        pair.steps()
        pair.change(lambda o, p: o.param_groups[0].update(betas=(0.5, 0.7), eps=1e-4, weight_decay=0.3, lr=0.02))
        pair.steps()
        pair.check()

    def test_named_parameters(self):
        model = nn.Linear(4, 3)
        optimizer = PagedAdamW(model.named_parameters())
        assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


class TestStates:
    CHANGES = {  # noqa: RUF012
        "cleared": lambda o, p: o.state.clear(),
        "one deleted": lambda o, p: o.state.pop(p[0]),
        "replaced": lambda o, p: setattr(o, "state", {q: dict(s) for q, s in o.state.items()}),
        "copied": lambda o, p: [s.update({k: v.clone() for k, v in s.items()}) for s in o.state.values()],
        "a tensor put in": lambda o, p: o.state[p[0]].update(exp_avg=torch.full_like(p[0], 0.25)),
        "a step put in": lambda o, p: o.state[p[1]].update(step=torch.tensor(100.0)),
        "in place": lambda o, p: o.state[p[0]]["exp_avg_sq"].mul_(2),
        "step in place": lambda o, p: o.state[p[0]]["step"].fill_(50),
        "exchanged": lambda o, p: o.state.update({p[0]: o.state[p[2]], p[2]: o.state[p[0]]}),
        "emptied": lambda o, p: o.state.update({p[0]: {}}),
    }

    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    def test_edited_states_are_used(self, change, where):
        pair = Pair((5, 3), (4096,), (5, 3), **where)
        pair.steps()
        pair.change(change)
        pair.steps()
        pair.check()

    def test_edited_states_are_in_next_checkpoint(self):
        pair = Pair((5, 3), (7,))
        pair.steps()
        pair.change(TestStates.CHANGES["cleared"])
        pair.check()
        pair.change(
            lambda o, p: o.state.update(
                {p[0]: {"step": torch.tensor(2.0), "exp_avg": torch.ones(5, 3), "exp_avg_sq": torch.ones(5, 3)}}
            )
        )
        pair.check()
        pair.steps()
        pair.check()

    def test_a_users_own_entry_is_kept(self):
        pair = Pair((5, 3))
        pair.steps()
        pair.change(lambda o, p: o.state[p[0]].update(note=torch.tensor(3.0)))
        pair.steps()
        pair.check()

    def test_a_reference_to_an_empty_state_is_filled(self):
        pair = Pair((3,))
        kept = [optimizer.state[params[0]] for optimizer, params in zip(pair.both, pair.params, strict=True)]
        pair.steps(1)
        assert [set(state) for state in kept] == [{"step", "exp_avg", "exp_avg_sq"}] * 2

    def test_half_a_state_is_refused(self):
        pair = Pair((3,))
        pair.steps(1)
        del pair.both[0].state[pair.params[0][0]]["exp_avg"]
        with pytest.raises(ValueError, match="exp_avg must be given"):
            pair.both[0].step()


class TestParameters:
    @pytest.mark.parametrize("bits", [32, 8])
    def test_another_memory_format(self, bits):
        pair = Pair((64, 16, 3, 3), (7,), state_bits=bits)
        pair.steps()
        for params in pair.params:
            params[0].data = params[0].data.contiguous(memory_format=torch.channels_last)
        exp_avg = pair.both[0].state_dict()["state"][0]["exp_avg"].clone()
        pair.seed += 1
        if bits == 32:
            pair.steps()
            pair.check()
        else:  # the blocks change, and moments differ by at most one step of the code
            pair.both[0]._follow_changes()
            after = pair.both[0].state_dict()["state"][0]["exp_avg"]
            assert (after - exp_avg).abs().max() < 0.01 * exp_avg.abs().max()

    def test_another_address_and_another_dtype(self):
        pair = Pair((6, 4))
        pair.steps()
        for params in pair.params:
            params[0].data = params[0].data.clone()
        pair.steps()
        pair.check()
        ours = pair.params[0][0]
        ours.data, ours.grad = ours.data.bfloat16(), None
        pair.params[0][0].grad = torch.ones(6, 4, dtype=torch.bfloat16)
        pair.both[0].step()
        assert pair.both[0].state[ours]["exp_avg"].dtype == torch.float32

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda p: torch.zeros(6, 8)[:, :4], "must fill a block of memory"),
            (lambda p: torch.zeros(9), "must keep its shape and device"),
            (lambda p: p.data.view(-1), "must keep its shape and device"),
            (lambda p: torch.zeros(()).expand(6, 4), "must fill a block of memory"),
        ],
        ids=["column slice", "grown", "reshaped", "expanded"],
    )
    def test_unsupported_parameter_changes_refused_before_writes(self, change, message):
        pair = Pair((6, 4), (5,))
        pair.steps()
        param, other = pair.params[0]
        before = other.clone()
        param.data = change(param)
        param.grad = torch.ones_like(param)
        kept = param.detach().clone()
        with pytest.raises(ValueError, match=message):
            pair.both[0].step()
        assert torch.equal(param, kept)
        assert torch.equal(other, before)

    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("freed", ["param", "grad"])
    def test_freed_memory_refused_before_step_is_counted(self, freed, groups):
        a, b = nn.Parameter(torch.ones(300)), nn.Parameter(torch.ones(300))
        optimizer = PagedAdamW([a, b] if groups == 1 else [{"params": [a]}, {"params": [b], "lr": 0.1}])
        for _ in range(2):
            a.grad, b.grad = torch.ones(300), torch.ones(300)
            if _ == 0:
                optimizer.step()
        before = copy.deepcopy(optimizer.state_dict()["state"])
        kept = a.detach().clone()
        (b.data if freed == "param" else b.grad).untyped_storage().resize_(0)
        with pytest.raises((RuntimeError, ValueError), match="freed"):
            optimizer.step()
        assert torch.equal(a, kept)
        for key, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(value, before[key][name]) for name, value in state.items())

    def test_autograd_detects_in_place_update(self):
        pair = Pair((4, 4))
        ours = pair.params[0][0]
        y = (ours * ours).sum()
        pair.steps(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()

    def test_wrappers_and_the_meta_device(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(), pytest.raises(TypeError, match="must be plain tensors"):
            PagedAdamW([nn.Parameter(torch.ones(3))])
        layer = nn.Linear(3, 2, device="meta")
        optimizer = PagedAdamW(layer.parameters())
        for p in layer.parameters():
            p.grad = torch.zeros_like(p)
        with pytest.raises(ValueError, match="on the meta device"):
            optimizer.step()


class TestCheckpoints:
    def test_failed_load_changes_nothing(self, where):
        pair = Pair((5,), (5,), (4096,), **where)
        pair.steps()
        optimizer = pair.both[0]
        before = copy.deepcopy(optimizer.state_dict())

        def broken(change):
            saved = copy.deepcopy(before)
            for state in saved["state"].values():
                state["exp_avg"] += 1
            saved["param_groups"][0]["lr"] = 5.0
            change(saved)
            return saved

        for change in (
            lambda s: s["state"][2].update(exp_avg=torch.zeros(7)),
            lambda s: s["state"][2].pop("exp_avg_sq"),
            lambda s: s["state"][1].update(step=torch.zeros(3)),
            lambda s: s["state"][1].pop("step"),
            lambda s: s["param_groups"][0].update(amsgrad=True),
            lambda s: s["param_groups"][0].update(lr=-1.0),
            lambda s: s["param_groups"][0].update(params=[0, 1]),
        ):
            with pytest.raises(ValueError, match=r"PagedAdamW|parameter group"):
                optimizer.load_state_dict(broken(change))
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for key, state in before["state"].items():
            assert all(torch.equal(after["state"][key][name], value) for name, value in state.items())

    @pytest.mark.parametrize("bits", [32, 8])
    def test_torch_save_of_everything(self, bits, where):
        pair = Pair((70, 70), (3,), state_bits=bits, **where)
        pair.steps()
        optimizer = pair.both[0]
        for value in (optimizer, optimizer.state_dict(), optimizer.packed_state_dict(), optimizer.state):
            buffer = io.BytesIO()
            torch.save(value, buffer)
            buffer.seek(0)
            torch.load(buffer, weights_only=False)
            copy.deepcopy(value)

    @pytest.mark.parametrize("state_dict", ["state_dict", "packed_state_dict"])
    def test_saved_part_of_state_dict_has_only_its_bytes(self, state_dict, where):
        pair = Pair((500, 500), (3,), state_bits=8, **where)
        pair.steps(1)
        buffer = io.BytesIO()
        torch.save({1: getattr(pair.both[0], state_dict)()["state"][1]}, buffer)
        assert buffer.tell() < 4096

    def test_hooks_receive_torch_state_dict(self):
        pair = Pair((70, 70), state_bits=8)
        pair.steps(1)
        optimizer, seen = pair.both[0], []
        optimizer.register_state_dict_pre_hook(lambda o: seen.append("before"))
        optimizer.register_state_dict_post_hook(lambda o, s: seen.append(set(s["state"][0])))
        optimizer.register_state_dict_post_hook(lambda o, s: {**s, "note": 1})
        assert optimizer.state_dict()["note"] == 1
        assert seen[0] == "before"
        assert {"step", "exp_avg", "exp_avg_sq"} <= seen[1]

    def test_states_of_other_optimizers_load(self):
        pair = Pair((5,), (4,))
        pair.steps()
        saved = copy.deepcopy(pair.both[1].state_dict())
        for state in saved["state"].values():
            state["step"] = int(state["step"])  # the form of older versions of torch
        saved["state"]["note"] = {"of": "a user"}
        saved["param_groups"][0] = {name: saved["param_groups"][0][name] for name in ("params", "lr", "betas")}
        optimizer = PagedAdamW(pair.params[0])
        optimizer.load_state_dict(saved)
        assert optimizer.state["note"] == {"of": "a user"}
        assert optimizer.param_groups[0]["eps"] == 1e-8
        pair.both[0] = optimizer
        pair.steps()
        pair.check_params()

    def test_nan_states_do_not_spread_when_they_are_loaded_into_8_bits(self):
        pair = Pair((70, 70))
        pair.steps(1)
        saved = copy.deepcopy(pair.both[1].state_dict())
        saved["state"][0]["exp_avg"][0, 0] = torch.nan
        optimizer = PagedAdamW(pair.params[0], state_bits=8)
        optimizer.load_state_dict(saved)
        assert optimizer.state_dict()["state"][0]["exp_avg"].isfinite().all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
class TestFork:
    @staticmethod
    def in_child(function):
        """Return the exit code of a forked child that runs `function`; 0 if it returns True."""
        pid = os.fork()
        if pid == 0:
            code = 2
            try:
                code = 0 if function() else 1
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def test_a_child_cannot_step_or_write_states_on_a_disk(self, tmp_path):
        pair = Pair((5000,), page_dir=tmp_path)
        pair.steps()
        optimizer, param = pair.both[0], pair.params[0][0]
        before = {name: value.clone() for name, value in optimizer.state[param].items()}

        def refused():
            try:
                optimizer.step()
            except RuntimeError as error:
                return "belong to process" in str(error)

        def write():
            optimizer.state[param]["exp_avg"].fill_(7.0)
            return bool((optimizer.state[param]["exp_avg"] == 7).all())

        assert self.in_child(refused) == 0
        assert self.in_child(write) == 0
        assert all(torch.equal(value, before[name]) for name, value in optimizer.state[param].items())
        pair.steps()
        pair.check()

    def test_a_child_steps_its_own_copy_of_states_in_memory(self):
        pair = Pair((5000,))
        pair.steps()
        before = pair.both[0].state[pair.params[0][0]]["exp_avg"].clone()
        torch.set_num_threads(1)
        assert self.in_child(lambda: pair.both[0].step() is None) == 0
        assert torch.equal(pair.both[0].state[pair.params[0][0]]["exp_avg"], before)
