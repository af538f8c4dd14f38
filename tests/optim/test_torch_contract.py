"""PagedAdamW follows, or refuses, every change between two steps that torch's optimizers allow."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from qlora_kernels.optim import PagedAdamW
from tests.optim.pair import Pair
from tests.support.tolerances import Expected, assert_within, gamma


@pytest.fixture(scope="module")
def torch_inputs(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs") / "inputs.pt"
    done = subprocess.run(
        [sys.executable, "-m", "tests.optim.torch_inputs", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"this torch has no inputs to offer: {done.stderr[-300:]}")
    return torch.load(path, weights_only=False)


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
