"""PagedAdamW as a torch.optim.Optimizer: schedulers, hooks, checkpoints, lifetime, and what it refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle
import weakref

import pytest
import torch
from torch import nn

from qlora_kernels.optim import PagedAdamW, PagedAdamW8bit

from .runs import DefinedAdamW, assert_same, assert_same_states, groups, parameters, run, set_gradients


class TestTorchProtocol:
    def test_schedulers_closure_and_hooks(self):
        expected, actual = parameters(), parameters()
        calls = []
        for params, make in ((expected, DefinedAdamW), (actual, PagedAdamW)):
            optimizer = make(groups(params))
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[1e-2, 1e-3], total_steps=20)
            optimizer.register_step_post_hook(lambda *_: calls.append(1))
            for step in range(20):

                def closure(params=params, step=step):
                    assert torch.is_grad_enabled()
                    set_gradients(params, step)
                    return float(step)

                assert optimizer.step(closure) == step
                scheduler.step()
        assert_same(actual, expected)
        assert len(calls) == 40

    def test_tensor_lr(self):
        expected, _ = run(lambda p: PagedAdamW(p, lr=0.015625), 5)
        actual, _ = run(lambda p: PagedAdamW(p, lr=torch.tensor(0.015625)), 5)
        assert_same(actual, expected)

    @pytest.mark.parametrize("max_grad_norm", [None, 0.1])
    def test_grad_scaler_unscales_in_the_kernel_and_skips_overflows(self, max_grad_norm):
        expected, actual = parameters(), parameters()
        plain = PagedAdamW(expected, max_grad_norm=max_grad_norm)
        scaled = PagedAdamW(actual, max_grad_norm=max_grad_norm)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        for step in range(8):
            set_gradients(actual, step)
            scale = scaler.scale(torch.ones(())).item()
            for p in actual:
                p.grad *= scale
            overflow = step == 4
            if overflow:
                actual[1].grad[0, 0] = math.inf
            else:
                set_gradients(expected, step)
                plain.step()
            scaler.step(scaled)
            scaler.update()
        assert_same(actual, expected)  # powers of two scale without a rounding
        assert scaled.state[actual[0]]["step"] == 7
        assert not hasattr(scaled, "found_inf")

    def test_state_appears_with_the_first_step_and_only_where_gradients_were(self):
        params = parameters()
        params[0].requires_grad_(False)
        optimizer = PagedAdamW(params)
        assert optimizer.state_dict()["state"] == {}
        assert optimizer.paging_report().parameters == sum(p.numel() for p in params[1:])
        set_gradients(params[1:3], 0)
        optimizer.step()
        assert set(optimizer.state_dict()["state"]) == {1, 2}
        params[0].grad = torch.ones_like(params[0])  # thawed later
        optimizer.step()
        assert set(optimizer.state_dict()["state"]) == {0, 1, 2}

    def test_gradless_step_changes_nothing(self):
        params = parameters()
        before = [p.clone() for p in params]
        PagedAdamW(params, max_grad_norm=1.0, stochastic_rounding=True).step()
        assert_same(params, before)

    def test_added_groups_page_too(self, where):
        expected, actual = parameters(), parameters()
        for params, make in ((expected, DefinedAdamW), (actual, lambda p: PagedAdamW(p, **where))):
            optimizer = make(params[:4])
            set_gradients(params[:4], 0)
            optimizer.step()
            optimizer.add_param_group({"params": params[4:], "lr": 1e-2})
            set_gradients(params, 1)
            optimizer.step()
        assert_same(actual, expected)
        assert set(optimizer.paging_report().kinds) == {"mapped" if where else "resident"}


class TestCheckpoints:
    @pytest.mark.parametrize("source", ["torch", "ours"])
    @pytest.mark.parametrize("target", ["torch", "ours"])
    def test_interchange_continues_bit_identically(self, source, target, where):
        makers = {"torch": lambda p: DefinedAdamW(groups(p)), "ours": lambda p: PagedAdamW(groups(p), **where)}
        expected, _ = run(makers["torch"], 12, params=parameters())
        params, optimizer = run(makers[source], 6, params=parameters())
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)

        def resumed(p):
            continued = makers[target](p)
            continued.load_state_dict(torch.load(buffer, weights_only=True))
            return continued

        actual, continued = run(resumed, 6, params=params, first=6)
        assert_same(actual, expected)
        if target == "ours":
            report = continued.paging_report()
            assert report.kinds == ("mapped",) if where else ("resident",)
            arena = continued._placement.arenas[0].memory.arena
            lower, upper = arena.data_ptr(), arena.data_ptr() + arena.nbytes
            for state in continued.state.values():
                assert state["exp_avg"].numel() == 0 or lower <= state["exp_avg"].data_ptr() < upper

    @pytest.mark.parametrize("packed", [False, True])
    def test_8bit_resumes_bit_identically(self, packed, where):
        expected, whole = run(lambda p: PagedAdamW8bit(p, lr=1e-2), 12)
        params, optimizer = run(lambda p: PagedAdamW8bit(p, lr=1e-2), 6)
        saved = copy.deepcopy(optimizer.packed_state_dict() if packed else optimizer.state_dict())
        if packed:
            assert saved["state"][1]["exp_avg_q"].dtype == torch.uint8

        def resumed(p):
            continued = PagedAdamW8bit(p, **where)
            continued.load_state_dict(saved)
            return continued

        actual, continued = run(resumed, 6, params=params, first=6)
        assert_same(actual, expected)
        assert_same_states(continued, whole)

    def test_8bit_states_load_into_torch_and_into_32_bits(self):
        _, optimizer = run(lambda p: PagedAdamW8bit(p), 6)
        saved, packed = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.packed_state_dict())
        others = [torch.optim.AdamW(parameters()), PagedAdamW(parameters()), PagedAdamW(parameters())]
        for other, state in zip(others, (saved, saved, packed), strict=True):
            other.load_state_dict(state)
            for p, value in zip(other.param_groups[0]["params"], saved["state"].values(), strict=True):
                assert torch.equal(other.state[p]["exp_avg"], value["exp_avg"])
                assert torch.equal(other.state[p]["exp_avg_sq"], value["exp_avg_sq"])

    def test_loading_a_fresh_state_clears_the_old_one(self):
        fresh = PagedAdamW(parameters()).state_dict()
        expected, _ = run(lambda p: PagedAdamW(p), 3)
        actual = parameters()
        _, optimizer = run(lambda p: PagedAdamW(p), 4, params=[nn.Parameter(p.detach().clone()) for p in actual])
        used = optimizer.param_groups[0]["params"]
        optimizer.load_state_dict(fresh)
        for p, q in zip(used, actual, strict=True):
            p.data.copy_(q)
        for step in range(3):
            set_gradients(used, step)
            optimizer.step()
        assert_same(used, expected)

    def test_users_hooks_run_around_the_load(self):
        _, optimizer = run(lambda p: PagedAdamW(p), 2)
        seen = []
        other = PagedAdamW(parameters())
        other.register_load_state_dict_pre_hook(lambda o, s: seen.append(len(s["state"])))
        other.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
        other.load_state_dict(optimizer.state_dict())
        assert seen == [7, 7]
        other.load_state_dict(optimizer.state_dict())
        assert seen == [7, 7, 7, 7]

    def test_copies_and_pickles_keep_states_and_paging(self, where):
        params, optimizer = run(lambda p: PagedAdamW(p, max_grad_norm=1.0, **where), 3)
        for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert_same_states(twin, optimizer)
            assert twin.paging_report().kinds == optimizer.paging_report().kinds
            assert twin.max_grad_norm == 1.0
            twin_params = twin.param_groups[0]["params"]
            set_gradients(twin_params, 3)
            twin.step()
        set_gradients(params, 3)
        optimizer.step()
        assert_same(twin_params, params)


class TestLifetime:
    def test_freed_with_the_last_reference_without_a_collector(self, where):
        _, optimizer = run(lambda p: PagedAdamW(p, **where), 2)
        arena = weakref.ref(optimizer._placement.arenas[0].memory.arena.untyped_storage())
        memory = weakref.ref(optimizer._placement.arenas[0].memory)
        del optimizer
        assert memory() is None
        assert arena() is None

    def test_close_frees_the_states_and_refuses_further_calls(self, where):
        params = parameters()
        with PagedAdamW(params, **where) as optimizer:
            set_gradients(params, 0)
            optimizer.step()
            memory = weakref.ref(optimizer._placement.arenas[0].memory)
        assert memory() is None
        assert optimizer.paging_report().state_bytes == 0
        optimizer.close()
        for method in (optimizer.step, optimizer.state_dict, lambda: optimizer.load_state_dict({})):
            with pytest.raises(RuntimeError, match="the optimizer is closed"):
                method()


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"lr": -1.0}, "lr must be finite and >= 0, got -1.0"),
            ({"lr": torch.ones(2)}, "lr must be a number or a tensor of one element"),
            ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
            ({"eps": math.nan}, "eps must be finite"),
            ({"weight_decay": -0.1}, "weight_decay must be finite and >= 0"),
            ({"state_bits": 4}, "state_bits must be 8 or 32, got 4"),
            ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
            ({"page_dir": "/nonexistent"}, "page_dir must be an existing directory"),
        ],
        ids=str,
    )
    def test_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            PagedAdamW(parameters(), **arguments)

    def test_parameters(self):
        with pytest.raises(TypeError, match=r"must be float32, bfloat16 or float16, got torch\.float64"):
            PagedAdamW([nn.Parameter(torch.zeros(3, dtype=torch.float64))])
        with pytest.raises(ValueError, match="must fill a block of memory"):
            PagedAdamW([nn.Parameter(torch.zeros(4, 6)[:, ::2])])

    def test_sparse_gradients(self):
        embedding = nn.Embedding(10, 4, sparse=True)
        optimizer = PagedAdamW(embedding.parameters())
        embedding(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(NotImplementedError, match="gradients must be dense"):
            optimizer.step()

    def test_state_dicts_that_do_not_fit(self):
        _, amsgrad = run(lambda p: torch.optim.AdamW(p, amsgrad=True), 1)
        optimizer = PagedAdamW(parameters())
        with pytest.raises(ValueError, match="amsgrad must be false"):
            optimizer.load_state_dict(amsgrad.state_dict())
        _, other = run(lambda p: torch.optim.AdamW(p), 1)
        saved = other.state_dict()
        saved["state"][1]["exp_avg"] = torch.zeros(3)
        with pytest.raises(ValueError, match=r"exp_avg must have its parameter's shape, got \(3,\)"):
            optimizer.load_state_dict(saved)
        with pytest.raises(ValueError, match="different number of parameter groups"):
            optimizer.load_state_dict({**saved, "param_groups": []})
